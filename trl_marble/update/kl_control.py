# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The coefficient of the KL to the base model: adapted, so that the KL stays near a target."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


RATE = 0.05  # most that `log(beta)` changes in one step
DECAY = 0.9  # of the running mean of the KL
# The policy answers a change of `beta` some 20 steps later, and the mean is behind by 9. A control that looks at the
# KL of now changes `beta` for so long that the KL swings to two times its target and back.
STEPS_AHEAD = 30
# Where the target is out of reach `beta` would go on to 0, without which the KL is not measured, or to an overflow.
LARGEST_FACTOR = 1e4


class KLControl:
    """
    Adapts `beta` so that the KL to the base model stays near a target.

    After each optimizer step `log(beta)` changes by `0.05 * clip(log(expected / target), -1, 1)`, where `expected` is
    a running mean of the KL, continued by 30 steps at the rate at which it changes. The idea is that of PPO's adaptive
    penalty (https://huggingface.co/papers/1707.06347, section 4), with a look ahead. `beta` stays within a factor of
    10000 of its first value.

    Args:
        beta (`float`):
            The first coefficient, above 0. Begin with a high one: one that is low while the KL is still small spends
            all of the drift on the noise of the first steps.
        target (`float`):
            The KL to hold, above 0: the mean over elements of `(v - v_base)^2`.
    """

    def __init__(self, beta: float, target: float) -> None:
        self.target = target
        self._first = self._log_beta = math.log(beta)
        self._mean = math.nan  # before the first step

    @property
    def beta(self) -> float:
        """The coefficient of the next optimizer step."""
        return math.exp(self._log_beta)

    def update(self, kl: float) -> None:
        """
        Take in an optimizer step.

        Args:
            kl (`float`):
                The mean KL on all processes, over the samples that it was evaluated for. One that is not finite leaves
                everything as it is.
        """
        if not math.isfinite(kl):
            return
        before = kl if math.isnan(self._mean) else self._mean
        self._mean = DECAY * before + (1 - DECAY) * kl
        expected = self._mean + STEPS_AHEAD * (self._mean - before)
        excess = math.log(expected / self.target) if expected > 0 else -1.0
        changed = self._log_beta + RATE * min(max(excess, -1.0), 1.0)
        limit = math.log(LARGEST_FACTOR)
        self._log_beta = min(max(changed, self._first - limit), self._first + limit)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as float64 tensors of shape `[]`."""
        values = {"log_beta": self._log_beta, "mean": self._mean}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """
        Take over what [`~KLControl.state_dict`] returned.

        Args:
            state_dict (`Mapping[str, Tensor]`):
                The saved state.
        """
        self._log_beta, self._mean = state_dict["log_beta"].item(), state_dict["mean"].item()
