# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
What holds of the rewards, and not only of the sample: cosines and inner products between two halves of a step.

A sampled gradient is `g_k = s_k + noise`, and only its expected value `s_k` says what a step does to the reward. A
direction that is made of the `g_k` contains their noise, so its cosines with them are positive whatever `s_k` is: the
bias of stochastic MGDA ([MoCo](https://huggingface.co/papers/2210.12624),
[MoDo](https://huggingface.co/papers/2305.20057), [SDMGrad](https://huggingface.co/papers/2305.18409)). Two halves of
the step's prompts have independent noise.
"""

import torch
from torch import Tensor

from .diagnostics import cosines_with


def heldout_cosines(gram: Tensor, first_weights: Tensor, second_weights: Tensor, active: Tensor) -> Tensor:
    """
    Cosines between the direction of one half of a step and the gradients of the other half, averaged over both ways.

    The direction of the first half is `d = sum_k w_k g_k` with that half's own gradients, and its inner product with
    the second half's `g_k` has the expected value `<d, s_k>`: no noise of `d` is in it. So the mean over steps has
    the sign that the direction has for the reward. It is smaller than the cosine with `s_k`, because the length of the
    second half's `g_k` contains noise, and smaller than that of the complete step's direction, which has less noise.

    Args:
        gram (`torch.Tensor` of shape `(2K, 2K)`):
            Inner products of the per-reward gradients of the first half, and then of the second half.
        first_weights (`torch.Tensor` of shape `(K,)`):
            `w` of the first half's direction. It must not depend on the gradients of the second half.
        second_weights (`torch.Tensor` of shape `(K,)`):
            The same for the second half.
        active (`torch.BoolTensor` of shape `(K,)`):
            The rewards that have a signal in both halves.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64 on the CPU, in `[-1, 1]`. NaN for a reward that is not active or has a
        zero gradient in a half. A half whose gradients cancel has no direction and counts as 0.

    Raises:
        `ValueError`: if shapes do not agree.
    """
    gram = _checked_gram(gram, first_weights, second_weights, active)
    size = len(active)
    first, cross, second = gram[:size, :size], gram[:size, size:], gram[size:, size:]
    first_weights, second_weights = (part.detach().cpu().double() for part in (first_weights, second_weights))
    of_first = cosines_with(second.diagonal().sqrt(), first_weights @ cross, first, first_weights)
    of_second = cosines_with(first.diagonal().sqrt(), cross @ second_weights, second, second_weights)
    return ((of_first + of_second) / 2).masked_fill(~active.cpu(), torch.nan)


def signal_shares(gram: Tensor, first_share: Tensor, active: Tensor) -> Tensor:
    """
    The share of each gradient's squared norm that is signal, `|s_k|^2 / |g_k|^2`; the rest is the samples' noise.

    The halves' gradients `a_k` and `b_k`, which sum up to the step's `g_k`, have the expected values `f s_k` and
    `(1 - f) s_k` and independent noise. So `<a_k, b_k> / (f (1 - f))` is an unbiased estimate of `|s_k|^2`, where
    `|g_k|^2` is too large by the noise. It may be negative. `|g_k|^2` contains `2 <a_k, b_k>`, so it is small where
    the estimate is, and a mean of several steps' shares is a little too low; the sum of their `share * |g_k|^2`
    divided by the sum of their `|g_k|^2` is not.

    Args:
        gram (`torch.Tensor` of shape `(2K, 2K)`):
            Inner products of the per-reward gradients of the first half, and then of the second half.
        first_share (`torch.Tensor` of shape `(K,)`):
            `f`, the share of the reward's samples that are in the first half.
        active (`torch.BoolTensor` of shape `(K,)`):
            The rewards that have a signal in both halves.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64 on the CPU. NaN for a reward that is not active or has a zero gradient
        in a half.

    Raises:
        `ValueError`: if shapes do not agree.
    """
    gram = _checked_gram(gram, first_share, active)
    size = len(active)
    first, cross, second = gram[:size, :size].diagonal(), gram[:size, size:].diagonal(), gram[size:, size:].diagonal()
    share = first_share.detach().cpu().double()
    shares = cross / (share * (1 - share)) / (first + 2 * cross + second)
    return shares.masked_fill((first == 0) | (second == 0) | ~active.cpu(), torch.nan)


def _checked_gram(gram: Tensor, *of_rewards: Tensor) -> Tensor:
    size = len(of_rewards[0])
    if gram.shape != (2 * size, 2 * size) or any(values.shape != (size,) for values in of_rewards):
        raise ValueError(
            "Pass the Gram matrix (2K, 2K) of both halves' gradients, and one value per reward, got shapes "
            f"{', '.join(str(tuple(values.shape)) for values in (gram, *of_rewards))}."
        )
    return gram.detach().cpu().double()
