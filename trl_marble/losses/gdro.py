# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Group-level direct reward optimization ([GDRO](https://huggingface.co/papers/2601.02036))."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .forward_process import OnNoisedSamples, divide_by_counts, matching_errors
from .policy_loss import Drawn, FrozenVelocities, StepCounts


@dataclass(frozen=True)
class GDROLoss(OnNoisedSamples):
    """
    GDRO's loss, one per reward: the policy is to rank the samples of a prompt as the reward does. With the matching
    error `mse_i = mean((v_i - (noise_i - x0_i))^2)` and `s_i = -gdro_beta (mse_i - mse_ref,i)`, the policy picks
    sample j out of some with probability `p(j) = softmax(s)(j)`, and should with `q(j) = softmax(A[k] / tau)(j)`. Of
    the samples in the order of reward k, the best first, it picks from the i-th on, for every i:

    `L_k = sum_g (|g| / n_k) [ sum_{i=1}^{|g|-1} (log sum_{j>=i} exp(s_j) - sum_{j>=i} q_i(j) s_j)
    + gamma gdro_beta mse_best ]`

    over the samples of the prompt in the optimizer step that reward k applies to, `|g|` of them, with `gamma` =
    `gdro_best`. The gradient with respect to `mse_j` is `gdro_beta (sum_i (q_i(j) - p_i(j)) + gamma 1[j is best])`.
    All of a group have the same time and the same noise. Equal rewards are ranked in the order of sampling.

    Args:
        gdro_beta (`float`):
            How much of a difference of matching errors is a preference, above 0.
        gdro_temperature (`float`):
            `tau`, in units of the advantages, above 0.
        gdro_best (`float`):
            `gamma`, how much the best sample of a group is learned by itself, in units of `gdro_beta`.
        beta (`float`):
            Coefficient of the KL to the base model.
    """

    gdro_beta: float
    gdro_temperature: float
    gdro_best: float
    beta: float

    needs = frozenset({"group", "reference"})

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        return matching_errors(drawn, velocity, frozen.reference)

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        groups, (_, share) = counts.compared_with(), divide_by_counts(advantages, counts)
        own, reference = groups.looked_ahead()
        rewards = groups.advantages.nan_to_num(nan=-torch.inf)
        order = rewards.argsort(dim=2, descending=True, stable=True)  # [K, B, G], what does not apply comes last
        size = (~groups.advantages.isnan()).sum(dim=2)
        preferred = (-self.gdro_beta * (own - reference)).expand_as(rewards).gather(2, order)
        wanted = rewards.gather(2, order) / self.gdro_temperature
        place = torch.arange(order.shape[2], device=order.device)
        # [K, B, G, G]: in each row what is left to pick from, all that apply in the first, and one less in each next.
        left = (place >= place[:, None]) & (place < size[..., None])[:, :, None]
        picks = (place < size[..., None] - 1)[..., None]  # the last one is no choice
        p, q = (_softmax(values[:, :, None], left) for values in (preferred, wanted))
        pushed = ((q - p) * picks).sum(dim=2)
        rank = order.argsort(dim=2).gather(2, groups.place.expand(len(order), -1)[..., None])
        weights = pushed.gather(2, rank).squeeze(2) + self.gdro_best * (rank.squeeze(2) == 0).to(pushed)
        return (share * size * self.gdro_beta * weights,)


def _softmax(values: Tensor, valid: Tensor) -> Tensor:
    """Over the last dimension, of what is valid; 0 elsewhere, and where nothing is."""
    filled = values.masked_fill(~valid, torch.finfo(values.dtype).min)
    return filled.softmax(dim=-1) * valid
