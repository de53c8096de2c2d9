# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Means, standard errors and tests of scored images, where the images of one prompt are not independent."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest


class WinCount(NamedTuple):
    """
    How often the second of two pipelines made the better image of a pair.

    Args:
        wins (`int`):
            Pairs in which the second image has the higher reward.
        ties (`int`):
            Pairs with equal rewards.
        losses (`int`):
            Pairs in which the second image has the lower reward.
        win_rate (`float`):
            (wins + ties / 2) / pairs, in [0, 1]; NaN without pairs.
        prompts_up (`int`):
            Prompts whose mean difference is positive.
        prompts_down (`int`):
            Prompts whose mean difference is negative.
        p_value (`float`):
            Of the two-sided sign test over prompts, in (0, 1]; NaN where no prompt changed.
    """

    wins: int
    ties: int
    losses: int
    win_rate: float
    prompts_up: int
    prompts_down: int
    p_value: float


@dataclass(frozen=True)
class JointGain:
    """
    On how many prompts all rewards went the same way.

    Args:
        gain (`float`):
            The share of the prompts, in [0, 1], on which all rewards that apply rose; NaN without prompts.
        gain_error (`float`):
            Its standard error over prompts; NaN with fewer than two.
        fall (`float`):
            The share on which all rewards that apply fell.
        fall_error (`float`):
            Its standard error.
        num_prompts (`int`):
            The prompts that any reward applies to.
    """

    gain: float
    gain_error: float
    fall: float
    fall_error: float
    num_prompts: int


def number_prompts(prompts: Sequence[str], rows: Sequence[int], edits_images: bool = False) -> np.ndarray:
    """
    The number of each image's prompt, by which standard errors are taken.

    Rows of a prompt set with the same text are one prompt: their images are no more independent than those of one row.
    Where images are edited, each row has an image of its own, and the same instruction for another image is another
    prompt.

    Args:
        prompts (`Sequence[str]`):
            The text of each of the N images.
        rows (`Sequence[int]`):
            The row of the prompt set that each image belongs to.
        edits_images (`bool`, *optional*, defaults to `False`):
            Whether the prompts are instructions to edit images.

    Returns:
        `np.ndarray` of shape `[N]`, integers: numbered from 0 on in the order in which the prompts first come.
    """
    return pd.factorize(pd.Series(rows if edits_images else prompts))[0]


