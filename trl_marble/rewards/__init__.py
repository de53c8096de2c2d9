# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards: what they are, how they are called, and those that come with the package."""

from .loading import KNOWN_REWARDS, load_reward
from .model_reward import ModelReward
from .protocol import RewardError, RewardFunc, reward_names, reward_tensor
from .scoring import PendingScores, RewardScorer, Scores


__all__ = [
    "KNOWN_REWARDS",
    "ModelReward",
    "PendingScores",
    "RewardError",
    "RewardFunc",
    "RewardScorer",
    "Scores",
    "load_reward",
    "reward_names",
    "reward_tensor",
]
