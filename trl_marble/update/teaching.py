# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What teachers add to an optimizer step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import Lesson
from ..metrics import MetricBuffer
from ..pipelines import Conditioning, PolicyWeights, Teacher
from ..step_times import StepTimes


class Teaching:
    """
    Asks teachers for their velocities, each for its own samples only.

    The teachers of single sources make one [`~trl_marble.losses.Lesson`] together, as each sample is of one source;
    each teacher of all prompts makes a lesson of its own. A lesson costs one forward pass a sample, and one weighted
    backward pass where gradients are balanced.

    Args:
        teachers (`Sequence[Teacher]`):
            The teachers, at least one.
        weights ([`~trl_marble.pipelines.PolicyWeights`]):
            The policy, whose transformer has the teachers as adapters.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
        times ([`~trl_marble.step_times.StepTimes`]):
            What the forward passes take is added to.
        weight (`float`, *optional*):
            The coefficient of the teachers' loss, its mean over the samples of a step, where nothing is balanced.
            `None` where each teacher's gradient is balanced with those of the rewards.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: PolicyWeights,
        metrics: MetricBuffer,
        times: StepTimes,
        weight: float | None,
    ) -> None:
        self.teachers, self.weights, self.metrics, self.times = list(teachers), weights, metrics, times
        self.weight = weight
        of_sources = [place for place, teacher in enumerate(self.teachers) if teacher.source is not None]
        of_all = [[place] for place, teacher in enumerate(self.teachers) if teacher.source is None]
        self._lessons = [*([of_sources] if of_sources else []), *of_all]

    def __len__(self) -> int:
        return len(self.teachers)

    def lessons(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, applies: Tensor) -> list[Lesson]:
        """
        The teachers' velocities. Ask for them before the trained policy's, see
        [`~trl_marble.pipelines.PolicyWeights.old_velocity`].

        Args:
            x_t (`Tensor` of shape `[B, ...]`):
                The noisy inputs.
            t (`Tensor` of shape `[B]`):
                Their times.
            conditioning ([`~trl_marble.pipelines.Conditioning`]):
                Their prompts.
            applies (`Tensor` of shape `[T, B]`, bool, on the CPU):
                Whom each teacher teaches.
        """
        lessons = []
        with self.times.measure("reference"):
            for members in self._lessons:
                velocity, own = torch.zeros_like(x_t), torch.zeros_like(applies)
                for teacher in members:
                    own[teacher] = applies[teacher]
                    rows = applies[teacher].nonzero().flatten()
                    if len(rows) == len(x_t):
                        velocity = self._velocity_of(teacher, x_t, t, conditioning)
                    elif len(rows) > 0:
                        places = rows.to(x_t.device, non_blocking=True)
                        part = self._velocity_of(teacher, x_t[places], t[places], conditioning.part(rows))
                        velocity = velocity.index_copy(0, places, part.to(velocity))
                lessons.append(Lesson(velocity, own.to(x_t.device, non_blocking=True)))
        return lessons

    def _velocity_of(self, teacher: int, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.weights.velocity_of(self.teachers[teacher].adapter_name, x_t, t, conditioning)

    def record(self, taught: Sequence[tuple[Lesson, Tensor]]) -> None:
        """Record each teacher's loss in a micro-step; NaN for a teacher that no sample of it has."""
        for members, (lesson, distance) in zip(self._lessons, taught, strict=True):
            for teacher in members:
                own = distance.detach().where(lesson.applies[teacher], torch.nan)
                self.metrics.record(f"teachers/{self.teachers[teacher].name}/loss", own.nanmean())
