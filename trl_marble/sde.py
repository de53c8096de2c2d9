# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Steps of a sampler that adds noise, whose transitions have a probability.

All of them have one form. With the time `t` (1 is noise, 0 is data), the step to `t' < t`, the velocity `v` and the
noise `n = x + (1 - t) v` that it implies in `x`, a step goes to

`x' = x + (t' - t) v - c n + s e`, with `e` from a normal distribution:

it is the step of Euler's method, less a part of the old noise, and as much new noise. They differ in `s`, the standard
deviation of the new noise, and `c`:

- Flow-SDE ([Flow-GRPO](https://huggingface.co/papers/2505.05470)): `s^2 = a^2 t / (1 - t) (t - t')` and
  `c = s^2 / (2 t)`, with the noise level `a`. In the first step, where `t` is 1, its divisor is `1 - t'`.
- CPS ([coefficients-preserving sampling](https://huggingface.co/papers/2509.05952)): `s = t' sin(a pi / 2)` and
  `c = t' - sqrt(t'^2 - s^2)`, so that the noise in `x'` is `t'` times one of unit variance.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


SDEKind = Literal["flow_sde", "cps"]


@dataclass(frozen=True)
class SDEWindow:
    """
    Which steps of a rollout add noise: consecutive ones. The others are those of Euler's method.

    Args:
        kind (`str`):
            `"flow_sde"` or `"cps"`.
        noise_level (`float`):
            `a`, at least 0; with CPS at most 1.
        begin (`int`):
            The first of these steps, from 0 on.
        size (`int`):
            Their number. The last step of a rollout must not be among them: it has to end without noise.
    """

    kind: SDEKind
    noise_level: float
    begin: int
    size: int


class SDESteps(NamedTuple):
    """
    Steps, each with the numbers of its form.

    Args:
        t (`torch.Tensor`):
            Their times.
        t_next (`torch.Tensor` of the same shape):
            `t'`.
        deviation (`torch.Tensor` of the same shape):
            `s`.
        removed (`torch.Tensor` of the same shape):
            `c`.
    """

    t: Tensor
    t_next: Tensor
    deviation: Tensor
    removed: Tensor

    @classmethod
    def of_grid(cls, kind: SDEKind, noise_level: float, times: Tensor) -> "SDESteps":
        """
        All steps of a rollout, in float64 on the CPU.

        Args:
            kind (`str`):
                See [`SDEWindow`].
            noise_level (`float`):
                See [`SDEWindow`].
            times (`torch.Tensor` of shape `(N + 1,)`):
                The time of each step, descending, and the end of the last one.
        """
        times = times.cpu().double()
        t, t_next = times[:-1], times[1:]
        if kind == "cps":
            deviation = t_next * math.sin(noise_level * math.pi / 2)
            return cls(t, t_next, deviation, t_next - (t_next.square() - deviation.square()).sqrt())
        data = 1 - torch.cat([t_next[:1], t[1:]])
        deviation = noise_level * (t * (t - t_next) / data).sqrt()
        return cls(t, t_next, deviation, deviation.square() / (2 * t))

    def at(self, index: int) -> "SDESteps":
        """One of several steps."""
        return SDESteps(*(part[index] for part in self))

    def expand(self, like: Tensor) -> "SDESteps":
        """One step for every sample of a batch, to be used with it: in its dtype, on its device."""
        return SDESteps(*(part.to(like).expand(len(like)) for part in self))

    @property
    def velocity_factor(self) -> Tensor:
        """By how much the mean of `x'` changes with the velocity: `t' - t - c (1 - t)`."""
        return self.t_next - self.t - self.removed * (1 - self.t)

    def mean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """
        The mean of `x'`.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`):
                Where the steps begin.
            velocity (`torch.Tensor` of the same shape):
                The velocity there, noise minus data.
        """
        t, t_next, _, removed = (part.reshape(-1, *[1] * (x.ndim - 1)) for part in self)
        return x + (t_next - t) * velocity - removed * (x + (1 - t) * velocity)


@dataclass(frozen=True)
class Transitions:
    """
    What the steps with noise of a rollout went through.

    Args:
        points (`torch.Tensor` of shape `(B, W + 1, ...)`, float32):
            The latents before each of `W` consecutive steps with noise, and after the last one. They are those that
            the pipeline went on from, in whatever precision it has.
        times (`torch.Tensor` of shape `(N + 1,)`, float32, on the CPU):
            The time of each step of the rollout, with noise or without, and the end of the last one, 0.
        begin (`int`):
            The first step with noise.
    """

    points: Tensor
    times: Tensor
    begin: int

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors on the CPU, by names."""
        points, begin = self.points.detach().cpu().contiguous(), torch.tensor(self.begin)
        return {"transitions.points": points, "transitions.times": self.times, "transitions.begin": begin}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> "Transitions":
        """What [`~Transitions.tensors`] returned, with the points on a device."""
        points, times, begin = (tensors[f"transitions.{name}"] for name in ("points", "times", "begin"))
        return cls(points.to(device), times, int(begin))

    def select(self, samples: slice | Tensor) -> "Transitions":
        """Those of some of the samples."""
        return dataclasses.replace(self, points=self.points[samples])

    def without(self, samples: Tensor) -> "Transitions":
        """The same with points that are 0 for some of the samples, a mask of shape `(B,)`."""
        mask = samples.view(-1, *[1] * (self.points.ndim - 1))
        return dataclasses.replace(self, points=self.points.masked_fill(mask, 0.0))

    @staticmethod
    def concatenate(parts: "Sequence[Transitions | None]") -> "Transitions | None":
        """Those of several batches with the same steps with noise; `None` where there are none."""
        found = [part for part in parts if part is not None]
        return dataclasses.replace(found[0], points=torch.cat([part.points for part in found])) if found else None
