# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The current optimizer step: its gradient, and what becomes of one that is not finite."""

from .kl_control import KLControl
from .nonfinite import NonFiniteGuard
from .policy_update import PolicyUpdate, TimeGrid
from .step_gradient import BalanceSettings, StepGradient
from .teaching import Teaching


__all__ = ["BalanceSettings", "KLControl", "NonFiniteGuard", "PolicyUpdate", "StepGradient", "Teaching", "TimeGrid"]
