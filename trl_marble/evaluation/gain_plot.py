# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Gains and the KL to the base model: as a picture, and as tables for the terminal."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from ..media import PAPER
from .figures import FAINT, INK, RULE, new_figure, save_figure
from .formatting import format_gain, format_kl, format_share
from .gains import GainPoint, Measured, gains_at_kl
from .plots import PALETTE
from .summary import SIGNIFICANT


if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAINS_FILE = "gain_against_kl.png"
COLUMNS = 3
LINES = ("o-", "s--", "^:")  # of the first runs, of those that have the same colors again, and so on


def plot_gains(
    curves: Mapping[str, Sequence[GainPoint]], path: str | os.PathLike, at_kl: Sequence[float] = ()
) -> Path:
    """
    Plot gains against the KL to the base model: the worst and the mean gain, the joint gain rate, and each reward.

    Policies that are compared at equal KL are equally far from the base model; at equal `beta` they are not. The
    evaluations of a run are connected in the order of its steps. Bars are one standard error to each side.

    Args:
        curves (`Mapping[str, Sequence[GainPoint]]`):
            Name -> the evaluations of a run, see [`run_gains`], or one point. Those without a KL are left out.
        path (`str` or `os.PathLike`):
            The file to write, in the format of its suffix; folders are made.
        at_kl (`Sequence[float]`, *optional*):
            Values of the KL to mark by a line.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: no point has a KL.
    """
    shown = {name: kept for name, points in curves.items() if (kept := [p for p in points if math.isfinite(p.kl[0])])}
    if not shown:
        raise ValueError("No evaluation has a KL to the base model. Evaluate pipelines with a LoRA adapter.")
    rewards = list(dict.fromkeys(name for points in shown.values() for point in points for name in point.gains))
    panels: dict[str, str | None] = {"Worst gain": None, "Mean gain": None, "All rewards rose": None}
    titles = [*panels, *rewards]
    lines = math.ceil(len(titles) / COLUMNS)
    figure = new_figure(3.3 * COLUMNS, 0.9 + 2.3 * lines)
    axes = figure.subplots(lines, COLUMNS, squeeze=False, sharex=True).flatten()
    handles = []
    for index, points in enumerate(shown.values()):
        again, place = divmod(index, len(PALETTE))
        style = LINES[again % len(LINES)]
        series: list[list[Measured]] = [
            [point.worst for point in points],
            [point.mean for point in points],
            [point.joint_gain for point in points],
            *([point.gains.get(reward, (math.nan, math.nan)) for point in points] for reward in rewards),
        ]
        for panel, values in zip(axes, series, strict=False):
            handle = _draw(panel, [point.kl for point in points], values, PALETTE[place], style)
        handles.append(handle)
    for place, (panel, title) in enumerate(zip(axes, titles, strict=False)):
        _style(panel, title, is_share=place == 2, is_summary=place < COLUMNS)
        for kl in at_kl:
            panel.axvline(kl, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for panel in axes[len(titles) :]:
        panel.set_visible(False)
    for panel in axes[max(0, len(titles) - COLUMNS) : len(titles)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("KL to the base model", color=FAINT, fontsize=9)
    axes[0].set_xlim(left=0)
    note = (
        "gains in standard deviations of the base's images · all rewards rose: share of the prompts · "
        "bars: one standard error over prompts"
    )
    figure.suptitle(note, x=0.02, ha="left", fontsize=9, color=FAINT)
    if len(shown) > 1:
        labels = [_plain(name) for name in shown]
        widest = 0.6 + 0.08 * max(map(len, labels))  # inches, about
        figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=max(1, int(figure.get_figwidth() / widest)),
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    return save_figure(figure, path)


def _draw(axes: "Axes", kls: Sequence[Measured], values: Sequence[Measured], color: str, style: str):
    """Draw points with their errors, connected where they are several."""
    (x, x_error), (y, y_error) = (np.array(pairs, dtype=float).T for pairs in (kls, values))
    return axes.errorbar(
        x,
        y,
        xerr=np.nan_to_num(x_error),
        yerr=np.nan_to_num(y_error),
        fmt=style,
        color=color,
        linewidth=1.6,
        markersize=4,
        elinewidth=1.0,
        capsize=0,
        zorder=3,
        clip_on=False,
    )


def _style(axes: "Axes", title: str, is_share: bool, is_summary: bool) -> None:
    axes.set_title(
        title, loc="left", fontsize=10.5, color=INK, fontweight="bold" if is_summary else "normal", parse_math=False
    )
    axes.set_facecolor(PAPER)
    axes.grid(True, axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=0, pad=5)
    if is_share:
        from matplotlib.ticker import PercentFormatter

        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)


def _plain(name: str) -> str:
    """A name for a legend, which would hide names that begin with an underscore and read dollars as formulas."""
    return (" " + name if name.startswith("_") else name).replace("$", r"\$")


def gains_table(curves: Mapping[str, Sequence[GainPoint]], at_kl: Sequence[float] = ()) -> Table:
    """
    A table for the terminal: the KL of each evaluation with its worst and mean gain, and its joint gain rate.

    Args:
        curves (`Mapping[str, Sequence[GainPoint]]`):
            Name -> the evaluations of a run, of which the last is shown, or one point.
        at_kl (`Sequence[float]`, *optional*):
            Values of the KL at which runs are quoted too, see [`gains_at_kl`].
    """
    table = Table(title="Gains against KL to the base model", title_justify="left", title_style="bold")
    table.add_column("Evaluation")
    for header in ("KL", "Worst gain", "Mean gain", "All rose", "All fell"):
        table.add_column(header, justify="right")
    for name, points in curves.items():
        last = points[-1]
        label = name if last.step is None else f"{name}, step {last.step}"
        table.add_row(Text(label), *_cells(last))
        for kl in at_kl if len(points) > 1 else ():
            found = gains_at_kl(points, kl)
            label = f"{name} at KL {kl:g}"
            table.add_row(Text(label), *([f"{kl:.3g}", "not reached"] if found is None else _cells(found)))
    return table


def evaluations_table(points: Sequence[GainPoint]) -> Table:
    """
    A table for the terminal: what each reward had gained at every evaluation of a run, and the KL to the base model.

    Gains are green where the reward rose by at least two standard errors, and red where it fell by as many.

    Args:
        points (`Sequence[GainPoint]`):
            The evaluations of a run, see [`run_gains`].

    Returns:
        `rich.table.Table`: one row per evaluation after the first step.
    """
    title = "Gains in standard deviations of the base model's images"
    table = Table(title=title, title_justify="left", title_style="bold")
    for header in ("Step", *(points[0].gains if points else ()), "KL"):
        table.add_column(Text(header), justify="right")
    for point in points:
        if point.step:
            table.add_row(str(point.step), *map(_colored, point.gains.values()), format_kl((point.kl[0], math.nan)))
    return table


def _colored(value: Measured) -> Text:
    gain, error = value
    ratio = gain / error if error > 0 else 0.0
    style = "green" if ratio >= SIGNIFICANT else "red" if ratio <= -SIGNIFICANT else ""
    return Text(format_gain((gain, math.nan)), style=style)


def _cells(point: GainPoint) -> list[str]:
    gains = [format_gain(gain) for gain in (point.worst, point.mean)]
    return [format_kl(point.kl), *gains, *map(format_share, (point.joint_gain, point.joint_fall))]
