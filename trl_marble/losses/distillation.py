# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Distillation: the policy is to have the velocities of teachers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..sde import SDEWindow
from .forward_process import OnNoisedSamples, at_least_float32, mean_square_distance
from .policy_loss import Drawn, FrozenVelocities, Sampled, StepCounts


@dataclass(frozen=True)
class NoRewardLoss(OnNoisedSamples):
    """
    The loss of a run without rewards: nothing but the penalty of `beta`. Teachers' losses are added to it, see
    [`Lesson`]. The trained policy samples.

    Args:
        beta (`float`):
            Coefficient of the KL to the base model.
        on_trajectory (`bool`, *optional*, defaults to `False`):
            Whether the inputs are the states that the rollouts went through, without new noise.
    """

    beta: float
    on_trajectory: bool = False

    needs = frozenset[str]()

    @property
    def samples_with_old(self) -> bool:
        return False

    def window(self, generation: int, num_steps: int, seed: int) -> SDEWindow | None:
        # Steps without noise: only so that the states are kept.
        return SDEWindow("flow_sde", 0.0, 0, num_steps - 1) if self.on_trajectory else None

    def draw(
        self, sampled: Sampled, times: Tensor, num_times: int, generators: Sequence[torch.Generator]
    ) -> Iterator[Drawn]:
        """With `on_trajectory`, states of the rollouts, drawn for each sample without replacement."""
        x0, transitions = sampled
        if transitions is None:
            yield from super().draw(sampled, times, num_times, generators)
            return
        points = at_least_float32(transitions.points)
        samples = torch.arange(len(points), device=points.device)
        drawn = torch.stack([torch.randperm(points.shape[1], generator=g)[:num_times] for g in generators])
        for column in drawn.T:
            t = transitions.times[column].to(points)
            x_t, t_ = points[samples, column.to(points.device)], t.view(-1, *[1] * (x0.ndim - 1))
            yield Drawn(x_t, t, x0, (x_t - (1 - t_) * x0) / t_)

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
