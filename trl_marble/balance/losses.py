# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
The forward-process loss of [DiffusionNFT](https://huggingface.co/papers/2509.16117) in coefficient form.

Every per-reward loss is affine in per-sample coefficients on the same two losses of a sample:
`L_k = sum_i positive[k, i] * l+_i + negative[k, i] * l-_i`. One forward pass therefore serves every reward, and any
weighted sum of per-reward losses is one loss again, with mixed coefficients.
"""

from typing import NamedTuple

import torch
from torch import Tensor


# Lower bound of the adaptive weight w, as in DiffusionNFT's reference code.
MIN_ADAPTIVE_WEIGHT = 1e-5


class NFTLosses(NamedTuple):
    """
    The two losses of every sample.

    Args:
        positive (`torch.Tensor` of shape `(B,)`):
            `l+`, the denoising loss of the implicit positive policy.
        negative (`torch.Tensor` of shape `(B,)`):
            `l-`, the denoising loss of the implicit negative policy.
    """

    positive: Tensor
    negative: Tensor


class SampleCoefficients(NamedTuple):
    """
    Coefficients of the two losses of every sample.

    Args:
        positive (`torch.Tensor` of shape `(K, B)`, or `(B,)` for a single loss):
            Coefficients of `l+`.
        negative (`torch.Tensor` of the same shape):
            Coefficients of `l-`.
    """

    positive: Tensor
    negative: Tensor


def nft_losses(
    velocity: Tensor, old_velocity: Tensor, x_t: Tensor, x0: Tensor, t: Tensor, nft_beta: float
) -> NFTLosses:
    """
    The positive and the negative loss of every sample ([DiffusionNFT](https://huggingface.co/papers/2509.16117)):

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
        [`NFTLosses`] with two tensors of shape `(B,)`.

    Raises:
        `ValueError`: if shapes do not agree or `nft_beta` is not positive.
    """
    _check_nft_beta(nft_beta)
    for name, tensor in (("old_velocity", old_velocity), ("x_t", x_t), ("x0", x0)):
        if tensor.shape != velocity.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and velocity {tuple(velocity.shape)}: they must be equal."
            )
    if t.shape != velocity.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)} for {velocity.shape[0]} samples: give one time per sample.")

    velocity, old_velocity, x_t, x0, t = (_at_least_float32(x) for x in (velocity, old_velocity.detach(), x_t, x0, t))
    t = t.reshape(-1, *[1] * (velocity.ndim - 1))
    step = nft_beta * (velocity - old_velocity)

    def loss(implicit_velocity: Tensor) -> Tensor:
        error = (x_t - t * implicit_velocity - x0).reshape(velocity.shape[0], -1)
        weight = error.detach().abs().mean(dim=1).clamp_min(MIN_ADAPTIVE_WEIGHT)
        return error.square().mean(dim=1) / weight

    return NFTLosses(positive=loss(old_velocity + step), negative=loss(old_velocity - step))


def nft_coefficients(advantages: Tensor, counts: Tensor, advantage_clip: float, nft_beta: float) -> SampleCoefficients:
    """
    Coefficients of the per-reward losses ([DiffusionNFT](https://huggingface.co/papers/2509.16117), one per reward as
    in [MARBLE](https://huggingface.co/papers/2605.06507)):

    `L_k = (C/b) sum_i (m[k,i] / n_k) (r[k,i] l+_i + (1 - r[k,i]) l-_i)` with `r = 1/2 + A / 2C`.

    Args:
        advantages (`torch.Tensor` of shape `(K, B)`):
            Advantages of this micro-batch, in `[-advantage_clip, advantage_clip]`; NaN (`m = 0`) where a reward does
            not apply.
        counts (`torch.Tensor` of shape `(K,)`):
            `n_k`, to how many samples each reward applies in the *whole optimizer step*, over all micro-batches,
            timesteps and processes. That makes the gradient independent of how the step is split.
        advantage_clip (`float`):
            `C`, the bound at which the advantages were clipped.
        nft_beta (`float`):
            Mixing coefficient `b`, above 0.

    Returns:
        [`SampleCoefficients`] of shape `(K, B)`, non-negative, 0 where a reward does not apply; in float32, or in
        float64 if the advantages are.

    Raises:
        `ValueError`: if an advantage lies outside the clip, a count is 0 while the reward applies to a sample, shapes
        do not agree, or `nft_beta` or `advantage_clip` is not positive.
    """
    values, share = _masked_advantages(advantages, counts, advantage_clip, nft_beta)
    probability = 0.5 + values / (2 * advantage_clip)
    scale = advantage_clip / nft_beta * share
    return SampleCoefficients(positive=scale * probability, negative=scale * (1 - probability))


def advantage_coefficients(
    advantages: Tensor, counts: Tensor, advantage_clip: float, nft_beta: float
) -> SampleCoefficients:
    """
    Coefficients of the reward's signal `H_k = (1/2b) sum_i (m[k,i] / n_k) A[k,i] (l+_i - l-_i)`, the part of
    `L_k = H_k + S_k` that depends on the reward. `S_k` is the anchor of [`anchor_coefficients`].

    Args:
        advantages (`torch.Tensor` of shape `(K, B)`):
            See [`nft_coefficients`].
        counts (`torch.Tensor` of shape `(K,)`):
            See [`nft_coefficients`].
        advantage_clip (`float`):
            The bound at which the advantages were clipped. The coefficients do not depend on it; advantages outside
            are refused.
        nft_beta (`float`):
            Mixing coefficient `b`, above 0.

    Returns:
        [`SampleCoefficients`] of shape `(K, B)` with `negative == -positive`.

    Raises:
        `ValueError`: as [`nft_coefficients`].
    """
    values, share = _masked_advantages(advantages, counts, advantage_clip, nft_beta)
    signal = share * values / (2 * nft_beta)
    return SampleCoefficients(positive=signal, negative=-signal)


def anchor_coefficients(
    mask: Tensor, count: int | Tensor, advantage_clip: float, nft_beta: float
) -> SampleCoefficients:
    """
    Coefficients of the anchor `S = (C/2b) sum_i (m[i] / n) (l+_i + l-_i)`, a trust region around the old policy: its
    gradient is 0 where the policy is the old one.

    Args:
        mask (`torch.BoolTensor` of shape `(B,)`):
            `m`, the samples of this micro-batch that any reward scores.
        count (`int` or `torch.Tensor` of shape `()`):
            `n`, the number of such samples in the whole optimizer step.
        advantage_clip (`float`):
            `C`, the bound at which the advantages were clipped.
        nft_beta (`float`):
            Mixing coefficient `b`, above 0.

    Returns:
        [`SampleCoefficients`] of shape `(B,)`, float32, both parts equal.

    Raises:
        `ValueError`: if the mask is not a boolean vector, or is set somewhere while `count` is 0.
    """
    if mask.ndim != 1 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be a boolean vector, got {mask.dtype} of shape {tuple(mask.shape)}.")
    no_signal = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.nan)[None]
    counts = torch.as_tensor(count, device=mask.device).reshape(1)
    coefficients = nft_coefficients(no_signal, counts, advantage_clip, nft_beta)
    return SampleCoefficients(positive=coefficients.positive[0], negative=coefficients.negative[0])


def mix_coefficients(coefficients: SampleCoefficients, weights: Tensor) -> SampleCoefficients:
    """
    Coefficients of the single loss `sum_k w_k L_k`. As the losses are affine in their coefficients this is exact: one
    forward and one backward pass give the same gradient as mixing per-reward gradients with the same weights.

    Args:
        coefficients ([`SampleCoefficients`] of shape `(K, B)`):
            Per-reward coefficients.
        weights (`torch.Tensor` of shape `(K,)`):
            `w_k`, for instance [`Harmonization`]`.weights`.

    Returns:
        [`SampleCoefficients`] of shape `(B,)`.

    Raises:
        `ValueError`: if there is not one weight per reward.
    """
    if weights.shape != coefficients.positive.shape[:1]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} for coefficients of shape "
            f"{tuple(coefficients.positive.shape)}: give one weight per reward."
        )
    weights = weights.to(coefficients.positive)
    return SampleCoefficients(positive=weights @ coefficients.positive, negative=weights @ coefficients.negative)


def weighted_loss(losses: NFTLosses, coefficients: SampleCoefficients) -> Tensor:
    """
    The loss `sum_i positive[i] * l+_i + negative[i] * l-_i`.

    Args:
        losses ([`NFTLosses`]):
            The two losses of every sample, of shape `(B,)`.
        coefficients ([`SampleCoefficients`] of shape `(B,)`):
            Their coefficients. The mean over samples is in them already, so micro-batches are *summed*.

    Returns:
        `torch.Tensor` of shape `()`.

    Raises:
        `ValueError`: if shapes do not agree.
    """
    if coefficients.positive.shape != losses.positive.shape:
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.positive.shape)} and losses {tuple(losses.positive.shape)}: "
            "they must be equal. Mix per-reward coefficients with `mix_coefficients` first."
        )
    return (coefficients.positive * losses.positive + coefficients.negative * losses.negative).sum()


def _masked_advantages(
    advantages: Tensor, counts: Tensor, advantage_clip: float, nft_beta: float
) -> tuple[Tensor, Tensor]:
    """Advantages with 0 where they are masked, and `m / n`, both `(K, B)`."""
    _check_nft_beta(nft_beta)
    if not advantage_clip > 0:
        raise ValueError(f"advantage_clip must be positive, got {advantage_clip}.")
    if advantages.ndim != 2 or counts.shape != advantages.shape[:1]:
        raise ValueError(
            f"advantages must be of shape (rewards, samples) with one count per reward, got {tuple(advantages.shape)} "
            f"and counts of shape {tuple(counts.shape)}."
        )
    valid = ~advantages.isnan()
    values = _at_least_float32(advantages).masked_fill(~valid, 0.0)
    # A clip like 0.1 is not a float32, so clipped advantages may exceed it by a rounding.
    largest = values.abs().max().item() if values.numel() else 0.0
    if largest > advantage_clip * (1 + 1e-6):
        raise ValueError(
            f"An advantage of size {largest} lies outside [-{advantage_clip}, {advantage_clip}]: clip the advantages "
            "with the same advantage_clip before mixing them."
        )
    uncounted = (counts <= 0) & valid.any(dim=1)
    if uncounted.any():
        row = int(uncounted.nonzero()[0])
        raise ValueError(
            f"Reward {row} applies to {int(valid[row].sum())} samples here but its count is {counts[row].item()}: "
            "counts are over the whole optimizer step, this micro-batch included."
        )
    share = valid.to(values.dtype) / counts.to(values).clamp_min(1)[:, None]
    return values, share


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_nft_beta(nft_beta: float) -> None:
    if not nft_beta > 0:
        raise ValueError(f"nft_beta must be positive, got {nft_beta}.")
