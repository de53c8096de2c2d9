# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run shows of itself: tables, plots and grids of its images."""

from .evaluation import Evaluation, nan_aware_mean
from .plots import before_after_grid, image_grid, plot_balance, plot_rewards
from .summary import BalanceSummary, format_value, rewards_table, summarize_balance


__all__ = [
    "BalanceSummary",
    "Evaluation",
    "before_after_grid",
    "format_value",
    "image_grid",
    "nan_aware_mean",
    "plot_balance",
    "plot_rewards",
    "rewards_table",
    "summarize_balance",
]
