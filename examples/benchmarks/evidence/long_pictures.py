# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The picture of the long runs: every reward over the steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trl_marble.evaluation import GainPoint
from trl_marble.evaluation.figures import FAINT, INK, new_figure, save_figure

from .methods import REWARDS
from .pictures import add_legend, color_of, line_of, style_panel


def plot_steps(curves: Mapping[str, Sequence[GainPoint]], path: Path) -> None:
    """
    Gain of every reward on held-out prompts over the steps, one panel per reward, and the worst in the last.

    Args:
        curves (`Mapping[str, Sequence[GainPoint]]`):
            Label -> means over seeds, with errors over seeds.
        path (`Path`):
            The file to write.
    """
    figure = new_figure(11.0, 7.5)
    panels = figure.subplots(3, 3, squeeze=False, sharex=True).flatten()
    values = {
        **{name: (lambda point, name=name: point.gains.get(name, (math.nan, math.nan))) for name in REWARDS},
        "worst gain": lambda point: point.worst,
        "KL to the base": lambda point: point.kl,
    }
    for axes, (title, value) in zip(panels, values.items(), strict=False):
        for place, (label, points) in enumerate(curves.items()):
            steps = [point.step for point in points]
            mean, error = np.array([value(point) for point in points]).T
            axes.plot(steps, mean, line_of(place), color=color_of(place), linewidth=1.5, label=label)
            axes.fill_between(steps, mean - error, mean + error, color=color_of(place), alpha=0.15, linewidth=0)
        axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
        style_panel(axes, title)
        axes.set_xlabel("optimizer step", color=FAINT, fontsize=8.5)
    for axes in panels[len(values) :]:
        axes.set_axis_off()
    add_legend(panels[len(values)], panels[: len(values)])
    save_figure(figure, path)
