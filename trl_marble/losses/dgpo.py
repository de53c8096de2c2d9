# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Direct group preference optimization ([DGPO](https://huggingface.co/papers/2510.08425))."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .forward_process import OnNoisedSamples, divide_by_counts, matching_errors
from .groups import group_mean
from .policy_loss import Drawn, FrozenVelocities, StepCounts


DGPOReference = Literal["base", "old"]


@dataclass(frozen=True)
class DGPOLoss(OnNoisedSamples):
    """
    DGPO's loss, one per reward: a preference for the better half of a prompt's group over the worse one. With the
    matching error `mse_i = mean((v_i - (noise_i - x0_i))^2)`, which is smaller the likelier a sample is,

    `L_k = sum_i (m[k,i] / n_k) sigmoid(s[k,g(i)]) A[k,i] mse_i` and
    `s[k,g] = (dgpo_beta / |g|) sum_{j in g} A[k,j] (mse_j - mse_ref,j)`,

    where `s` is a constant: the more the policy prefers what the reward prefers, compared with the reference, the
    smaller `s`, and the less the group weighs. Sums are over the samples of the prompt in the optimizer step that
    reward k applies to, and `|g|` is their number. All of them have the same time and the same noise, as published.

    A sample has no gradient where the policy has moved far enough from the old one: where
    `exp(mse_old,i - mse_i)` is above `1 + c` and `A[k,i] > 0`, or below `1 - c` and `A[k,i] <= 0`. Here the old policy
    is a fast moving average of the trained weights (`old_policy_preset`).

    Args:
        dgpo_beta (`float`):
            How much the groups' weights depend on what the policy prefers already, above 0.
        dgpo_reference (`str`):
            Whose preferences the policy's are compared with: `"base"`, the base model's, or `"old"`, the old policy's.
        dgpo_clip_range (`float`):
            `c`, above 0.
        beta (`float`):
            Coefficient of the KL to the base model.
        reference_guidance_scale (`float`, *optional*):
            Guidance scale of the base model, in the KL and as reference, see [`~trl_marble.pipelines.FlowPipeline`].
    """

    dgpo_beta: float
    dgpo_reference: DGPOReference
    dgpo_clip_range: float
    beta: float
    reference_guidance_scale: float | None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"group", "old"} | ({"reference"} if self.dgpo_reference == "base" else set()))

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        """The matching errors of the trained policy, the old one and the reference."""
        own, old, base = matching_errors(drawn, velocity, frozen.old, frozen.reference)
        return own, old, base if self.dgpo_reference == "base" else old

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        groups = counts.compared_with()
        values, share = divide_by_counts(advantages, counts)
        own = groups.own()
        if own is None or groups.terms is None:  # no policy differs: s is 0, and nothing has moved
            return (0.5 * share * values,)
        compared = groups.advantages * (groups.terms[0] - groups.terms[2])
        weight = (self.dgpo_beta * group_mean(compared, ~groups.advantages.isnan())).sigmoid()
        ratio = (own[1] - own[0]).exp()
        moved = torch.where(values > 0, ratio > 1 + self.dgpo_clip_range, ratio < 1 - self.dgpo_clip_range)
        # A ratio that is not finite is no reason to leave it out, or to keep it: it is to be seen.
        kept = torch.where(ratio.isfinite(), (~moved).to(ratio), torch.nan)
        return (share * weight * values * kept,)
