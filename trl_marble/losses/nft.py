# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
The forward-process loss of [DiffusionNFT](https://huggingface.co/papers/2509.16117).

Every per-reward loss is affine in per-sample coefficients on the same two losses of a sample:
`L_k = sum_i positive[k, i] * l+_i + negative[k, i] * l-_i`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .forward_process import (
    OnNoisedSamples,
    at_least_float32,
    divide_by_counts,
)
from .policy_loss import Drawn, FrozenVelocities, StepCounts


# Lower bound of the adaptive weight w, as in DiffusionNFT's reference code.
MIN_ADAPTIVE_WEIGHT = 1e-5


@dataclass(frozen=True)
class NFTLoss(OnNoisedSamples):
    """
    DiffusionNFT's loss, one per reward as in [MARBLE](https://huggingface.co/papers/2605.06507):

    `L_k = (C/b) sum_i (m[k,i] / n_k) (r[k,i] l+_i + (1 - r[k,i]) l-_i)` with `r = 1/2 + A / 2C`.

    With `balance_on="loss"` that is what the rewards have of their own. With `"advantage"` it is only the part that
    depends on the reward, `H_k = (1/2b) sum_i (m[k,i] / n_k) A[k,i] (l+_i - l-_i)`, and the trust region around the
    old policy, `S = (C/2b) sum_i (m[i] / n) (l+_i + l-_i)` over the samples that any reward applies to, is shared.

    Args:
        nft_beta (`float`):
            Mixing coefficient `b`, above 0.
        advantage_clip (`float`):
            `C`, the bound at which the advantages were clipped.
        balance_on (`str`):
            `"loss"` or `"advantage"`.
        beta (`float`):
            Coefficient of the KL to the base model.
    """

    nft_beta: float
    advantage_clip: float
    balance_on: Literal["loss", "advantage"]
    beta: float

    needs = frozenset({"old"})

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        old = velocity.detach() if frozen.old is None else frozen.old
        positive, negative = implicit_losses(velocity, old, drawn.x_t, drawn.x0, drawn.t, self.nft_beta)
        if self.balance_on == "loss":
            return positive, negative
        return positive - negative, positive + negative

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        values, share = divide_by_counts(advantages, counts)
        if self.balance_on == "advantage":
            return (share * values / (2 * self.nft_beta),)
        scale, probability = self._scale * share, 0.5 + values / (2 * self.advantage_clip)
        return scale * probability, scale * (1 - probability)

    def shared(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        frozen: FrozenVelocities,
        scored: Tensor,
        counts: StepCounts,
    ) -> Tensor | None:
        if self.balance_on == "loss":
            return None
        # Where the old policy is the trained one, its gradient is 0 and only its value counts.
        both = terms[1].detach() if frozen.old is None else terms[1]
        share = scored.to(both.dtype) / counts.scored.to(both).clamp_min(1)
        return self._scale * share * 0.5 * both

    @property
    def _scale(self) -> float:
        return self.advantage_clip / self.nft_beta


def implicit_losses(
    velocity: Tensor, old_velocity: Tensor, x_t: Tensor, x0: Tensor, t: Tensor, nft_beta: float
) -> tuple[Tensor, Tensor]:
    """
    The losses of the implicit positive and negative policies
    ([DiffusionNFT](https://huggingface.co/papers/2509.16117)):

    `v± = v_old ± b (v - v_old)`, `x0± = x_t - t v±`, `l± = mean((x0± - x0)^2) / w±` with the adaptive weight
    `w± = stopgrad(mean|x0± - x0|)`, at least 1e-5.

    Everything is computed in float32, or in float64 if the inputs are.

    Args:
        velocity (`torch.Tensor` of shape `(B, ...)`):
            Velocity predicted by the trained policy, noise minus data. Gradients flow through it only.
        old_velocity (`torch.Tensor` of shape `(B, ...)`):
            Velocity predicted by the old policy; detached here.
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noised latents, `(1 - t) x0 + t noise`.
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        t (`torch.Tensor` of shape `(B,)`):
            Times in `[0, 1]`, 0 for data and 1 for noise.
        nft_beta (`float`):
            Mixing coefficient `b`, above 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `l+` and `l-`, of shape `(B,)`.
    """
    velocity, old_velocity, x_t, x0, t = (at_least_float32(x) for x in (velocity, old_velocity.detach(), x_t, x0, t))
    t = t.reshape(-1, *[1] * (velocity.ndim - 1))
    step = nft_beta * (velocity - old_velocity)

    def loss(implicit_velocity: Tensor) -> Tensor:
        error = (x_t - t * implicit_velocity - x0).reshape(velocity.shape[0], -1)
        weight = error.detach().abs().mean(dim=1).clamp_min(MIN_ADAPTIVE_WEIGHT)
        return error.square().mean(dim=1) / weight

    return loss(old_velocity + step), loss(old_velocity - step)