def clustered_mean(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    r"""
    The mean over all images, and its standard error over prompts.

    With $n_g$ valid images of prompt g, their mean $\bar x_g$, $N = \sum_g n_g$ and G prompts that have a valid image,

        mean = (1 / N) sum_g n_g x̄_g
        standard error = sqrt(G / (G - 1) * sum_g (n_g (x̄_g - mean))^2) / N

    which is the cluster-robust standard error of a mean. Where every prompt has the same number of valid images it is
    the standard deviation of the prompts' means divided by sqrt(G).

    Args:
        values (`np.ndarray` of shape `[N]`):
            One value per image; NaN where there is none.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each image.

    Returns:
        `tuple[float, float]`: mean and standard error, in the unit of the values. Both are NaN without a valid value;
        the error is NaN with only one prompt that has any.
    """
    totals, counts, mean = _group_totals(values, groups)
    if len(counts) < 2:
        return mean, math.nan
    spread = np.square(totals - counts * mean).sum() * len(counts) / (len(counts) - 1)
    return mean, math.sqrt(spread) / int(counts.sum())


def count_wins(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> WinCount:
    """
    Count which image of each pair is the better one, and test whether the prompts went one way.

    The images of one prompt are not independent, so the sign test has one vote per prompt: the sign of its mean
    difference. Prompts with a mean difference of exactly 0 have none.

    Args:
        before (`np.ndarray` of shape `[N]`):
            Rewards of the first pipeline's images; NaN where there is none.
        after (`np.ndarray` of shape `[N]`):
            Rewards of the second pipeline's images of the same prompts and seeds.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each pair.

    Returns:
        [`WinCount`]: over the pairs in which both images have a reward.
    """
    difference = after - before
    wins, losses, ties = (int(count.sum()) for count in (difference > 0, difference < 0, difference == 0))
    pairs = wins + ties + losses
    totals, _, _ = _group_totals(difference, groups)
    up, down = int((totals > 0).sum()), int((totals < 0).sum())
    return WinCount(
        wins=wins,
        ties=ties,
        losses=losses,
        win_rate=(wins + ties / 2) / pairs if pairs else math.nan,
        prompts_up=up,
        prompts_down=down,
        p_value=float(binomtest(up, up + down).pvalue) if up + down else math.nan,
    )


def joint_gain(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> JointGain:
    """
    The share of prompts on which all rewards rose together, the joint domination rate of PG-OT
    (https://huggingface.co/papers/2605.13155). Means over prompts hide where one reward is paid for with another.

    A reward rose on a prompt if its mean over the pairs of the prompt's images is greater after than before. A reward
    that applies to no pair of a prompt has no say in it.

    Args:
        before (`np.ndarray` of shape `[K, N]`):
            The rewards of the baseline's images; NaN where there is none.
        after (`np.ndarray` of shape `[K, N]`):
            Those of other images of the same prompts and seeds.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each pair.

    Returns:
        [`JointGain`]

    Raises:
        `ValueError`: the shapes do not fit.
    """
    before, after, groups = np.asarray(before, dtype=float), np.asarray(after, dtype=float), np.asarray(groups)
    if before.shape != after.shape or before.shape[1:] != groups.shape:
        raise ValueError(
            f"The rewards before have shape {before.shape}, those after {after.shape}, and there are {len(groups)} "
            "groups; pass the same rewards of the same images, and the group of each image."
        )
    change = after - before
    valid = ~np.isnan(change)
    _, place = np.unique(groups, return_inverse=True)
    # By sums: a mean has the sign of its sum.
    sums = np.array([np.bincount(place, weights=row) for row in np.where(valid, change, 0.0)])
    applies = np.array([np.bincount(place, weights=row) for row in valid]) > 0
    counts = applies.any(axis=0)
    together = [np.all(np.logical_or(went, ~applies), axis=0)[counts].astype(float) for went in (sums > 0, sums < 0)]
    shares = [clustered_mean(prompts, np.arange(len(prompts))) for prompts in together]
    return JointGain(*shares[0], *shares[1], int(counts.sum()))


def clustered_mean_of_means(rows: Sequence[np.ndarray], groups: np.ndarray) -> tuple[float, float]:
    """
    The mean over several measures' means of the same images, and its standard error over prompts.

    Args:
        rows (`Sequence[np.ndarray]`, each of shape `[N]`):
            The values of each measure, which need not have them for the same images; NaN where there is none.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each image.

    Returns:
        `tuple[float, float]`: the mean, and its cluster-robust error, which is that of [`clustered_mean`] for one
        measure; NaN for the error with fewer than two prompts.
    """
    _, place = np.unique(groups, return_inverse=True)
    influence, means = np.zeros(place.max() + 1), []
    for row in rows:
        valid = ~np.isnan(row)
        means.append(float(row[valid].mean()))
        influence += np.bincount(place[valid], weights=row[valid] - means[-1], minlength=len(influence)) / valid.sum()
    num_groups = len(np.unique(place[~np.isnan(np.array(rows)).all(axis=0)]))
    if num_groups < 2:
        return float(np.mean(means)), math.nan
    spread = np.square(influence / len(rows)).sum() * num_groups / (num_groups - 1)
    return float(np.mean(means)), math.sqrt(spread)


def composite_scores(means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """
    One number for each of several pipelines, as in MARBLE (https://huggingface.co/papers/2605.06507).

    The means of one reward over all pipelines are turned into z-scores, (mean - mean over the pipelines) / standard
    deviation over the pipelines (that of the population), 0 where all pipelines are equal. The composite score of a
    pipeline is the mean of its z-scores. It ranks *these* pipelines and depends on which they are; with two of them
    every z-score is -1, 0 or 1.

    Args:
        means (`Mapping[str, Mapping[str, float]]`):
            Pipeline -> reward name -> mean reward.

    Returns:
        `dict[str, float]`: pipeline -> composite score, 0 on average. Rewards that have no mean (NaN) in one of the
        pipelines take no part; NaN where none is left.
    """
    table = np.array([list(row.values()) for row in means.values()], dtype=float)
    table = table[:, np.isfinite(table).all(axis=0)]
    spread = table.std(axis=0)
    # Equal means have a spread of exactly 0 or of a rounding.
    equal = np.ptp(table, axis=0) <= 1e-12 * np.abs(table).max(axis=0, initial=0.0)
    scores = np.where(equal, 0.0, (table - table.mean(axis=0)) / np.where(equal, 1.0, spread))
    return {name: float(row.mean()) if len(row) else math.nan for name, row in zip(means, scores, strict=True)}


def _group_totals(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Sum and number of the valid values of each group that has any, and the mean of all."""
    values, groups = np.asarray(values, dtype=float), np.asarray(groups)
    if values.shape != groups.shape:
        raise ValueError(f"There are {len(values)} values for {len(groups)} groups; pass the group of each value.")
    valid = ~np.isnan(values)
    if not valid.any():
        return np.empty(0), np.empty(0), math.nan
    _, place = np.unique(groups[valid], return_inverse=True)
    totals = np.bincount(place, weights=values[valid])
    counts = np.bincount(place)
    return totals, counts, float(values[valid].mean())
