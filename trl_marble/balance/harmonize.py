# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""From the Gram matrix of the per-reward gradients to the weights of one update direction."""

from typing import NamedTuple

import torch
from torch import Tensor

from .weightings import Weighting


class Harmonization(NamedTuple):
    """
    How per-reward gradients are to be combined.

    Args:
        weights (`torch.Tensor` of shape `(K,)`):
            `w` of the update direction `d = sum_k w_k g_k`, over the gradients as they are. 0 for inactive rewards.
        alpha (`torch.Tensor` of shape `(K,)`):
            What the weighting returned, divided by the priorities: over the normalized gradients. 0 for inactive
            rewards.
        norms (`torch.Tensor` of shape `(K,)`):
            `||g_k||`.
        gram (`torch.Tensor` of shape `(K, K)`):
            Inner products of the gradients as they are.
        active (`torch.BoolTensor` of shape `(K,)`):
            The rewards that took part.
    """

    weights: Tensor
    alpha: Tensor
    norms: Tensor
    gram: Tensor
    active: Tensor


@torch.no_grad()
def harmonize(
    gram: Tensor, weighting: Weighting, active: Tensor | None = None, priorities: Tensor | None = None
) -> Harmonization:
    """
    Harmonizes per-reward gradients ([MARBLE](https://huggingface.co/papers/2605.06507)). Only their inner products are
    needed: gradients are brought to unit norm, a weighting finds `alpha`, and the direction gets the gradients' mean
    norm back,

    `d = sum_k w_k g_k` with `w_k = alpha_k * mean_j ||g_j|| / ||g_k||`.

    With priorities the weighting sees `g_k / (p_k ||g_k||)` instead of unit gradients. What it would bring to equal
    inner products with the direction then gets cosines in the ratio of the priorities: of two rewards, the one with
    twice the priority gets twice the cosine. MGDA does so for all rewards that it gives a positive `alpha`.

    Args:
        gram (`torch.Tensor` of shape `(K, K)`):
            Inner products of the gradients of one whole optimizer step, see [`gram_matrix`].
        weighting (callable):
            From a Gram matrix of the active rewards to their `alpha`, see [`get_weighting`]. It gets the dtype and
            device of `gram`. The result must be finite; it need neither sum to 1 nor be positive.
        active (`torch.BoolTensor` of shape `(K,)`, *optional*):
            The rewards that apply to any sample of the step. Defaults to all. Rewards with a zero gradient take no
            part in any case.
        priorities (`torch.Tensor` of shape `(K,)`, *optional*):
            `p`, positive; only their ratios matter. Defaults to equal ones.

    Returns:
        [`Harmonization`], in the dtype and on the device of `gram`. All weights are 0 if no reward is active.

    Raises:
        `FloatingPointError`: if `gram` is not finite; the message names the reward.
        `ValueError`: if `gram` is not a square floating-point matrix or has a negative diagonal, if `active` is not
        one boolean per reward, or if the weighting returns something of the wrong shape or not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.is_floating_point():
        raise ValueError(f"gram must be a square matrix of floats, got {gram.dtype} of shape {tuple(gram.shape)}.")
    squared_norms = gram.diagonal()
    if not gram.isfinite().all():
        # A broken gradient spoils its whole row and column, so the diagonal tells which one it was.
        broken = (~squared_norms.isfinite()).nonzero().flatten().tolist()
        culprits = broken or (~gram.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"The gradient of reward {', '.join(map(str, culprits))} is not finite. Look for NaN or inf in the "
            "latents and predictions of this step; a lower learning rate, or bfloat16 for float16, may help."
        )
    if (squared_norms < 0).any():
        row = int((squared_norms < 0).nonzero()[0])
        raise ValueError(f"The squared gradient norm gram[{row}, {row}] is negative: {squared_norms[row].item()}.")
    if active is None:
        active = torch.ones(len(gram), dtype=torch.bool)
    if active.dtype != torch.bool or active.shape != squared_norms.shape:
        raise ValueError(
            f"active must hold one boolean per reward ({len(gram)}), got {active.dtype} of shape "
            f"{tuple(active.shape)}."
        )

    active = active.to(gram.device) & (squared_norms > 0)
    norms = squared_norms.sqrt()
    alpha = torch.zeros_like(norms)
    weights = torch.zeros_like(norms)
    if active.any():
        active_norms = norms[active]
        active_gram = gram[active][:, active] / active_norms.outer(active_norms)
        p = torch.ones_like(active_norms) if priorities is None else priorities.to(gram)[active]
        p = p / p.mean()
        active_alpha = torch.as_tensor(weighting(active_gram / p.outer(p))).to(gram)
        if active_alpha.shape != active_norms.shape or not active_alpha.isfinite().all():
            raise ValueError(
                f"The weighting returned {active_alpha.tolist()} for a Gram matrix of {len(active_norms)} gradients: "
                f"it must return {len(active_norms)} finite weights."
            )
        alpha[active] = active_alpha = active_alpha / p
        weights[active] = active_alpha * active_norms.mean() / active_norms
    return Harmonization(weights=weights, alpha=alpha, norms=norms, gram=gram, active=active)
