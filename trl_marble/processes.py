# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Several processes that fail together: none waits for one that has stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import gather_object

from .rewards import RewardError


class FailingTogether:
    """
    Where one process of a run fails, all of them raise the same error.

    Without it, a process that raises would leave the others waiting in their next collective operation.

    Attributes:
        failed (`bool`): Whether an error was raised in all processes. They are then at the same place of the run.

    Example:

    ```python
    >>> together = FailingTogether()
    >>> with together.phase():
    ...     answer = 6 * 7
    >>> together.failed
    False
    ```
    """

    def __init__(self) -> None:
        self.failed = False

    @contextmanager
    def phase(self, exchanges: bool = False, ask: bool = True) -> Iterator[None]:
        """
        A part of the run that all processes go through. At its end they tell each other whether they failed.

        Phases do not contain each other.

        Args:
            exchanges (`bool`, *optional*, defaults to `False`):
                Whether processes exchange data inside, after places where only one of them may fail. That one cannot
                tell the others, which wait for its data: it raises alone, and as it ends its launcher ends the others.
            ask (`bool`, *optional*, defaults to `True`):
                Whether to wait for the other processes. A process that failed waits for them in any case, so `False`
                saves time where they all come to the end of another phase before anything else is exchanged.

        Raises:
            [`~trl_marble.rewards.RewardError`] or `RuntimeError`: In all processes, if any of them failed: the error
                of the first of these, with its number and kind; on that process with the error itself as the cause.
                The error itself where there is one process, or where processes exchange data.
        """
        state = PartialState()
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if state.num_processes == 1 or exchanges:
                self.failed = state.num_processes == 1
                raise
            failure = error
        if state.num_processes == 1 or (failure is None and not ask):
            return
        for process, told in enumerate(gather_object([None if failure is None else _tell(failure)])):
            if told is not None:
                self.failed = True
                text, of_reward = told
                message = f"Process {process} of {state.num_processes} failed with {text}"
                raise (RewardError if of_reward else RuntimeError)(message) from failure


def _tell(error: Exception) -> tuple[str, bool]:
    """What others are told of an error: kind and message, and whether a reward is to blame."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return "\n".join(lines), isinstance(error, RewardError)
