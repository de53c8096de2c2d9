# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Gradients as flat vectors: from parameters to vectors and back, and the inner products of vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor


# Number of columns of a gradient matrix that are converted to float64 at a time: 8 MB per reward.
_GRAM_CHUNK = 1 << 20


def flatten_gradients(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """
    Concatenate gradients into one vector.

    Args:
        grads (sequence of `torch.Tensor` or `None`):
            One gradient per parameter; `None`, for an unused parameter, counts as 0.
        parameters (sequence of `torch.Tensor`):
            The parameters of the gradients, with `P` numbers in total.

    Returns:
        `torch.Tensor` of shape `(P,)`, float32 (float64 if the parameters are).

    Raises:
        `ValueError`: if there is not one gradient, of the right shape, per parameter.
    """
    if len(grads) != len(parameters) or len(parameters) == 0:
        raise ValueError(f"Got {len(grads)} gradients for {len(parameters)} parameters: pass one each, at least one.")
    pieces = []
    for index, (grad, parameter) in enumerate(zip(grads, parameters, strict=True)):
        if grad is not None and grad.shape != parameter.shape:
            raise ValueError(
                f"Gradient {index} has shape {tuple(grad.shape)}, its parameter {tuple(parameter.shape)}; they differ."
            )
        piece = torch.zeros_like(parameter) if grad is None else grad
        pieces.append(piece.detach().flatten().to(torch.promote_types(parameter.dtype, torch.float32)))
    return torch.cat(pieces)


def assign_gradients(direction: Tensor, parameters: Sequence[Tensor]) -> None:
    """
    Set the `.grad` of parameters to the parts of a flat vector, and replace earlier values: a direction is computed
    once per optimizer step, from gradients that are accumulated already.

    Args:
        direction (`torch.Tensor` of shape `(P,)`):
            The flat gradient, in the order of `parameters`.
        parameters (sequence of `torch.Tensor`):
            Parameters, with `P` numbers in total. Each `.grad` has its parameter's dtype and device and its own
            memory, so that clipping in place does not change `direction`.

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

    They are summed in float64, chunk by chunk: if gradients oppose each other the shortest direction is a small
    difference of large numbers, and in float32 (above all TF32) rounding errors would determine its sign.

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
