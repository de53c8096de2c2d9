# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a check says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """
    What a check found where all is well. Where it is not, a check raises [`Failed`] or [`Skipped`].

    Args:
        reason (`str`):
            One line, such as `"relative error 3e-07"`.
        measured (`Mapping[str, Any]`, *optional*):
            Numbers, texts and lists of them.
    """

    reason: str
    measured: Mapping[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """
    Something is wrong.

    Args:
        reason (`str`):
            What, in one line.
        measured (`Any`):
            As for [`Finding`].
    """

    def __init__(self, reason: str, **measured: Any) -> None:
        super().__init__(reason)
        self.measured = measured


class Skipped(Exception):
    """A check does not apply to this machine or model. The message says why."""


@dataclass(frozen=True)
class Verdict:
    """
    One line of the report.

    Args:
        name (`str`):
            The check.
        verdict (`str`):
            `"out of time"` for a check that was stopped, `"not run"` for one that was not begun.
        reason (`str`):
            Why, or what was found; one line.
        seconds (`float`):
            How long it took.
        measured (`Mapping[str, Any]`):
            See [`Finding`].
    """

    name: str
    verdict: Literal["pass", "fail", "skipped", "out of time", "not run"]
    reason: str
    seconds: float = 0.0
    measured: Mapping[str, Any] = field(default_factory=dict)
