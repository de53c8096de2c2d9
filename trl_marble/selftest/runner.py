# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Runs checks one after the other, within the time that there is."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from .anonymous import anonymous
from .compilation import check_compilation
from .costs import check_costs
from .gradients import check_gradients
from .offloading import check_offloading
from .policies import check_policies
from .precision import check_precision
from .processes import ProcessCheck
from .quantized import check_quantized, require_quantization
from .resuming import check_resuming
from .subject import Subject
from .verdicts import Failed, Finding, Skipped, Verdict


class Check(NamedTuple):
    """
    A check, and how long it takes.

    Args:
        name (`str`):
            What the report calls it.
        run (`Callable[[Subject], Finding]`):
            The check.
        times (`float`):
            About how often it takes as long as the first check that passed.
        seconds (`float`, *optional*, defaults to `0.0`):
            What it takes beside that, whatever the model.
        require (`Callable[[], None]`, *optional*):
            Raises [`Skipped`] where the check does not apply to this machine. Asked first, as no time changes it.
    """

    name: str
    run: Callable[[Subject], Finding]
    times: float
    seconds: float = 0.0
    require: Callable[[], None] = lambda: None


class OutOfTime(BaseException):
    """The time is over. Like an interruption by the user, it is no error that anything should handle on the way."""


def all_checks(num_gpus: int = 0, visible: str | None = None) -> list[Check]:
    """
    All checks, what matters most first.

    Args:
        num_gpus (`int`, *optional*, defaults to `0`):
            See [`ProcessCheck`].
        visible (`str`, *optional*):
            See [`ProcessCheck`].
    """
    processes = ProcessCheck(num_gpus, visible)
    return [
        Check("per-reward gradients", check_gradients, 1),
        Check("old and base weights", check_policies, 1),
        Check("resumed checkpoint", check_resuming, 4),
        Check("bf16 directions", check_precision, 1.5),
        Check("cost of a step", check_costs, 4),
        Check("CPU offload", check_offloading, 3),
        Check("quantized base", check_quantized, 1.5, 5, require_quantization),
        Check("two processes", processes, 2, 30, processes.require),
        Check("torch.compile", check_compilation, 20, 10),
    ]


def run_checks(
    checks: Sequence[Check],
    subject: Subject,
    deadline: float,
    show: Callable[[Verdict], None],
    begin: Callable[[str], None] = lambda name: None,
) -> list[Verdict]:
    """
    Run checks in their order. One that fails, whatever it raises, stops nobody else.

    Args:
        checks (`Sequence[Check]`):
            The checks.
        subject ([`Subject`]):
            What is checked.
        deadline (`float`):
            When to end, on the clock of `time.monotonic`. A check that would take longer is not begun, and one that
            does is stopped (on Windows it goes on to its end).
        show (`Callable[[Verdict], None]`):
            Called with each verdict.
        begin (`Callable[[str], None]`, *optional*):
            Called with the name of each check before it.

    Returns:
        `list[Verdict]`: One for each check.
    """
    unit, verdicts = math.inf, []
    for check in checks:
        begin(check.name)
        verdict = _run_in_time(check, subject, deadline, unit)
        if verdict.verdict == "pass":  # the first one warms up: a later one may say less
            unit = min(unit, max(verdict.seconds - check.seconds, 0) / check.times)
        verdicts.append(verdict)
        show(verdict)
    return verdicts


def _run_in_time(check: Check, subject: Subject, deadline: float, unit: float) -> Verdict:
    """The verdict of a check that takes about so many times the unit, or why it was not begun."""
    try:
        check.require()
    except Skipped as why:
        return Verdict(check.name, "skipped", anonymous(str(why)))
    left = deadline - time.monotonic()
    needed = 0.0 if math.isinf(unit) else check.times * unit + check.seconds
    if left > 0 and needed <= left:
        return _run(check, subject, left)
    about = f"it takes about {needed:.0f} s, and " if needed else ""
    return Verdict(check.name, "not run", f"{about}{max(left, 0):.0f} s are left; give it more --minutes")


def _run(check: Check, subject: Subject, seconds: float) -> Verdict:
    start = time.monotonic()

    def verdict(kind, reason, measured=None) -> Verdict:
        return Verdict(check.name, kind, anonymous(reason), time.monotonic() - start, measured or {})

    try:
        with limited(seconds):
            finding = check.run(subject)
    except Skipped as why:
        return verdict("skipped", str(why))
    except Failed as failure:
        return verdict("fail", str(failure), failure.measured)
    except OutOfTime:
        return verdict("out of time", "the minutes were over; give it more --minutes")
    except Exception as error:  # whatever can go wrong on a machine that nobody has seen
        lines = str(error).splitlines() or [""]
        return verdict("fail", f"{type(error).__name__}: {lines[0]}")
    return verdict("pass", finding.reason, finding.measured)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """
    Stop what is inside the context after some time.

    Args:
        seconds (`float`):
            The time, above 0. It has no effect on Windows, which has no such clock, and outside of the main thread.

    Raises:
        [`OutOfTime`]: When it is over.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
