# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Losses of a policy, each one component: what it reads, what the rewards act through, and what they all share."""

from .awm import AWMLoss
from .building import build_loss, settings_of
from .crd import CRDLoss
from .dgpo import DGPOLoss
from .distillation import Lesson, NoRewardLoss
from .dpo import DPOLoss
from .forward_process import OnNoisedSamples, noise_samples
from .gdro import GDROLoss
from .groups import Groups
from .grpo import GRPOLoss
from .nft import NFTLoss
from .policy_loss import Drawn, FrozenVelocities, Penalties, PolicyLoss, Sampled, StepCounts, Transition


# The losses by the name that `MarbleConfig.policy_loss` has for them. One more loss is one more entry.
LOSSES: dict[str, type[PolicyLoss]] = {
    "nft": NFTLoss,
    "awm": AWMLoss,
    "crd": CRDLoss,
    "dgpo": DGPOLoss,
    "gdro": GDROLoss,
    "dpo": DPOLoss,
    "grpo": GRPOLoss,
}


__all__ = [
    "LOSSES",
    "AWMLoss",
    "CRDLoss",
    "DGPOLoss",
    "DPOLoss",
    "Drawn",
    "FrozenVelocities",
    "GDROLoss",
    "GRPOLoss",
    "Groups",
    "Lesson",
    "NFTLoss",
    "NoRewardLoss",
    "OnNoisedSamples",
    "Penalties",
    "PolicyLoss",
    "Sampled",
    "StepCounts",
    "Transition",
    "build_loss",
    "noise_samples",
    "settings_of",
]
