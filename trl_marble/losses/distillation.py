# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Distillation: the policy is to have the velocities of teachers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .forward_process import OnNoisedSamples, mean_square_distance
from .policy_loss import Drawn, FrozenVelocities, Penalties, StepCounts


@dataclass(frozen=True)
class NoRewardLoss(OnNoisedSamples):
    """
    The loss of a run without rewards: nothing but the penalty of `beta`. Teachers' losses are added to it, see
    [`Lesson`]. The trained policy samples.

    Args:
        beta (`float`):
            Coefficient of the KL to the base model.
    """

    beta: float

    needs = frozenset[str]()

    @property
    def samples_with_old(self) -> bool:
        return False

    @property
    def penalties(self) -> Penalties:
        return Penalties(reference=self.beta)

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        return ()

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        return ()


class Lesson(NamedTuple):
    """
    What some teachers say at the noisy inputs of a micro-step: the velocity of one teacher for each sample.

    The loss of teacher t is `L_t = sum_i (m[t,i] / n_t) mean((v_i - v_teacher,i)^2)`. Its gradient is that of one
    number a sample, so the losses of all teachers of a lesson, no two of which have a sample in common, need one
    weighted backward pass.

    Args:
        velocity (`torch.Tensor` of shape `(B, ...)`):
            The teachers' velocities, detached; anything finite for samples without a teacher.
        applies (`torch.BoolTensor` of shape `(T, B)`):
            Which of the samples each teacher of the run teaches in this lesson; of each sample at most one does.
    """

    velocity: Tensor
    applies: Tensor

    def distance(self, velocity: Tensor) -> Tensor:
        """`mean((v - v_teacher)^2)` of every sample, of shape `(B,)`, for the trained policy's velocity."""
        return mean_square_distance(velocity, self.velocity)

    def coefficients(self, counts: Tensor) -> Tensor:
        """
        How much of each sample's distance goes into the loss of each teacher, `(T, B)`.

        Args:
            counts (`torch.Tensor` of shape `(T,)`):
                `n_t`: the samples of each teacher in the optimizer step, each counted once per timestep.
        """
        numbers = torch.promote_types(self.velocity.dtype, torch.float32)
        return self.applies.to(numbers) / counts.to(self.velocity.device, numbers).clamp_min(1)[:, None]
