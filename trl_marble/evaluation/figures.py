# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Colours and resolution of all pictures of a run, and how they are drawn and saved.

Figures are made without pyplot, so nothing here needs a display or changes the caller's own plots. They have an opaque
light background and are readable on light and dark pages.
"""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ..media import PAPER


INK = "#1F2328"
FAINT = "#656D76"
RULE = "#D0D7DE"
TAKEN, NOT_TAKEN, CONFLICT = "#0072B2", "#D55E00", "#FBE3DC"
DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure; its size is in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure to a file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor=PAPER)
    return path
