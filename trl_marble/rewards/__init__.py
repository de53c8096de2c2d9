# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards: what they are and how they are called."""

from .protocol import RewardError, RewardFunc, reward_names, reward_tensor
from .scoring import PendingScores, RewardScorer


__all__ = ["PendingScores", "RewardError", "RewardFunc", "RewardScorer", "reward_names", "reward_tensor"]
