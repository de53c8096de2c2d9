# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Raise an error of one process in all processes, so that none waits for one that has stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import gather_object

from .rewards import RewardError


class FailingTogether:
    """
    If one process of a run fails, all of them raise the same error.

    Without it, a process that raises would leave the others waiting in their next collective operation.

    Attributes:
        failed (`bool`): Whether an error was raised in all processes, all at the same place of the run.

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
        A part of the run that all processes execute. At its end they exchange whether they failed.

        Phases must not be nested.

        Args:
            exchanges (`bool`, *optional*, defaults to `False`):
                Whether processes exchange data inside, after places where only one of them may fail. That process
                cannot inform the others, which wait for its data: it raises alone, and when it ends its launcher ends
                the others.
            ask (`bool`, *optional*, defaults to `True`):
                Whether to wait for the other processes. A process that failed waits for them in any case. `False`
                saves time if all processes reach the end of another phase before they exchange anything else.

        Raises:
            [`~trl_marble.rewards.RewardError`] or `RuntimeError`: In all processes, if any of them failed: the error
                of the first of these, with its number and type; on that process with the error itself as the cause.
                With one process, or if processes exchange data, the error itself.
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
        for process, found in enumerate(gather_object([None if failure is None else _describe(failure)])):
            if found is not None:
                self.failed = True
                text, of_reward = found
                message = f"Process {process} of {state.num_processes} failed with {text}"
                raise (RewardError if of_reward else RuntimeError)(message) from failure


def _describe(error: Exception) -> tuple[str, bool]:
    """An error as text for other processes, and whether it is that of a reward."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return "\n".join(lines), isinstance(error, RewardError)
