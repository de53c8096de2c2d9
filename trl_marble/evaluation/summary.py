# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run in a few numbers: how the rewards changed, and what balancing them did to the update direction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from .formatting import format_value, format_with_error


# A change is called real from this many standard errors upwards (a two-sided 5% test).
SIGNIFICANT = 2.0


@dataclass(frozen=True)
class BalanceSummary:
    """
    The balancing diagnostics of a whole run. `None` means that it was not measured.

    Args:
        alpha (`dict[str, float]`):
            Reward name -> mean weight over the logged steps, each in [0, 1], together 1.
        cos_min (`float`, *optional*):
            The worst cosine between an update direction and a reward's gradient, over all steps and rewards, in
            [-1, 1]. Not negative means that no step was against any reward.
        conflict (`float`, *optional*):
            The share of the steps, in [0, 1], in which some reward's cosine was negative.
        weighted_sum_cos_min (`float`, *optional*):
            Like `cos_min`, for the weighted sum of the same gradients, which was not taken.
        weighted_sum_conflict (`float`, *optional*):
            Like `conflict`, for the weighted sum.
    """

    alpha: dict[str, float]
    cos_min: float | None = None
    conflict: float | None = None
    weighted_sum_cos_min: float | None = None
    weighted_sum_conflict: float | None = None


def summarize_balance(history: Sequence[Mapping[str, Any]]) -> BalanceSummary | None:
    """
    Sum up the balancing diagnostics of a run from its log.

    A row of the log holds means over the steps since the row before. So the worst cosine is that of the run where
    every step is logged (`logging_steps=1`), and the worst of those means otherwise.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `balance/alpha/<reward>`, `balance/cos_min`, `balance/conflict` and
            the last two of `balance/weighted_sum/`. Rows without them, such as those of evaluations, are passed over.

    Returns:
        `BalanceSummary`, or `None` where no row has any weight `balance/alpha/<reward>`.
    """
    alpha: dict[str, list[float]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith("balance/alpha/"):
                alpha.setdefault(key.removeprefix("balance/alpha/"), []).append(value)
    if not alpha:
        return None
    cos_min, conflict = _cosine_figures(history, "balance")
    weighted_sum_cos_min, weighted_sum_conflict = _cosine_figures(history, "balance/weighted_sum")
    return BalanceSummary(
        alpha={name: sum(values) / len(values) for name, values in alpha.items()},
        cos_min=cos_min,
        conflict=conflict,
        weighted_sum_cos_min=weighted_sum_cos_min,
        weighted_sum_conflict=weighted_sum_conflict,
    )


def _cosine_figures(history: Sequence[Mapping[str, Any]], prefix: str) -> tuple[float | None, float | None]:
    """The least worst cosine of a direction and its share of steps in conflict; `None`s where no cosine is finite."""
    rows = [row for row in history if math.isfinite(row.get(f"{prefix}/cos_min", math.nan))]
    if not rows:
        return None, None
    conflict = sum(row[f"{prefix}/conflict"] for row in rows) / len(rows)
    return min(row[f"{prefix}/cos_min"] for row in rows), conflict


def rewards_table(
    before: Mapping[str, tuple[float, float]],
    after: Mapping[str, tuple[float, float]],
    difference_se: Mapping[str, float] | None = None,
    title: str = "Rewards on held-out prompts",
) -> Table:
    """
    A table for the terminal: every reward before and after, its change, and the change in standard errors.

    Changes of at least two standard errors are green where the reward rose and red where it fell.

    Args:
        before (`Mapping[str, tuple[float, float]]`):
            Reward name -> (mean, standard error of the mean) before training, in the reward's own unit.
        after (`Mapping[str, tuple[float, float]]`):
            The same after training, for the same rewards.
        difference_se (`Mapping[str, float]`, *optional*):
            Reward name -> standard error of after - before, where it was computed from pairs (same prompts, same
            seeds). Defaults to that of independent samples, sqrt(se_before^2 + se_after^2), which is the larger one
            where pairs are alike.
        title (`str`, *optional*, defaults to `"Rewards on held-out prompts"`):
            The table's title.

    A mean without a measured error stands alone: errors are taken over prompts, so that one prompt has none.

    Returns:
        `rich.table.Table`: one row a reward, in the order of `before`.

    Raises:
        `ValueError`: where the mappings name different rewards.
    """
    named = {"after": after} if difference_se is None else {"after": after, "difference_se": difference_se}
    for argument, mapping in named.items():
        if mapping.keys() != before.keys():
            raise ValueError(
                f"`{argument}` has the rewards {sorted(mapping)}, `before` has {sorted(before)}. "
                "Measure the same rewards."
            )
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("Reward")
    for header in ("Before", "After", "Change", "Change / SE"):
        table.add_column(header, justify="right")
    for name in before:
        (mean_before, se_before), (mean_after, se_after) = before[name], after[name]
        change = mean_after - mean_before
        se = math.hypot(se_before, se_after) if difference_se is None else difference_se[name]
        ratio = change / se if se > 0 else math.nan
        style = "green" if ratio >= SIGNIFICANT else "red" if ratio <= -SIGNIFICANT else ""
        table.add_row(
            Text(name),
            format_with_error((mean_before, se_before)),
            format_with_error((mean_after, se_after)),
            Text(format_value(change, sign=True), style=style),
            f"{ratio:+.1f}" if math.isfinite(ratio) else "-",
        )
    return table
