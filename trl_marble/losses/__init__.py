# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Losses of a policy, each one component: what it reads, what the rewards act through, and what they all share."""

from .awm import AWMLoss
from .building import build_loss, settings_of
from .forward_process import noise_samples
from .grpo import GRPOLoss
from .nft import NFTLoss
from .policy_loss import Drawn, FrozenVelocities, Penalties, PolicyLoss, StepCounts, Transition


# The losses by the name that `MarbleConfig.policy_loss` has for them. One more loss is one more entry.
LOSSES: dict[str, type[PolicyLoss]] = {"nft": NFTLoss, "awm": AWMLoss, "grpo": GRPOLoss}


__all__ = [
    "LOSSES",
    "AWMLoss",
    "Drawn",
    "FrozenVelocities",
    "GRPOLoss",
    "NFTLoss",
    "Penalties",
    "PolicyLoss",
    "StepCounts",
    "Transition",
    "build_loss",
    "noise_samples",
    "settings_of",
]
