# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Summarize a run: how the rewards changed, and what balancing did to the update direction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from .formatting import format_value, format_with_error


# A change is called significant from this many standard errors on (a two-sided 5% test).
SIGNIFICANT = 2.0

WEIGHT = "progress/weight/"


@dataclass(frozen=True)
class BalanceSummary:
    """
    The balancing diagnostics of a run. `None` means not measured.

    Args:
        alpha (`dict[str, float]`):
            Reward name -> mean weight over the logged steps, each in [0, 1], with sum 1.
        cos_min (`float`, *optional*):
            The worst cosine between an update direction and a reward's *sampled* gradient, over all steps and rewards,
            in [-1, 1]. If it is not negative, no step went against any sampled gradient. The direction contains the
            samples' noise, so this says little of the rewards: see `heldout_cos`.
        conflict (`float`, *optional*):
            The share of the steps, in [0, 1], in which some reward's cosine was negative.
        weighted_sum_cos_min (`float`, *optional*):
            Like `cos_min`, for the weighted sum of the same gradients, which was not used.
        weighted_sum_conflict (`float`, *optional*):
            Like `conflict`, for the weighted sum.
        cos (`dict[str, float | None]`, *optional*):
            Reward name -> mean cosine with the reward's sampled gradient.
        heldout_cos (`dict[str, float | None]`, *optional*):
            Reward name -> mean cosine between the direction of one half of a step's prompts and the reward's gradient
            in the other half, see [`~trl_marble.balance.heldout_cosines`]. Its sign says whether the directions
            raised the reward.
        heldout_cos_se (`dict[str, float | None]`, *optional*):
            Reward name -> standard error of `heldout_cos` over the logged steps.
        weighted_sum_heldout_cos (`dict[str, float | None]`, *optional*):
            Like `heldout_cos`, for the weighted sum.
        signal (`dict[str, float | None]`, *optional*):
            Reward name -> share of the squared norm of the reward's gradient that is signal, summed over the run, see
            [`~trl_marble.balance.signal_shares`].
    """

    alpha: dict[str, float]
    cos_min: float | None = None
    conflict: float | None = None
    weighted_sum_cos_min: float | None = None
    weighted_sum_conflict: float | None = None
    cos: dict[str, float | None] = field(default_factory=dict)
    heldout_cos: dict[str, float | None] = field(default_factory=dict)
    heldout_cos_se: dict[str, float | None] = field(default_factory=dict)
    weighted_sum_heldout_cos: dict[str, float | None] = field(default_factory=dict)
    signal: dict[str, float | None] = field(default_factory=dict)


