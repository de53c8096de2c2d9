# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What losses on noised samples share: the noise, sums over an optimizer step, and distances between velocities."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..sde import SDEWindow
from .policy_loss import Drawn, FrozenVelocities, Penalties, Sampled, StepCounts


class OnNoisedSamples:
    """
    What losses on noised samples have in common: each sample at some times with fresh noise, images that the old
    policy samples, and nothing that rewards share beside one penalty, the KL to the base model with the coefficient
    `beta`. A loss with another answer gives its own.
    """

    beta: float

    @property
    def penalties(self) -> Penalties:
        return Penalties(reference=self.beta)

    @property
    def samples_with_old(self) -> bool:
        return True

    def window(self, generation: int, num_steps: int, seed: int) -> SDEWindow | None:
        return None

    def num_times(self, num_steps: int, fraction: float) -> int:
        return max(1, int(num_steps * fraction))

    def draw(
        self, sampled: Sampled, times: Tensor, num_times: int, generators: Sequence[torch.Generator]
    ) -> Iterator[Drawn]:
        return noise_samples(sampled.x0, times, num_times, generators)

    def shared(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        frozen: FrozenVelocities,
        scored: Tensor,
        counts: StepCounts,
    ) -> Tensor | None:
        return None


def noise_samples(x0: Tensor, times: Tensor, num_times: int, generators: Sequence[torch.Generator]) -> Iterator[Drawn]:
    """
    Each sample at some times of a grid, drawn without replacement, with fresh noise at each of them.

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        times (`torch.Tensor` of shape `(N,)`):
            The grid.
        num_times (`int`):
            How many of its times each sample gets, at most N.
        generators (`Sequence[torch.Generator]`):
            One per sample, on the CPU.
    """
    drawn = torch.stack([torch.randperm(len(times), generator=g)[:num_times] for g in generators])  # [B, num_times]
    for column in drawn.T:
        t = _send(times[column], x0)
        noise = _send(torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]), x0)
        t_ = t.view(-1, *[1] * (x0.ndim - 1))
        yield Drawn((1 - t_) * x0 + t_ * noise, t, x0, noise)


def _send(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor in the dtype of another one and on its device; on CUDA without waiting for what it is computing."""
    return tensor.to(other, non_blocking=other.is_cuda)


def divide_by_counts(advantages: Tensor, counts: StepCounts) -> tuple[Tensor, Tensor]:
    """
    What a mean over the samples that a reward applies to is made of.

    Args:
        advantages (`torch.Tensor` of shape `(K, B)`):
            NaN where a reward does not apply.
        counts ([`StepCounts`]):
            `n_k`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, both of shape `(K, B)`: the advantages with 0 where a reward does not
        apply, and `m[k, i] / n_k`; in float32, or in float64 if the advantages are.
    """
    valid = ~advantages.isnan()
    values = at_least_float32(advantages).masked_fill(~valid, 0.0)
    return values, valid.to(values.dtype) / counts.valid.to(values).clamp_min(1)[:, None]


def mean_square_distance(velocity: Tensor, other: Tensor) -> Tensor:
    """
    `mean((v - v')^2)` of every sample: the KL between two policies at one noisy input, up to a factor.

    Args:
        velocity (`torch.Tensor` of shape `(B, ...)`):
            Velocity of the trained policy.
        other (`torch.Tensor` of the same shape):
            Velocity of a frozen one.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return (at_least_float32(velocity) - at_least_float32(other)).square().flatten(1).mean(dim=1)


def matching_errors(drawn: Drawn, *velocities: Tensor | None) -> tuple[Tensor, ...]:
    """
    The flow-matching error `mean((v - (noise - x0))^2)` of every sample.

    Args:
        drawn ([`Drawn`]):
            The noisy inputs.
        velocities (`torch.Tensor` of shape `(B, ...)`, *optional*):
            The trained policy's, and those of frozen ones; `None` stands for the trained one's, detached.

    Returns:
        `tuple[torch.Tensor, ...]`: one for each velocity, of shape `(B,)`.
    """
    target = at_least_float32(drawn.noise) - at_least_float32(drawn.x0)
    own, *others = (None if each is None else mean_square_distance(each, target) for each in velocities)
    assert own is not None
    return own, *(own.detach() if other is None else other for other in others)


def add_shared(*parts: Tensor | None) -> Tensor | None:
    """The sum of what is there; `None` where nothing is."""
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(dim=0) if present else None


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
