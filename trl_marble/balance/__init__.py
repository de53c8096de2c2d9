# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Balance several rewards: functions of tensors, which use nothing else of this package.

`K` is the number of rewards, `B` that of samples and `P` that of trainable parameters, flattened. A NaN reward or
advantage means that the reward does not apply to the sample.
"""

from .advantages import (
    aggregate_advantages,
    group_advantages,
    mask_silent_groups,
    reward_stds,
    zero_std_fractions,
)
from .amortization import BalanceSchedule
from .diagnostics import balance_diagnostics, direction_cosines, weighted_sum_weights
from .ema import OLD_POLICY_PRESETS, old_policy_decay, weight_ema_decay
from .flat_gradients import assign_gradients, flatten_gradients, gram_matrix
from .harmonize import Harmonization, harmonize
from .heldout import heldout_cosines, signal_shares
from .per_reward_gradients import GradientRows, Objective, SeparateBackward, WeightedBackward
from .progress import ProgressWeights
from .weightings import WEIGHTINGS, equal_weights, get_weighting, mgda_weights


__all__ = [
    "OLD_POLICY_PRESETS",
    "WEIGHTINGS",
    "BalanceSchedule",
    "GradientRows",
    "Harmonization",
    "Objective",
    "ProgressWeights",
    "SeparateBackward",
    "WeightedBackward",
    "aggregate_advantages",
    "assign_gradients",
    "balance_diagnostics",
    "direction_cosines",
    "equal_weights",
    "flatten_gradients",
    "get_weighting",
    "gram_matrix",
    "group_advantages",
    "harmonize",
    "heldout_cosines",
    "mask_silent_groups",
    "mgda_weights",
    "old_policy_decay",
    "reward_stds",
    "signal_shares",
    "weight_ema_decay",
    "weighted_sum_weights",
    "zero_std_fractions",
]