def summarize_balance(history: Sequence[Mapping[str, Any]]) -> BalanceSummary | None:
    """
    Summarize the balancing diagnostics of a run from its log.

    A row of the log has means over the steps since the row before. So the worst cosine is that of all steps if every
    step is logged (`logging_steps=1`), and otherwise the worst of those means.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `balance/alpha/<reward>`, `balance/cos/<reward>`,
            `balance/heldout_cos/<reward>`, `balance/signal/<reward>` with `balance/grad_norm/<reward>`,
            `balance/cos_min`, `balance/conflict`,
            and of `balance/weighted_sum` the last two and `heldout_cos/<reward>`. Rows without them, such as those of
            evaluations, are ignored.

    Returns:
        `BalanceSummary`, or `None` if no row has a weight `balance/alpha/<reward>`.
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

    def average(kind: str) -> dict[str, tuple[float, float]]:
        return {name: mean_with_error(history, f"balance/{kind}/{name}") for name in alpha}

    held_out = average("heldout_cos")
    return BalanceSummary(
        alpha={name: sum(values) / len(values) for name, values in alpha.items()},
        cos_min=cos_min,
        conflict=conflict,
        weighted_sum_cos_min=weighted_sum_cos_min,
        weighted_sum_conflict=weighted_sum_conflict,
        cos=_measured(average("cos"), 0),
        heldout_cos=_measured(held_out, 0),
        heldout_cos_se=_measured(held_out, 1),
        weighted_sum_heldout_cos=_measured(average("weighted_sum/heldout_cos"), 0),
        signal=_measured({name: (_signal_share(history, name), math.nan) for name in alpha}, 0),
    )


def mean_with_error(history: Sequence[Mapping[str, Any]], key: str, last: int | None = None) -> tuple[float, float]:
    """
    Average a metric that is noisy in each step.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        key (`str`):
            The metric. Rows in which it is missing or NaN are ignored.
        last (`int`, *optional*):
            Take this many of the latest values. Defaults to all.

    Returns:
        `tuple[float, float]`: The mean, NaN without values, and its standard error, NaN with fewer than two.
    """
    values = [row[key] for row in history if math.isfinite(row.get(key, math.nan))]
    if last is not None:
        values = values[-last:]
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _signal_share(history: Sequence[Mapping[str, Any]], name: str) -> float:
    """
    The signal of all steps divided by the squared norms of all steps. (A mean of the steps' shares would be too low: a
    step's squared norm is small where its estimate of the signal is.)
    """
    keys = f"balance/signal/{name}", f"balance/grad_norm/{name}"
    pairs = [tuple(row.get(key, math.nan) for key in keys) for row in history]
    known = [(share, norm**2) for share, norm in pairs if math.isfinite(share) and math.isfinite(norm)]
    total = math.fsum(squared for _, squared in known)
    return math.fsum(share * squared for share, squared in known) / total if total > 0 else math.nan


def _measured(figures: Mapping[str, tuple[float, float]], place: int) -> dict[str, float | None]:
    """One of both figures of every reward, `None` where it is NaN; empty if all are."""
    values = {name: None if math.isnan(pair[place]) else pair[place] for name, pair in figures.items()}
    return values if any(value is not None for value in values.values()) else {}


@dataclass(frozen=True)
class ProgressSummary:
    """
    How far each reward had come at the end of a run whose weights follow the progress, and what it weighed then.

    Args:
        progress (`dict[str, float]`):
            Reward name -> its gain since the base model on the training prompts, in units of its scale; NaN if it
            never applied. See [`~trl_marble.balance.ProgressWeights`].
        weight (`dict[str, float]`):
            Reward name -> its weight in the sum of the scaled rewards, in [0, 1], with sum 1; all 0 if all rewards had
            reached their targets.
    """

    progress: dict[str, float]
    weight: dict[str, float]


def summarize_progress(history: Sequence[Mapping[str, Any]]) -> ProgressSummary | None:
    """
    Summarize the weights by progress of a run from its log.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `progress/<reward>` and `progress/weight/<reward>` of the last row
            that has them.

    Returns:
        `ProgressSummary`, or `None` if no row has a weight.
    """
    for row in reversed(history):
        weight = {key.removeprefix(WEIGHT): value for key, value in row.items() if key.startswith(WEIGHT)}
        if weight:
            return ProgressSummary({name: row[f"progress/{name}"] for name in weight}, weight)
    return None


def _cosine_figures(history: Sequence[Mapping[str, Any]], prefix: str) -> tuple[float | None, float | None]:
    """A direction's worst cosine and its share of steps in conflict; `None` for both if no cosine is finite."""
    rows = [row for row in history if math.isfinite(row.get(f"{prefix}/cos_min", math.nan))]
    if not rows:
        return None, None
    conflict = sum(row[f"{prefix}/conflict"] for row in rows) / len(rows)
    return min(row[f"{prefix}/cos_min"] for row in rows), conflict


def rewards_table(
    before: Mapping[str, tuple[float, float]],
    after: Mapping[str, tuple[float, float]],
    difference_se: Mapping[str, float],
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
        difference_se (`Mapping[str, float]`):
            Reward name -> standard error of after - before, over prompts, from pairs of the same prompts and seeds.
        title (`str`, *optional*, defaults to `"Rewards on held-out prompts"`):
            The table's title.

    A mean without an error, which is one over a single prompt, is written alone.

    Returns:
        `rich.table.Table`: one row per reward, in the order of `before`.

    Raises:
        `ValueError`: the mappings name different rewards.
    """
    for argument, mapping in {"after": after, "difference_se": difference_se}.items():
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
        se = difference_se[name]
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
