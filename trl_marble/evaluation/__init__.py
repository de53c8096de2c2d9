# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Evaluate pipelines and adapters, and show the results and runs as tables, plots and contact sheets."""

from ..rollout.diversity import group_diversity, thumbnails
from .compare import compare_evaluations
from .comparison import EvaluationComparison
from .evaluation import Evaluation
from .evaluation_config import EvaluationConfig
from .formatting import format_value
from .gain_plot import evaluations_table, gains_table, plot_gains
from .gains import GainPoint, gains_at_kl, gains_in_deviations, interpolate_at_kl, run_gains
from .grids import before_after_grid, image_grid
from .measures import PromptDiversity, RewardMean, WinRate
from .pipeline_evaluation import evaluate_pipeline
from .plots import plot_balance, plot_progress, plot_rewards
from .results import EvaluationResults
from .statistics import JointGain, WinCount, clustered_mean, composite_scores, count_wins, joint_gain
from .summary import BalanceSummary, ProgressSummary, rewards_table, summarize_balance, summarize_progress
from .worst_gain import WorstGain, best_evaluation


__all__ = [
    "JointGain",
    "joint_gain",
    "GainPoint",
    "gains_at_kl",
    "gains_in_deviations",
    "interpolate_at_kl",
    "run_gains",
    "gains_table",
    "plot_gains",
    "BalanceSummary",
    "Evaluation",
    "EvaluationComparison",
    "EvaluationConfig",
    "EvaluationResults",
    "ProgressSummary",
    "PromptDiversity",
    "RewardMean",
    "WinCount",
    "WinRate",
    "WorstGain",
    "before_after_grid",
    "best_evaluation",
    "clustered_mean",
    "compare_evaluations",
    "composite_scores",
    "count_wins",
    "evaluate_pipeline",
    "evaluations_table",
    "format_value",
    "group_diversity",
    "image_grid",
    "plot_balance",
    "plot_progress",
    "plot_rewards",
    "rewards_table",
    "summarize_balance",
    "summarize_progress",
    "thumbnails",
]
