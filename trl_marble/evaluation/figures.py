# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Colours and resolution of all pictures of a run, and how they are drawn and saved.

Figures are made without pyplot, so nothing here needs a display or changes the caller's own plots. They have an opaque
light background and are readable on light and dark pages. Matplotlib, of the extra `plots`, is imported at first use.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..extras import require_extra
from ..media import PAPER


if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1F2328"
FAINT = "#656D76"
RULE = "#D0D7DE"
TAKEN, NOT_TAKEN, CONFLICT = "#0072B2", "#D55E00", "#FBE3DC"
DPI = 150


def new_figure(width: float, height: float, constrained: bool = True) -> "Figure":
    """
    Make an empty figure.

    Args:
        width (`float`):
            Inches.
        height (`float`):
            Inches.
        constrained (`bool`, *optional*, defaults to `True`):
            Whether Matplotlib arranges the axes so that nothing overlaps.

    Raises:
        [`~trl_marble.extras.MissingExtraError`]: If Matplotlib is not installed.
    """
    require_extra("plots", "A picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12) if constrained else None
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> Path:
    """Write a figure to a file; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor=PAPER)
    return path
