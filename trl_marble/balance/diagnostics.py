# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Cosines between a direction and the sampled gradients that it is made of, from the Gram matrix alone."""

import torch
from torch import Tensor

from .advantages import STD_EPS


# If a direction is shorter than 1e-4 of the sum of the lengths of its parts, they cancel and it is a rounding error.
_CANCELLED = 1e-8
_CONFLICT_TOLERANCE = 1e-6


def direction_cosines(gram: Tensor, weights: Tensor) -> Tensor:
    """
    Cosines between the direction `d = sum_k w_k g_k` and every gradient.

    They are *in-sample*: `d` contains the noise of every `g_k`, which makes them larger than the cosines with the
    gradients' expected values, and positive even where these are 0. See [`heldout_cosines`].

    Args:
        gram (`torch.Tensor` of shape `(K, K)`):
            Inner products of the gradients, not normalized.
        weights (`torch.Tensor` of shape `(K,)`):
            `w`.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64 on the CPU, in `[-1, 1]`. NaN for a zero gradient; 0 if the gradients
        cancel and there is no direction.

    Raises:
        `ValueError`: if there is not one weight per gradient.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or weights.shape != gram.shape[:1]:
        raise ValueError(
            "Pass a square Gram matrix and one weight per gradient, got shapes "
            f"{tuple(gram.shape)} and {tuple(weights.shape)}."
        )
    gram, weights = gram.detach().cpu().double(), weights.detach().cpu().double()
    return cosines_with(gram.diagonal().sqrt(), gram @ weights, gram, weights)


def cosines_with(norms: Tensor, products: Tensor, gram: Tensor, weights: Tensor) -> Tensor:
    """
    Cosines between the direction `d = sum_k w_k g_k` and any vectors; in one dtype on one device.

    Args:
        norms (`torch.Tensor` of shape `(N,)`):
            Norms of the vectors.
        products (`torch.Tensor` of shape `(N,)`):
            Their inner products with `d`.
        gram (`torch.Tensor` of shape `(K, K)`):
            Inner products of the gradients `g`.
        weights (`torch.Tensor` of shape `(K,)`):
            `w`.

    Returns:
        `torch.Tensor` of shape `(N,)`, in `[-1, 1]`. NaN for a zero vector; 0 if the gradients cancel.
    """
    squared_length = weights @ gram @ weights
    if squared_length <= _CANCELLED * (weights.abs() @ gram.diagonal().sqrt()).square():
        return torch.zeros_like(norms).masked_fill(norms == 0, torch.nan)
    return (products / (squared_length.sqrt() * norms)).clamp(-1, 1)


def balance_diagnostics(gram: Tensor, weights: Tensor, active: Tensor) -> dict[str, float]:
    """
    Summary of the cosines between the direction and the gradients of the active rewards.

    Args:
        gram (`torch.Tensor` of shape `(K, K)`):
            Inner products of the gradients, not normalized.
        weights (`torch.Tensor` of shape `(K,)`):
            `w` of the direction `d = sum_k w_k g_k`, which need not be the one of the update (see
            [`weighted_sum_weights`]).
        active (`torch.BoolTensor` of shape `(K,)`):
            The rewards to include.

    Returns:
        `dict` with `cos_min`, `cos_mean`, `cos_var` (population variance) over the active rewards that have a
        gradient, NaN if there is none, and `conflict`: 1.0 if any cosine is below -1e-6, otherwise 0.0.
    """
    cosines = direction_cosines(gram, weights)[active.detach().cpu()]
    cosines = cosines[~cosines.isnan()]
    if len(cosines) == 0:
        return {"cos_min": torch.nan, "cos_mean": torch.nan, "cos_var": torch.nan, "conflict": 0.0}
    return {
        "cos_min": cosines.min().item(),
        "cos_mean": cosines.mean().item(),
        "cos_var": cosines.var(correction=0).item(),
        "conflict": float((cosines < -_CONFLICT_TOLERANCE).any()),
    }


def weighted_sum_weights(reward_weights: Tensor, reward_stds: Tensor, counts: Tensor) -> Tensor:
    """
    The weights of per-reward gradients whose direction is that of `"sum_then_normalize"`, up to a common scale. With
    them [`balance_diagnostics`] shows what the weighted sum would have done.

    A raw reward minus its group's mean is `(s_k + 1e-4) A[k, i]`, so the one advantage of the weighted sum is
    proportional to `sum_k w_k (s_k + 1e-4) m[k, i] A[k, i]`, averaged over all samples; `g_k` averages `A[k]` over its
    own `n_k` samples, which leaves `u_k = w_k (s_k + 1e-4) n_k`. This is exact for the gradients of the rewards'
    signal (`balance_on="advantage"`), with `scale_rewards="batch"`, where no advantage is clipped and a reward applies
    to all samples of a prompt or to none.

    Args:
        reward_weights (`torch.Tensor` of shape `(K,)`):
            `w`, the weights of the raw rewards.
        reward_stds (`torch.Tensor` of shape `(K,)`):
            `s`, see [`reward_stds`]. The value of a reward with count 0 is not used.
        counts (`torch.Tensor` of shape `(K,)`):
            `n`, the number of samples that each reward applies to.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64 on the CPU; absolute values sum to 1, or all are 0.

    Raises:
        `ValueError`: if shapes do not agree.
    """
    if not reward_weights.shape == reward_stds.shape == counts.shape or reward_weights.ndim != 1:
        raise ValueError(
            "reward_weights, reward_stds and counts must have one value per reward, got shapes "
            f"{tuple(reward_weights.shape)}, {tuple(reward_stds.shape)} and {tuple(counts.shape)}."
        )
    counts = counts.detach().cpu().double()
    products = reward_weights.detach().cpu().double() * (reward_stds.detach().cpu().double() + STD_EPS) * counts
    products = products.where(counts > 0, torch.zeros_like(products))
    total = products.abs().sum()
    return products / total if total > 0 else products
