# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Draw the pictures of docs/balancing.md, with the package's own weightings: python docs/_tools/draw_balancing.py"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from trl_marble.balance import gram_matrix, harmonize, mgda_weights


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


IMAGES = Path(__file__).resolve().parents[1] / "images"
BLUE, ORANGE, GREEN, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#656D76", "#FBE3DC"

EASY, HARD = np.array([2.4, 0.9]), np.array([-0.75, 0.55])
# Where each of two rewards is highest, how steep it is, and where training starts.
PEAKS, STEEPNESS, START = np.array([[2.0, 0.3], [-1.2, 1.5]]), np.array([3.0, 0.5]), np.array([-1.0, -0.8])


def balanced(gradients: np.ndarray) -> np.ndarray:
    """MARBLE's direction, `[D]`, of gradients `[K, D]`."""
    rows = torch.from_numpy(gradients)
    return (harmonize(gram_matrix(rows), mgda_weights).weights @ rows).numpy()


def arrow(axes: Axes, end: np.ndarray, color: str, label: str, shift: tuple[float, float], width: float = 1.8) -> None:
    axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0})
    axes.text(*(end + shift), label, color=color, fontsize=10, ha="center", va="center")


def shade_against(axes: Axes, gradient: np.ndarray, size: float = 6.0) -> None:
    """The half plane in which a step lowers the reward."""
    unit = gradient / np.linalg.norm(gradient)
    side = np.array([-unit[1], unit[0]])
    corners = [side * size, -side * size, -side * size - unit * size, side * size - unit * size]
    axes.add_patch(Polygon(corners, color=RED, zorder=0, linewidth=0))


def plain(axes: Axes, title: str, limits: tuple[float, float, float, float]) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlim(limits[0], limits[1])
    axes.set_ylim(limits[2], limits[3])
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#D0D7DE")


def draw_directions() -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 2.8), layout="constrained")
    limits = (-1.7, 2.9, -0.6, 2.2)

    total = EASY + HARD
    shade_against(panels[0], HARD)
    arrow(panels[0], EASY, BLUE, "easy reward", (-0.1, 0.25))
    arrow(panels[0], HARD, ORANGE, "hard reward", (-0.25, 0.2))
    arrow(panels[0], total, GREY, "sum", (-0.1, 0.25), 2.6)
    plain(panels[0], "Weighted sum: against the hard reward", limits)

    units = np.stack([g / np.linalg.norm(g) for g in (EASY, HARD)])
    direction = balanced(np.stack([EASY, HARD]))
    shade_against(panels[1], HARD)
    panels[1].plot(*units.T, color=GREY, linestyle=":", linewidth=1.2)
    arrow(panels[1], units[0], BLUE, "easy, length 1", (0.75, 0.05))
    arrow(panels[1], units[1], ORANGE, "hard, length 1", (-0.2, 0.22))
    arrow(panels[1], direction, GREEN, "MARBLE", (0.45, 0.18), 2.6)
    plain(panels[1], "MARBLE: against neither", limits)

    angles = np.deg2rad([15, 100, 150])
    three = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    alpha = mgda_weights(torch.from_numpy(three @ three.T)).numpy()
    panels[2].add_patch(Polygon(three, facecolor="#E8F3FA", edgecolor=GREY, linestyle=":", zorder=0))
    for gradient, weight, color in zip(three, alpha, (BLUE, "#CC79A7", ORANGE), strict=True):
        arrow(panels[2], gradient, color, f"{weight:.2f}", tuple(gradient * 0.18))
    arrow(panels[2], alpha @ three, GREEN, "shortest", (0.3, -0.05), 2.6)
    plain(panels[2], "Weights: the hull's point nearest to 0", (-1.35, 1.45, -0.3, 1.4))
    figure.savefig(IMAGES / "balancing_directions.png", dpi=130, facecolor="white")


def train(use_balance: bool, steps: int = 60, size: float = 0.06) -> np.ndarray:
    """Positions `[steps + 1, 2]` of gradient ascent in steps of equal length."""
    path = [START]
    for _ in range(steps):
        gradients = 2 * STEEPNESS[:, None] * (PEAKS - path[-1])
        direction = balanced(gradients) if use_balance else gradients.sum(axis=0)
        length = np.linalg.norm(direction)
        path.append(path[-1] + min(size / max(length, 1e-9), 0.05) * direction)
    return np.stack(path)


def draw_training() -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 3.6), layout="constrained")
    paths = {"weighted sum": train(False), "MARBLE": train(True)}
    x, y = np.meshgrid(np.linspace(-2, 2.6, 200), np.linspace(-1.4, 2.2, 200))
    for peak, color, name in zip(PEAKS, (BLUE, ORANGE), ("easy", "hard"), strict=True):
        panels[0].contour(x, y, np.hypot(x - peak[0], y - peak[1]), levels=6, colors=color, alpha=0.35, linewidths=0.9)
        panels[0].plot(*peak, "*", color=color, markersize=12)
        panels[0].text(peak[0] + 0.12, peak[1] + 0.14, name, color=color)
    panels[0].plot(*PEAKS.T, color=GREY, linestyle=":", linewidth=1.2)
    for (name, path), color in zip(paths.items(), (GREY, GREEN), strict=True):
        panels[0].plot(*path.T, color=color, linewidth=2.4, label=name)
        panels[0].plot(*path[-1], "o", color=color, markersize=6)
    panels[0].plot(*START, "ko", markersize=5)
    plain(panels[0], "Two rewards, one start", (-2, 2.6, -1.4, 2.2))
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    for axes, reward, name in zip(panels[1:], (0, 1), ("Easy reward", "Hard reward"), strict=True):
        for (label, path), color in zip(paths.items(), (GREY, GREEN), strict=True):
            value = -STEEPNESS[reward] * ((path - PEAKS[reward]) ** 2).sum(axis=1)
            axes.plot(value, color=color, linewidth=2.4, label=label)
            axes.axhline(value[0], color="black", linewidth=0.8, linestyle=":")
        axes.set_title(name, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "balancing_training.png", dpi=130, facecolor="white")


if __name__ == "__main__":
    draw_directions()
    draw_training()
