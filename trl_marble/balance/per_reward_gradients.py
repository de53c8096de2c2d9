# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Per-reward gradients of one micro-batch, flattened, and the way back from a direction to `.grad`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import NFTLosses, SampleCoefficients, weighted_loss


# Columns of a gradient matrix that are held in float64 at a time: 8 MB per reward.
_GRAM_CHUNK = 1 << 20


def per_reward_gradients(
    losses: NFTLosses, coefficients: SampleCoefficients, parameters: Sequence[Tensor], retain_graph: bool = False
) -> Tensor:
    """
    Gradients of every per-reward loss ([MARBLE](https://huggingface.co/papers/2605.06507)), one backward pass each
    over the one forward pass behind `losses`. A reward whose coefficients are all 0 in this micro-batch costs none.

    Gradients of micro-batches are *summed* over an optimizer step. `.grad` is neither read nor written. Reentrant
    gradient checkpointing does not work with `torch.autograd.grad`; the non-reentrant one does.

    Args:
        losses ([`NFTLosses`]):
            The two losses of every sample, of shape `(B,)`.
        coefficients ([`SampleCoefficients`] of shape `(K, B)`):
            Per-reward coefficients.
        parameters (sequence of `torch.Tensor`):
            Trainable parameters, `P` numbers in all. Those that the losses do not depend on have gradient 0.
        retain_graph (`bool`, *optional*, defaults to `False`):
            Keep the graph for a further backward pass over the same forward. By default it is freed with the last
            backward pass.

    Returns:
        `torch.Tensor` of shape `(K, P)`, float32 (float64 if the parameters are), in the order of `parameters`.

    Raises:
        `ValueError`: if the shapes of coefficients and losses do not agree.
    """
    if coefficients.positive.ndim != 2:
        raise ValueError(
            f"coefficients must be of shape (rewards, samples), got {tuple(coefficients.positive.shape)}."
        )
    contributes = ((coefficients.positive != 0) | (coefficients.negative != 0)).any(dim=1)
    pending = contributes.nonzero().flatten().tolist()
    gradients = flatten_gradients([None] * len(parameters), parameters).repeat(len(contributes), 1)
    for k in pending:
        loss = weighted_loss(losses, SampleCoefficients(coefficients.positive[k], coefficients.negative[k]))
        keep = retain_graph or k != pending[-1]
        grads = torch.autograd.grad(loss, list(parameters), retain_graph=keep, allow_unused=True)
        gradients[k] = flatten_gradients(grads, parameters)
    return gradients


def flatten_gradients(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """
    Concatenates gradients into one vector.

    Args:
        grads (sequence of `torch.Tensor` or `None`):
            One gradient per parameter; `None`, for an unused parameter, counts as 0.
        parameters (sequence of `torch.Tensor`):
            The parameters that the gradients belong to, `P` numbers in all.

    Returns:
        `torch.Tensor` of shape `(P,)`, float32 (float64 if the parameters are).

    Raises:
        `ValueError`: if there is not one gradient, of the right shape, per parameter.
    """
    if len(grads) != len(parameters) or len(parameters) == 0:
        raise ValueError(f"Got {len(grads)} gradients for {len(parameters)} parameters: give one each, at least one.")
    pieces = []
    for index, (grad, parameter) in enumerate(zip(grads, parameters, strict=True)):
        if grad is not None and grad.shape != parameter.shape:
            raise ValueError(
                f"Gradient {index} has shape {tuple(grad.shape)}, its parameter {tuple(parameter.shape)}."
            )
        piece = torch.zeros_like(parameter) if grad is None else grad
        pieces.append(piece.detach().flatten().to(torch.promote_types(parameter.dtype, torch.float32)))
    return torch.cat(pieces)


def assign_gradients(direction: Tensor, parameters: Sequence[Tensor]) -> None:
    """
    Sets the parameters' `.grad` to the pieces of a flat vector. What `.grad` held before is replaced: a direction is
    made once per optimizer step, from gradients that are accumulated already.

    Args:
        direction (`torch.Tensor` of shape `(P,)`):
            The flat gradient, in the order of `parameters`.
        parameters (sequence of `torch.Tensor`):
            Parameters, `P` numbers in all. Each `.grad` gets its parameter's dtype and device and its own memory, so
            that clipping in place leaves `direction` as it is.

    Raises:
        `ValueError`: if the sizes do not agree.
    """
    sizes = [parameter.numel() for parameter in parameters]
    if direction.shape != (sum(sizes),):
        raise ValueError(
            f"direction has shape {tuple(direction.shape)}, the parameters have {sum(sizes)} numbers: pass the "
            "parameters that the gradients were taken for."
        )
    for parameter, piece in zip(parameters, direction.detach().split(sizes), strict=True):
        parameter.grad = piece.reshape(parameter.shape).to(parameter.device, parameter.dtype, copy=True)


def gram_matrix(gradients: Tensor) -> Tensor:
    """
    Inner products of the gradients, `G[k, l] = <g_k, g_l>`.

    They are summed in float64, chunk by chunk: when gradients oppose each other the shortest direction is a small
    difference of large numbers, and float32 (above all TF32) matrix products would decide its sign by rounding.

    Args:
        gradients (`torch.Tensor` of shape `(K, P)`):
            Flattened gradients.

    Returns:
        `torch.Tensor` of shape `(K, K)`, float64 on the device of `gradients` (float32 on MPS, which has no float64).

    Raises:
        `ValueError`: if `gradients` is not a matrix.
    """
    if gradients.ndim != 2:
        raise ValueError(f"gradients must be of shape (rewards, parameters), got {tuple(gradients.shape)}.")
    dtype = torch.float32 if gradients.device.type == "mps" else torch.float64
    gram = torch.zeros(len(gradients), len(gradients), dtype=dtype, device=gradients.device)
    for chunk in gradients.detach().split(_GRAM_CHUNK, dim=1):
        chunk = chunk.to(dtype)
        gram += chunk @ chunk.T
    return gram
