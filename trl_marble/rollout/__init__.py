# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rollouts: sampling and scoring, the generation batches that training uses, and where in them a run is."""

from .batch import RolloutBatch, StoredBatch, steps_of_samples, training_order
from .halves import split_prompts
from .layout import BatchLayout, Position
from .progress_meter import BaseImageSettings, ProgressMeter
from .reward_failures import FailurePolicy, count_failures
from .reward_learning import RewardLearning
from .reward_logs import average_logged
from .sampler import RolloutSampler, SampleBatch, Samples
from .set_scores import SetImages
from .settings import RolloutSettings
from .shares import ShareDraws
from .source import RolloutRecord, RolloutSource


__all__ = [
    "BaseImageSettings",
    "BatchLayout",
    "FailurePolicy",
    "Position",
    "ProgressMeter",
    "RewardLearning",
    "RolloutBatch",
    "RolloutRecord",
    "RolloutSampler",
    "RolloutSettings",
    "RolloutSource",
    "SampleBatch",
    "Samples",
    "SetImages",
    "ShareDraws",
    "StoredBatch",
    "average_logged",
    "count_failures",
    "split_prompts",
    "steps_of_samples",
    "training_order",
]
