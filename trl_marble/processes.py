# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Raise an error of one process in all processes, so that none waits for one that has stopped."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from .rewards import RewardError
from .termination import RunTerminated


logger = logging.get_logger(__name__)


class _Kind(Enum):
    """What made a process stop."""

    ERROR = auto()
    REWARD_ERROR = auto()
    SIGTERM = auto()


class FailingTogether:
    """
    If one process of a run fails, or is asked to end, all of them raise the same error.

    Without it, a process that raises would leave the others waiting in their next collective operation.

    Attributes:
        failed (`bool`): Whether an error was raised in all processes, all at the same place of the run.
        asked_to_end (`bool`): Whether this process has received SIGTERM, see [`~FailingTogether.ending_on_sigterm`].

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
        self.failed = self.asked_to_end = False

    @contextmanager
    def ending_on_sigterm(self) -> Iterator[None]:
        """
        While inside, SIGTERM to any process makes all of them raise [`RunTerminated`] at the end of a phase: where
        nothing is half done. Further signals change nothing. A thread other than the main one receives no signals, and
        leaves everything as it is.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.asked_to_end = False

        def note(*_: Any) -> None:
            self.asked_to_end = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

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
            [`RunTerminated`]: In all processes, if none failed and any was asked to end.
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
        own = None if failure is None else _describe(failure)
        if own is None and self.asked_to_end and not self.failed and (ask or not exchanges):
            own = _Kind.SIGTERM, "SIGTERM"
        if own is None and (state.num_processes == 1 or not ask):
            return
        told = [(process, *each) for process, each in enumerate(gather_object([own])) if each is not None]
        for process, kind, text in sorted(told, key=lambda each: each[1] is _Kind.SIGTERM):  # errors first
            self.failed = True
            if kind is _Kind.SIGTERM:
                if state.is_main_process:
                    logger.warning(f"Process {process} has received SIGTERM: the run ends here.")
                raise RunTerminated
            message = f"Process {process} of {state.num_processes} failed with {text}"
            raise (RewardError if kind is _Kind.REWARD_ERROR else RuntimeError)(message) from failure


def _describe(error: Exception) -> tuple[_Kind, str]:
    """An error as text for other processes, and whether it is that of a reward."""
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return _Kind.REWARD_ERROR if isinstance(error, RewardError) else _Kind.ERROR, "\n".join(lines)
