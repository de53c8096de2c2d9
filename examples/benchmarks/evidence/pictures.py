# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The report's pictures. Each function returns the caption of its picture, or an empty text if there is no picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from trl_marble.evaluation import EvaluationResults, image_grid
from trl_marble.evaluation.figures import FAINT, INK, NOT_TAKEN, RULE, TAKEN
from trl_marble.evaluation.plots import PALETTE
from trl_marble.media import PAPER

from .methods import BASE, METHODS, REWARDS, SPECIALISTS
from .tables import steps_with_cosines


if TYPE_CHECKING:
    from .report import MethodResult


DPI = 150
LEAST_CHANGE = 0.01  # the range of a panel's axis
PROMPTS_OF_A_SOURCE = 2


def plot_curves(results: Mapping[str, MethodResult], path: Path) -> str:
    """Change of every reward on held-out prompts during training, one panel per reward."""
    figure = _figure(10.5, 6.0)
    panels = figure.subplots(2, 3, squeeze=False).flatten()
    several = _several(results)
    for axes, reward in zip(panels, REWARDS, strict=False):
        specialist = results.get(SPECIALISTS[reward])
        if specialist is not None:
            axes.plot(*_curve(specialist.histories, reward), color=FAINT, linestyle="--", linewidth=1.6, label="alone")
        for place, result in enumerate(several.values()):
            steps, values = _curve(result.histories, reward)
            axes.plot(
                steps,
                values,
                line_of(place),
                color=color_of(place),
                linewidth=1.6,
                marker="o",
                markersize=3,
                label=result.label,
            )
        axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
        style_panel(axes, reward)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_xlabel("optimizer step", color=FAINT, fontsize=8.5)
    last = panels[len(REWARDS)]
    last.set_axis_off()
    add_legend(last, panels[: len(REWARDS)])
    _save(figure, path)
    return (
        "Change of each reward on the held-out prompts during the training, mean over seeds. These evaluations have "
        "fewer images than those of the tables. Dashed: trained on that reward alone."
    )


def plot_changes(results: Mapping[str, MethodResult], path: Path) -> str:
    """Change of every reward on held-out prompts, one panel per reward: mean over seeds, and each seed."""
    several = list(_several(results).values())
    places = np.arange(len(several))[::-1]
    figure = _figure(10.5, 1.2 + 0.3 * len(several))
    panels = figure.subplots(1, len(REWARDS), sharey=True)
    for k, (axes, reward) in enumerate(zip(panels, REWARDS, strict=True)):
        axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
        rows = [(result, place, TAKEN) for result, place in zip(several, places, strict=True)]
        # Of a specialist only the reward that it trains on: its other changes are out of scale.
        if SPECIALISTS[reward] in results:
            rows.append((results[SPECIALISTS[reward]], len(several), FAINT))
        for result, place, color in rows:
            estimate = result.estimates[reward]
            error = 0.0 if math.isnan(estimate.seed_error) else estimate.seed_error
            axes.errorbar(
                estimate.mean, place, xerr=error, fmt="o", color=color, markersize=5, linewidth=1.5, zorder=3
            )
            seeds = result.changes[:, k]
            axes.plot(seeds, np.full(len(seeds), place), "|", color=color, alpha=0.6, markersize=7, zorder=2)
        style_panel(axes, reward)
        axes.grid(True, axis="x", color=RULE, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -LEAST_CHANGE), max(high, LEAST_CHANGE))
    panels[0].set_ylim(-0.6, len(several) + 0.6)
    panels[0].set_yticks([*places, len(several)], [*(result.label for result in several), "that reward alone"])
    _save(figure, path)
    return (
        "Change of each reward on held-out prompts: mean and standard error over seeds, and a stroke for each seed. "
        "Grey: trained on that reward alone."
    )


