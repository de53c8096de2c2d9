# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scores from comparisons: the Bradley-Terry model."""

import numpy as np


PRECISION = 1e-10
MOST_STEPS = 100


def bradley_terry(wins: np.ndarray, prior: float = 1.0) -> np.ndarray:
    r"""
    The most probable strengths of items that were compared in pairs.

    An item wins against another with the probability `sigmoid(s_i - s_j)`. The strengths have a normal prior with the
    mean 0 and the precision `prior`, so they are finite and unique whatever was compared:

        s = argmax_s  sum_ij wins[i, j] log sigmoid(s_i - s_j)  -  prior / 2 sum_i s_i^2

    Their mean is 0 within each set of items that comparisons connect.

    Args:
        wins (`np.ndarray` of shape `[n, n]`):
            How often item i won against item j. A tie is half a win for both.
        prior (`float`, *optional*, defaults to `1.0`):
            Precision of the prior.

    Returns:
        `np.ndarray` of shape `[n]`: the strengths.

    Raises:
        `ValueError`: If the shape is another, a number of wins is negative or not finite, or `prior` is not positive.
    """
    wins = np.asarray(wins, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1]:
        raise ValueError(f"`wins` has the shape {wins.shape}; it must be [n, n].")
    if not (np.isfinite(wins).all() and (wins >= 0).all()):
        raise ValueError("`wins` has negative numbers or numbers that are not finite.")
    if not (prior > 0 and np.isfinite(prior)):
        raise ValueError(f"`prior` is {prior}; it must be positive.")
    wins = wins - np.diag(np.diag(wins))  # against itself an item says nothing
    games = wins + wins.T
    strengths = np.zeros(len(wins))
    value = _log_posterior(strengths, wins, prior)
    for _ in range(MOST_STEPS):  # Newton's method; the function is strictly concave
        chances = 1 / (1 + np.exp(np.clip(strengths[None, :] - strengths[:, None], -500, 500)))
        gradient = (wins - games * chances).sum(axis=1) - prior * strengths
        if np.abs(gradient).max(initial=0.0) <= PRECISION * max(1.0, games.sum()):
            break
        curvature = games * chances * (1 - chances)
        hessian = np.diag(curvature.sum(axis=1) + prior) - curvature
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while (new := _log_posterior(strengths + size * step, wins, prior)) < value and size > 1e-8:
            size /= 2
        strengths, value = strengths + size * step, new
    return strengths


def _log_posterior(strengths: np.ndarray, wins: np.ndarray, prior: float) -> float:
    lead = strengths[:, None] - strengths[None, :]
    return float(-(wins * np.logaddexp(0.0, -lead)).sum() - prior / 2 * (strengths**2).sum())
