# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a run went, from its log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from .formatting import format_value


TIME, REWARD = "time/", "rewards/"
LABELS = {
    "rollout": "rollout",
    "decode": "- of it decoding",
    "waiting": "- of it waiting for rewards",
    "learning": "- of it rewards learning",
    "old": "old policy",
    "reference": "base model",
    "forward": "forward passes",
    "backward": "backward passes",
    "balance": "balancing",
    "optimizer": "optimizer",
}
INSIDE_ROLLOUT = ("decode", "waiting", "learning")


class TimeRow(NamedTuple):
    """A part of an optimizer step: its name, its seconds, and the share of the step that they are."""

    label: str
    seconds: float
    share: float


@dataclass(frozen=True)
class TimeSummary:
    """
    Where the time of a run went.

    Args:
        step (`float`):
            Mean time of an optimizer step in seconds.
        parts (`dict[str, float]`):
            Part of a step -> its mean time in seconds, see docs/metrics.md (`time/<part>`).
        images_per_second (`float`):
            Images that were trained on per second, on all processes.
        peak_memory (`float`, *optional*):
            The most memory that the run took, in GB.
    """

    step: float
    parts: dict[str, float]
    images_per_second: float
    peak_memory: float | None = None

    def rows(self) -> list[TimeRow]:
        """The parts that took time, what is left of the step, and the rewards, which take it beside the rollout."""
        parts = {label: self.parts[part] for part, label in LABELS.items() if self.parts.get(part)}
        parts["other"] = self.step - sum(self.parts.get(part, 0.0) for part in LABELS if part not in INSIDE_ROLLOUT)
        for part, seconds in self.parts.items():
            if part.startswith(REWARD):
                parts[f"{part.removeprefix(REWARD)} (beside the rollout)"] = seconds
        return [
            TimeRow(label, seconds, seconds / self.step if self.step > 0 else math.nan)
            for label, seconds in parts.items()
        ]

    @property
    def rate_and_memory(self) -> str:
        """Images a second, and the memory where it is known."""
        text = f"{format_value(self.images_per_second)} images a second"
        return text if self.peak_memory is None else f"{text}, peak memory {self.peak_memory:.1f} GB"


def summarize_times(history: Sequence[Mapping[str, Any]]) -> TimeSummary | None:
    """
    Summarize where the time of a run went.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `time/<part>`, `images_per_second` and `memory/peak`.

    Returns:
        `TimeSummary`, or `None` if no row has a time.
    """
    rows = [row for row in history if f"{TIME}step" in row]
    if not rows:
        return None
    names = dict.fromkeys(key.removeprefix(TIME) for row in rows for key in row if key.startswith(TIME))
    parts = {name: sum(row.get(TIME + name, 0.0) for row in rows) / len(rows) for name in names}
    return TimeSummary(
        parts.pop("step"),
        parts,
        len(rows) / sum(1 / row["images_per_second"] for row in rows),
        max((row["memory/peak"] for row in rows if "memory/peak" in row), default=None),
    )


def times_table(summary: TimeSummary) -> Table:
    """
    A table for the terminal: each part of an optimizer step with its time and its share of the step.

    Args:
        summary ([`TimeSummary`]):
            What [`summarize_times`] returned.
    """
    title, caption = f"Where the time went: {format_value(summary.step)} s a step", summary.rate_and_memory
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.add_column("Part of a step")
    for header in ("Seconds", "Share"):
        table.add_column(header, justify="right")
    for row in summary.rows():
        table.add_row(Text(row.label), format_value(row.seconds), f"{row.share:.0%}")
    return table
