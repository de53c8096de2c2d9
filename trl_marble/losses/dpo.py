# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Preference pairs made while training, with [Diffusion-DPO](https://huggingface.co/papers/2311.12908)'s loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward_process import OnNoisedSamples, divide_by_counts, matching_errors
from .policy_loss import Drawn, FrozenVelocities, StepCounts


@dataclass(frozen=True)
class DPOLoss(OnNoisedSamples):
    """
    Diffusion-DPO's loss on pairs that each reward makes for itself: w and l, the best and the worst sample of a
    prompt. With the matching error `mse_i = mean((v_i - (noise_i - x0_i))^2)`,

    `L_k = sum_g (|g| / n_k) (-log sigmoid(z[k,g]))` and
    `z[k,g] = -(dpo_beta / 2) ((mse_w - mse_ref,w) - (mse_l - mse_ref,l))`,

    where g are the samples of the prompt in the optimizer step that reward k applies to, `|g|` of them. Both halves of
    a pair have the same time and the same noise, as published. A prompt whose samples are all alike to a reward has no
    pair. Of equal rewards the first that was sampled counts.

    Args:
        dpo_beta (`float`):
            How much of a difference of matching errors is a preference, above 0.
        beta (`float`):
            Coefficient of the KL to the base model.
    """

    dpo_beta: float
    beta: float

    needs = frozenset({"group", "reference"})

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        return matching_errors(drawn, velocity, frozen.reference)

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        groups, (_, share) = counts.compared_with(), divide_by_counts(advantages, counts)
        own, reference = groups.looked_ahead()
        valid = ~groups.advantages.isnan()
        best, winner = groups.advantages.masked_fill(~valid, -torch.inf).max(dim=2, keepdim=True)  # [K, B, 1]
        worst, loser = groups.advantages.masked_fill(~valid, torch.inf).min(dim=2, keepdim=True)
        moved = (own - reference).expand_as(groups.advantages)
        z = -self.dpo_beta / 2 * (moved.gather(2, winner) - moved.gather(2, loser))
        place = groups.place[None, :, None]
        side = (place == winner).to(z.dtype) - (place == loser).to(z.dtype)
        weights = self.dpo_beta / 2 * (-z).sigmoid() * side * (best > worst)
        return (share * valid.sum(dim=2) * weights.squeeze(2),)
