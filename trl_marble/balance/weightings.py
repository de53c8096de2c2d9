# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Weightings: functions from the Gram matrix of the gradients to one weight per gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import quadprog
import torch
from torch import Tensor


Weighting = Callable[[Tensor], Tensor]

# Relative to the largest entry of the Gram matrix. It makes the quadratic program strictly convex, so that a singular
# Gram matrix has one solution (the one with the most equal weights) and quadprog can factorize it.
_RIDGE = 1e-8
_SYMMETRY_TOLERANCE = 1e-5
_NEGLIGIBLE = 1e-10
_EIGENVALUE_TOLERANCE = 1e-3


def mgda_weights(gram: Any, floor: float = 0.0) -> Tensor:
    """
    Weights of the shortest convex combination of the gradients (MGDA), the harmonization of
    [MARBLE](https://huggingface.co/papers/2605.06507):

    `alpha = argmin 1/2 a^T (G + eps I) a  subject to  sum(a) = 1, a >= floor`

    With `floor = 0` the direction `d = sum_k alpha_k g_k` conflicts with no gradient, `<d, g_k> >= |d|^2`, up to
    `eps`, which is 1e-8 of the largest entry of `G`, so that the weights do not depend on the scale of `G`. With a
    positive floor there is no such guarantee.

    Args:
        gram (`torch.Tensor` of shape `(K, K)`, or anything `torch.as_tensor` takes):
            Inner products of the gradients, `G[k, l] = <g_k, g_l>`. May be singular, or all 0 (equal weights then).
        floor (`float`, *optional*, defaults to `0.0`):
            The smallest weight, in `[0, 1 / K]`.

    Returns:
        `torch.Tensor` of shape `(K,)`, at least `floor`, with sum 1, on the device and in the dtype of `gram`.

    Raises:
        `ValueError`: if `gram` is not square, not finite, not symmetric, or has a negative eigenvalue (beyond
        rounding), or if `floor` is out of range.
    """
    gram = _as_float_tensor(gram)
    matrix = _checked_gram(gram)
    size = len(matrix)
    if not 0 <= floor <= 1 / size:
        raise ValueError(f"floor must be in [0, 1/K] = [0, {1 / size:.6g}] for K = {size} gradients, got {floor}.")

    scale = np.abs(matrix).max()
    if scale == 0 or 1 - size * floor < 1e-9:
        return torch.full((size,), 1 / size, dtype=gram.dtype, device=gram.device)
    matrix = _nearest_positive_semidefinite(matrix / scale) + _RIDGE * np.eye(size)
    constraints = np.concatenate([np.ones((size, 1)), np.eye(size)], axis=1)
    bounds = np.concatenate([[1.0], np.full(size, floor)])
    solution = quadprog.solve_qp(matrix, np.zeros(size), constraints, bounds, 1)[0]
    # The solver fulfils its constraints up to rounding only: set weights at the floor exactly to it.
    spread = 1 - size * floor
    excess = np.where(solution - floor < _NEGLIGIBLE * spread, 0.0, solution - floor)
    solution = floor + excess * spread / excess.sum()
    return torch.as_tensor(solution, dtype=gram.dtype, device=gram.device)


def equal_weights(gram: Any) -> Tensor:
    """
    The same weight for every gradient.

    Args:
        gram (`torch.Tensor` of shape `(K, K)`, or anything `torch.as_tensor` takes):
            Inner products of the gradients; only its size matters.

    Returns:
        `torch.Tensor` of shape `(K,)` filled with `1 / K`.

    Raises:
        `ValueError`: as [`mgda_weights`] for a malformed `gram`.
    """
    gram = _as_float_tensor(gram)
    size = len(_checked_gram(gram))
    return torch.full((size,), 1 / size, dtype=gram.dtype, device=gram.device)


WEIGHTINGS: dict[str, Weighting] = {"mgda": mgda_weights, "equal": equal_weights}


def get_weighting(weighting: str | Weighting | None = None) -> Weighting:
    """
    Find a weighting by its name.

    Args:
        weighting (`str`, callable or `None`, *optional*):
            `"mgda"` (which `None` means too), `"equal"`, or any callable from a Gram matrix `(K, K)` to weights
            `(K,)`, such as every Gramian weighting of `torchjd`.

    Returns:
        The callable.

    Raises:
        `ValueError`: for an unknown name.
        `TypeError`: for any other object.
    """
    if weighting is None:
        return mgda_weights
    if isinstance(weighting, str):
        if weighting not in WEIGHTINGS:
            raise ValueError(
                f"Unknown weighting {weighting!r}: use one of {sorted(WEIGHTINGS)}, or pass a callable from a Gram "
                "matrix to weights."
            )
        return WEIGHTINGS[weighting]
    if not callable(weighting):
        raise TypeError(
            f"weighting must be one of {sorted(WEIGHTINGS)}, a callable or None, got {type(weighting).__name__}."
        )
    return weighting


def _as_float_tensor(gram: Any) -> Tensor:
    gram = torch.as_tensor(gram).detach()
    return gram if gram.is_floating_point() else gram.to(torch.get_default_dtype())


def _checked_gram(gram: Tensor) -> np.ndarray:
    """Check a Gram matrix, and return it exactly symmetric in float64."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"A Gram matrix is square and not empty, got shape {tuple(gram.shape)}.")
    matrix = gram.cpu().double().numpy()
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0].tolist()
        raise ValueError(
            f"The Gram matrix is not finite: entry ({row}, {column}) is {matrix[row, column]}. Check the gradients "
            f"of rewards {row} and {column}."
        )
    asymmetry = np.abs(matrix - matrix.T)
    if asymmetry.max() > _SYMMETRY_TOLERANCE * np.abs(matrix).max():
        row, column = np.unravel_index(asymmetry.argmax(), matrix.shape)
        raise ValueError(
            f"The Gram matrix is not symmetric: entry ({row}, {column}) is {matrix[row, column]}, entry ({column}, "
            f"{row}) is {matrix[column, row]}. Pass the inner products of the gradients with each other."
        )
    return (matrix + matrix.T) / 2


def _nearest_positive_semidefinite(matrix: np.ndarray) -> np.ndarray:
    """Remove the slightly negative eigenvalues that rounding gives a matrix with entries of at most 1."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    if eigenvalues[0] >= 0:
        return matrix
    if eigenvalues[0] < -_EIGENVALUE_TOLERANCE:
        raise ValueError(
            f"The Gram matrix has an eigenvalue of {eigenvalues[0]:.3g} times its largest entry, so it is not a "
            "matrix of inner products. Compute it as M @ M.T from the gradients M, in float32 or better."
        )
    clipped = (vectors * eigenvalues.clip(min=0)) @ vectors.T
    return (clipped + clipped.T) / 2