def plot_cosines(results: Mapping[str, MethodResult], path: Path) -> str:
    """The lowest cosine of every step that measured it, and that of the weighted sum, which was not taken."""
    measured: list[tuple[str, np.ndarray, np.ndarray]] = []
    for result in _several(results).values():
        rows = steps_with_cosines(result.histories)
        if rows:
            both = [
                np.array([row[f"{prefix}/cos_min"] for row in rows]) for prefix in ("balance", "balance/weighted_sum")
            ]
            measured.append((result.label, *both))
    if not measured:
        path.unlink(missing_ok=True)
        return ""
    figure = _figure(8.5, 1.1 + 0.42 * len(measured))
    axes = figure.subplots()
    rng = np.random.default_rng(0)  # only separates dots of equal cosines
    for place, (_, taken, not_taken) in enumerate(reversed(measured)):
        for values, color, shift, label in (
            (taken, TAKEN, 0.16, "update taken"),
            (not_taken, NOT_TAKEN, -0.16, "weighted sum of the same gradients, not taken"),
        ):
            height = place + shift + rng.uniform(-0.07, 0.07, len(values))
            axes.plot(values, height, ".", color=color, alpha=0.45, markersize=5, label=label if place == 0 else None)
            axes.plot([np.nanmedian(values)] * 2, [place + shift - 0.14, place + shift + 0.14], color=INK, linewidth=2)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(measured)), [label for label, *_ in reversed(measured)])
    style_panel(axes, "Worst cosine between a step's update and a reward's gradient")
    axes.grid(True, axis="x", color=RULE, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    _save(figure, path)
    return "Worst cosine of every step of all seeds that measured it (dots) and the median (strokes)."


def draw_images(base: EvaluationResults, results: Mapping[str, MethodResult], path: Path) -> str:
    """One image of some prompts, from the same noise, for every method that trains on several rewards."""
    first_seeds = {result.label: result.results[0] for result in _several(results).values()}
    draw_some_images({METHODS[BASE].label: base, **first_seeds}, path)
    return "The first image of some held-out prompts, from the same noise, with the adapter of the first seed."


def draw_some_images(evaluations: Mapping[str, EvaluationResults], path: Path) -> None:
    """The first image of some prompts of each source: one row per prompt, one column per evaluation."""
    base = next(iter(evaluations.values()))
    chosen = []
    for source in dict.fromkeys(base.table["source"]):
        prompts = list(dict.fromkeys(base.table.loc[base.table["source"] == source, "prompt"]))
        step = max(1, len(prompts) // PROMPTS_OF_A_SOURCE)
        chosen += prompts[::step][:PROMPTS_OF_A_SOURCE]
    first = {prompt: int(base.table.index[base.table["prompt"] == prompt][0]) for prompt in chosen}
    rows = [
        [_open(each.folder / each.table["image"].iloc[first[prompt]]) for each in evaluations.values()]
        for prompt in chosen
    ]
    image_grid(rows, chosen, path, column_labels=list(evaluations), cell=110)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _several(results: Mapping[str, MethodResult]) -> dict[str, MethodResult]:
    """The methods that train on more than one reward."""
    return {name: result for name, result in results.items() if len(result.trained) > 1}


def _curve(histories: Sequence[Sequence[Mapping[str, Any]]], reward: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which all seeds were evaluated, and the mean over seeds of the change since the first evaluation."""
    key = f"eval_rewards/{reward}/mean"
    seeds = [{row["step"]: row[key] for row in history if key in row} for history in histories]
    steps = sorted(set.intersection(*(set(values) for values in seeds)))
    changes = [np.mean([values[step] - values[steps[0]] for values in seeds]) for step in steps]
    return np.array(steps), np.array(changes)


def color_of(place: int) -> str:
    """The color of the method at this place of a legend."""
    return PALETTE[place % len(PALETTE)]


def line_of(place: int) -> str:
    """Its line: where there are more methods than colors, they have the same colors with other lines."""
    return ("-", "--", ":")[place // len(PALETTE) % 3]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_panel(axes: Axes, title: str) -> None:
    """What all panels look like."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_facecolor(PAPER)
    axes.grid(True, axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=0)


def add_legend(axes: Axes, panels: Sequence[Axes]) -> None:
    """One legend for all panels, in one that is empty."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    axes.legend(handles.values(), handles.keys(), loc="center", frameon=False, fontsize=9, labelcolor=INK)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor=PAPER)
