# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Plots of a run: the balance between its rewards, and the rewards themselves."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..media import PAPER
from .figures import CONFLICT, FAINT, INK, NOT_TAKEN, RULE, TAKEN, new_figure, save_figure
from .summary import WEIGHT, mean_with_error


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, for readers with the common kinds of colour blindness too; without its yellow and black.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7A7A7A")


def plot_balance(history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """
    Plot how a run balanced its rewards: their weights over the steps; below them the worst in-sample cosine between
    the update and a reward's sampled gradient, together with that of the weighted sum that was not taken; and below
    these, if they were measured, the held-out cosines of all rewards.

    Held-out cosines are noisy in a single step: their lines are running means over a tenth of the measured steps (at
    least ten), and the legend has the means over the run with their standard errors.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `step`, `balance/alpha/<reward>`, `balance/cos_min` and, if logged,
            `balance/weighted_sum/cos_min` and `balance/heldout_cos/<reward>`. Rows without them are ignored, so
            weights may be logged more often than cosines.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: no row has weights, no row has cosines, a row has the weights of only some rewards, or a weight
            is not finite.
    """
    prefix = "balance/alpha/"
    weighted = [row for row in history if any(key.startswith(prefix) for key in row)]
    names = _names(history, prefix, "")
    cosines = _finite_rows(history, "balance/cos_min")
    if not weighted or not cosines:
        raise ValueError(
            "The history has no `balance/alpha/<reward>` or no finite `balance/cos_min`. Log them: train with "
            '`multi_objective_aggregation="marble"`, and with `logging_steps` small enough that a balancing step is '
            "logged."
        )
    for row in weighted:
        bad = [name for name in names if not math.isfinite(row.get(prefix + name, math.nan))]
        if bad:
            raise ValueError(
                f"The history's row of step {row.get('step')} has no finite `{prefix}{bad[0]}`. Log every reward's "
                "weight whenever any is logged."
            )
    steps = _steps(weighted)
    weights = np.array([[row[prefix + name] for row in weighted] for name in names])
    means = weights.mean(axis=1)
    if len(steps) == 1:  # one step would be an area without width
        steps, weights = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.repeat(weights, 2, axis=1)

    held_out = {name: _finite_rows(history, f"balance/heldout_cos/{name}") for name in names}
    measures_held_out = any(held_out.values())
    figure = new_figure(9.0, 8.2 if measures_held_out else 5.4)
    top, bottom, *below = figure.subplots(
        2 + measures_held_out, 1, sharex=True, height_ratios=[3, 2, 3][: 2 + measures_held_out]
    )
    colors = [_color(index) for index in range(len(names))]
    areas = top.stackplot(steps, weights, colors=colors, alpha=0.88, edgecolor=PAPER, linewidth=0.8)
    labels = [f"{name}  ({mean:.2f})" for name, mean in zip(names, means, strict=True)]
    _style(top, "Weight of each reward", "share")
    top.set_ylim(0, max(1.0, float(weights.sum(axis=0).max())))
    top.set_xlim(steps[0], steps[-1])
    top.grid(False)
    # The legend in the order of the areas, the topmost first.
    _side_legend(top, areas[::-1], labels[::-1], "reward (mean weight)")

    handles, labels = [], []
    for key, color, label in (
        ("balance/cos_min", TAKEN, "update taken"),
        ("balance/weighted_sum/cos_min", NOT_TAKEN, "weighted sum, not taken"),
    ):
        rows = _finite_rows(cosines, key)
        if rows:
            values = np.array([row[key] for row in rows], dtype=float)
            handles += _line(bottom, _steps(rows), values, color)
            labels.append(f"{label}  ({values.min():+.2f})")
    _shade_below_zero(bottom)
    _style(bottom, "In-sample: worst cosine with the gradients that the update is made of", "cosine")
    note = "shaded: against some\nreward's sampled gradient"
    _side_legend(bottom, handles, labels, "direction (worst)", note=note)
    for axes in below:
        _plot_held_out(axes, held_out, colors)
    (below or [bottom])[0].set_xlabel("optimizer step", color=FAINT, fontsize=9)
    return save_figure(figure, path)


def _plot_held_out(axes: "Axes", held_out: Mapping[str, list[Mapping[str, Any]]], colors: Sequence[str]) -> None:
    """Draw the running mean of each reward's held-out cosine."""
    handles, labels = [], []
    for (name, rows), color in zip(held_out.items(), colors, strict=True):
        if rows:
            key = f"balance/heldout_cos/{name}"
            values = np.array([row[key] for row in rows], dtype=float)
            handles += _line(axes, _steps(rows), _running_mean(values, max(10, len(values) // 10)), color)
            mean, error = mean_with_error(rows, key)
            labels.append(f"{name}  ({mean:+.3f}" + (")" if math.isnan(error) else f" ± {error:.3f})"))
    _shade_below_zero(axes)
    _style(axes, "Held-out: cosine with each reward's gradient on other prompts", "cosine")
    note = "running means · shaded:\nagainst the reward"
    _side_legend(axes, handles, labels, "reward (mean ± error)", note=note)


def _shade_below_zero(axes: "Axes", margin: float = 0.04) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -margin), max(high, margin))
    axes.axhspan(axes.get_ylim()[0], 0, color=CONFLICT, zorder=0, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)


def plot_rewards(history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """
    Plot each reward's mean over the training steps, with one panel per reward, since rewards have different units.

    The thin line is the mean over the rollouts; the thick line is its running mean over a twentieth of the run. Points
    are the evaluations, with bars of one standard error over prompts to each side. Evaluations use other prompts than
    rollouts, and the moving average of the weights, so that the points need not be on the line.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `step`, `rewards/<reward>/mean`, `eval_rewards/<reward>/mean` and
            `eval_rewards/<reward>/standard_error`. NaN is a gap (no sample of the step had the reward), or a point
            without bars (only one prompt had it). Held-out rewards have evaluations only.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: no row has the mean of a reward.
    """
    trained, evaluated = (_names(history, prefix, "/mean") for prefix in ("rewards/", "eval_rewards/"))
    names = list(dict.fromkeys([*trained, *evaluated]))
    if not names:
        raise ValueError(
            "The history has neither `rewards/<reward>/mean` nor `eval_rewards/<reward>/mean`. Log them: pass "
            "`trainer.state.log_history` after training with `logging_steps` small enough that a step is logged."
        )
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = new_figure(3.3 * columns, 0.3 + 2.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        key = f"rewards/{name}/mean"
        rows = [row for row in history if key in row]
        steps, values = _steps(rows), np.array([row[key] for row in rows], dtype=float)
        window = max(1, len(values) // 20)
        color = _color(index)
        if window > 1:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.45)
        _line(axes, steps, _running_mean(values, window), color)
        _plot_evaluations(axes, history, name, color)
        _style(axes, f"{name}  (held out)" if trained and name not in trained else name, None)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for index in range(max(0, len(names) - columns), len(names)):
        panels[index].tick_params(labelbottom=True)
        panels[index].set_xlabel("optimizer step", color=FAINT, fontsize=9)
    if evaluated:
        note = "line: rollouts · points: evaluations ± standard error over prompts"
        figure.suptitle(note, x=0.02, ha="left", fontsize=9, color=FAINT)
    return save_figure(figure, path)


def plot_progress(history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> Path:
    """
    Plot how far each reward has come since the base model over the steps, and below it what it weighed.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `step`, `progress/<reward>` and `progress/weight/<reward>`. A NaN,
            for a reward that has not applied yet, is a gap.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: no row has weights.
    """
    names = _names(history, WEIGHT, "")
    if not names:
        raise ValueError(
            f"The history has no `{WEIGHT}<reward>`. Log it: train with `multi_objective_aggregation='progress'`, and "
            "with `logging_steps` small enough that a generation batch is logged."
        )
    rows = [row for row in history if WEIGHT + names[0] in row]
    steps = _steps(rows)
    figure = new_figure(9.0, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, prefix, title, unit, form in (
        (top, "progress/", "Progress of each reward since the base model", "gain / scale", "+.2f"),
        (bottom, WEIGHT, "Weight of each reward", "share", ".2f"),
    ):
        handles, labels = [], []
        for index, name in enumerate(names):
            values = np.array([row.get(prefix + name, math.nan) for row in rows], dtype=float)
            handles += _line(axes, steps, values, _color(index))
            labels.append(f"{name}  ({values[-1]:{form}})" if math.isfinite(values[-1]) else name)
        _style(axes, title, unit)
        _side_legend(axes, handles, labels, "reward (at the end)")
    top.axhline(0, color=INK, linewidth=0.9, zorder=1)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("optimizer step", color=FAINT, fontsize=9)
    return save_figure(figure, path)


def _plot_evaluations(axes: "Axes", history: Sequence[Mapping[str, Any]], name: str, color: str) -> None:
    """Draw a reward's evaluations as points with a dark edge."""
    key = f"eval_rewards/{name}"
    rows = [row for row in history if f"{key}/mean" in row]
    if not rows:  # error bars without points have an unbounded box, with which the figure has no layout
        return
    means = [row[f"{key}/mean"] for row in rows]
    errors = [row.get(f"{key}/standard_error", math.nan) for row in rows]
    axes.errorbar(
        _steps(rows),
        means,
        yerr=errors,
        fmt="D",
        markersize=4.5,
        markerfacecolor=color,
        markeredgecolor=INK,
        markeredgewidth=0.9,
        ecolor=INK,
        elinewidth=1.1,
        capsize=2.5,
        zorder=4,
        clip_on=False,
    )


def plot_histograms(
    values: Mapping[str, Sequence[float]],
    path: str | os.PathLike,
    *,
    sources: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """
    Plot a histogram of each reward, with one panel per reward, stacked by the sources of the prompts.

    Args:
        values (`Mapping[str, Sequence[float]]`):
            Reward name -> one value per image, NaN where the reward does not apply.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.
        sources (`Sequence[str]`, *optional*):
            The source of each image's prompt. Defaults to one histogram of all images.
        title (`str`, *optional*):
            A title above the panels.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: there is no reward, or not one source per value.
    """
    if not values:
        raise ValueError("`values` has no reward. Pass at least one.")
    for name, row in values.items():
        if sources is not None and len(sources) != len(row):
            raise ValueError(
                f"`sources` has {len(sources)} entries, `values[{name!r}]` has {len(row)}. Pass one for each."
            )
    known = sorted(set(sources or ()))
    columns = min(3, len(values))
    lines = math.ceil(len(values) / columns)
    figure = new_figure(3.3 * columns, 0.5 + 2.0 * lines)
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for index, (axes, (name, row)) in enumerate(zip(panels, values.items(), strict=False)):
        finite = np.isfinite(row)
        array = np.asarray(row, dtype=float)
        groups = [array[finite & (np.asarray(sources) == source)] for source in known] or [array[finite]]
        # With sources there is one colour per source, otherwise one per reward.
        colors = [_color(place) for place in range(len(groups))] if known else [_color(index)]
        edges = np.histogram_bin_edges(array[finite], bins=20) if finite.any() else np.array([0.0, 1.0])
        below = np.zeros(len(edges) - 1)
        for group, color in zip(groups, colors, strict=True):
            counts, _ = np.histogram(group, bins=edges)
            axes.stairs(below + counts, edges, baseline=below, fill=True, color=color, alpha=0.88)
            below = below + counts
        _style(axes, f"{name}  ({finite.sum()} images)", None)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))  # a reward need not be an integer, as steps are
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.set_ylim(0, max(1.0, 1.05 * below.max()))
    for axes in panels[len(values) :]:
        axes.set_visible(False)
    if known:
        handles = [Patch(color=_color(place), alpha=0.88) for place in range(len(known))]
        figure.legend(
            handles, known, title="source", loc="outside right upper", frameon=False, fontsize=9, alignment="left"
        )
    if title is not None:
        figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, color=FAINT, parse_math=False)
    return save_figure(figure, path)


def _names(history: Sequence[Mapping[str, Any]], prefix: str, suffix: str) -> list[str]:
    """The reward names in keys `<prefix><name><suffix>`, in the order in which they were first logged."""
    keys = dict.fromkeys(key for row in history for key in row)
    return [
        key.removeprefix(prefix).removesuffix(suffix)
        for key in keys
        if key.startswith(prefix) and key.endswith(suffix) and len(key) > len(prefix) + len(suffix)
    ]


def _finite_rows(history: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [row for row in history if math.isfinite(row.get(key, math.nan))]


def _steps(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["step"] for row in rows], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """At each place the mean of the finite values among the last `window` values; NaN where there are none."""
    means = np.full(len(values), math.nan)
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        if np.isfinite(recent).any():
            means[end - 1] = recent[np.isfinite(recent)].mean()
    return means


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _style(axes: "Axes", title: str, unit: str | None) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", parse_math=False)
    axes.set_facecolor(PAPER)
    axes.grid(True, axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=0, pad=5)
    from matplotlib.ticker import MaxNLocator

    # Steps are integers.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    if unit is not None:
        axes.set_ylabel(unit, color=FAINT, fontsize=9)


def _line(axes: "Axes", steps: np.ndarray, values: np.ndarray, color: str) -> list[Any]:
    """Draw a line, with markers if there are few points."""
    marker = "o" if len(steps) <= 40 else None
    return axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.2, zorder=3, clip_on=False)


def _side_legend(
    axes: "Axes", handles: Sequence[Any], labels: Sequence[str], title: str, note: str | None = None
) -> None:
    """Draw a legend to the right of the panel."""
    legend = axes.legend(
        handles,
        labels,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=9,
        title_fontsize=8.5,
        labelcolor=INK,
        alignment="left",
        handlelength=1.2,
    )
    legend.get_title().set_color(FAINT)
    if note is not None:
        style: dict[str, Any] = {"fontsize": 8.5, "color": NOT_TAKEN, "va": "bottom", "linespacing": 1.3}
        axes.text(1.03, 0.0, note, transform=axes.transAxes, **style)
