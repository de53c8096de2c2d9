# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Centered reward distillation ([CRD](https://huggingface.co/papers/2603.14128))."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .forward_process import OnNoisedSamples, at_least_float32, divide_by_counts, mean_square_distance
from .groups import Groups, group_mean
from .nft import MIN_ADAPTIVE_WEIGHT
from .policy_loss import Drawn, FrozenVelocities, StepCounts


CRDObjective = Literal["mse", "bce"]


@dataclass(frozen=True)
class CRDLoss(OnNoisedSamples):
    """
    CRD's loss, one per reward. A policy that has gone from the old one to where a KL-regularized reward is greatest
    has the reward in it: `b log(p / p_old)` is the reward minus a number that only depends on the prompt. So both are
    centred within the prompt's group, where that number goes, and one is regressed on the other.

    `rho_i = mse_old,i / w_old,i - mse_i / w_i` stands for `log(p / p_old)`, with the matching error
    `mse_i = mean((v_i - (noise_i - x0_i))^2)` and `w_i = stopgrad(mean|v_i - (noise_i - x0_i)|)`, at least 1e-5;
    `R[k,i] = 1/2 + A[k,i] / 2C` is the reward. With their means over the group taken off (`rho^c`, `R^c`)

    `L_k = (C/b) sum_i (m[k,i] / n_k) (b rho^c_i - R^c[k,i])^2`, or, with `crd_objective="bce"`,
    `L_k = (C/b) sum_i (m[k,i] / n_k) BCE(sigmoid(b rho^c_i), sigmoid(R^c[k,i]))`.

    Means are over the samples of the prompt in the optimizer step that reward k applies to; these have the same time
    and the same noise, so they are taken time by time. They are constants: `rho_i` has a gradient through `v_i` only.

    With `balance_on="loss"` that is what the rewards have of their own. With `"advantage"` it is the gradient at
    `rho^c = 0`, `-2C R^c[k,i]` (or `C (1/2 - sigmoid(R^c[k,i]))`), and the rest, a trust region around the old policy,
    is shared: `C b rho^c_i^2` (or `(C/b) log(1 + exp(b rho^c_i)) - (C/2) rho^c_i`) over the samples that any reward
    applies to. On-policy there is none.

    Args:
        crd_objective (`str`):
            `"mse"` or `"bce"`.
        crd_beta (`float`):
            `b`, above 0.
        advantage_clip (`float`):
            `C`, the bound at which the advantages were clipped.
        balance_on (`str`):
            `"loss"` or `"advantage"`.
        beta (`float`):
            Coefficient of the KL to the base model.
        reference_guidance_scale (`float`, *optional*):
            Guidance scale of the base model in the KL, see [`~trl_marble.pipelines.FlowPipeline`].
        sampling_policy_preset (`int`, *optional*):
            How fast the policy that samples follows the trained one, where it is not the old policy.
    """

    crd_objective: CRDObjective
    crd_beta: float
    advantage_clip: float
    balance_on: Literal["loss", "advantage"]
    beta: float
    reference_guidance_scale: float | None
    sampling_policy_preset: int | None

    needs = frozenset({"old", "group"})

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        old = velocity.detach() if frozen.old is None else frozen.old
        return (_normalized_error(old, drawn).detach() - _normalized_error(velocity, drawn),)

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        groups = counts.compared_with()
        values, share = divide_by_counts(advantages, counts)
        valid = ~groups.advantages.isnan()
        rewards = (values - group_mean(groups.advantages, valid)) / (2 * self.advantage_clip)
        rho = torch.zeros_like(values)
        if self.balance_on == "loss":
            rho = self._centred(terms[0].detach(), groups, valid)
        if self.crd_objective == "mse":
            return (2 * self.advantage_clip * share * (self.crd_beta * rho - rewards),)
        return (self.advantage_clip * share * ((self.crd_beta * rho).sigmoid() - rewards.sigmoid()),)

    def shared(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        frozen: FrozenVelocities,
        scored: Tensor,
        counts: StepCounts,
    ) -> Tensor | None:
        groups = counts.compared_with()
        if self.balance_on == "loss" or groups.terms is None:
            return None
        rho = self.crd_beta * self._centred(terms[0], groups, (~groups.advantages.isnan()).any(dim=0))
        share = scored.to(rho.dtype) / counts.scored.to(rho).clamp_min(1)
        each = rho.square() if self.crd_objective == "mse" else softplus(rho) - rho / 2
        return self.advantage_clip / self.crd_beta * share * each

    @staticmethod
    def _centred(rho: Tensor, groups: Groups, valid: Tensor) -> Tensor:
        """`rho^c` of shape `(B,)` or `(K, B)`, as `valid`, with the value that it had before the step."""
        own = groups.own()
        if own is None or groups.terms is None:
            return torch.zeros_like(rho).expand(valid.shape[:-1])
        # The old policy is not asked again, so here `rho` is 0; its gradient is right.
        return own[0] + (rho - rho.detach()) - group_mean(groups.terms[0], valid)


def _normalized_error(velocity: Tensor, drawn: Drawn) -> Tensor:
    """`mse / w` of every sample."""
    target = at_least_float32(drawn.noise) - at_least_float32(drawn.x0)
    error = (at_least_float32(velocity.detach()) - target).flatten(1)
    weight = error.abs().mean(dim=1).clamp_min(MIN_ADAPTIVE_WEIGHT)
    return mean_square_distance(velocity, target) / weight
