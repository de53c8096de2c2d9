# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The report: lines for the terminal, and JSON for an issue."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from .anonymous import anonymous
from .verdicts import Verdict


COLOURS = {"pass": "green", "fail": "bold red", "skipped": "cyan", "out of time": "yellow", "not run": "yellow"}


def as_line(verdict: Verdict) -> str:
    """A verdict as a line of `rich`'s markup."""
    colour = COLOURS[verdict.verdict]
    seconds = f" [dim]({verdict.seconds:.1f} s)[/]" if verdict.seconds else ""
    return f"[{colour}]{verdict.verdict:<11}[/] {verdict.name:<21} {escape(verdict.reason)}{seconds}"


def as_json(
    verdicts: Sequence[Verdict],
    model: str,
    num_gpus: int,
    minutes: float,
    seconds: float,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """
    The report to attach to an issue. It has no tokens, names of users or paths.

    Args:
        verdicts (`Sequence[Verdict]`):
            Of all checks.
        model (`str`):
            What was checked.
        num_gpus (`int`):
            How many GPUs there are.
        minutes (`float`):
            The time that was given.
        seconds (`float`):
            The time that was taken.
        environment (`Mapping[str, str]`):
            Versions and hardware.
    """
    checks = [
        {
            "name": verdict.name,
            "verdict": verdict.verdict,
            "reason": verdict.reason,
            "seconds": round(verdict.seconds, 2),
            "measured": _finite(verdict.measured),
        }
        for verdict in verdicts
    ]
    about = {"model": model, "gpus": num_gpus, "minutes": minutes, "seconds": round(seconds, 1)}
    return {"checks": checks, **about, "environment": {name: anonymous(text) for name, text in environment.items()}}


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: these are texts."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
