# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How much other held-out prompts would change the worst and the mean gain of compared runs. Pure functions of arrays.

The worst gain is a minimum, which has no error of a mean: errors are those of a jackknife that leaves out one prompt
after the other, with all of its images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trl_marble.evaluation.gains import differences_in_deviations


class PromptGains(NamedTuple):
    """
    The gains of one run, by reward and prompt.

    Args:
        totals (`np.ndarray` of shape `[K, G]`):
            Sums over the images of each prompt that the reward applies to, in standard deviations of the base's
            images.
        counts (`np.ndarray` of shape `[K, G]`):
            Their numbers.
    """

    totals: np.ndarray
    counts: np.ndarray


def sum_by_prompt(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], groups: np.ndarray
) -> PromptGains:
    """
    The gains of images over a baseline's images of the same prompts and seeds.

    Args:
        before (`Mapping[str, np.ndarray]`):
            Reward name -> rewards of the baseline's N images; NaN where there is none. They are not all the same.
        after (`Mapping[str, np.ndarray]`):
            The same for the other images.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each pair, numbered from 0 on.
    """
    size = int(groups.max()) + 1
    totals, counts = [], []
    for gains in differences_in_deviations(before, after).values():
        known = ~np.isnan(gains)
        totals.append(np.bincount(groups[known], gains[known], size))
        counts.append(np.bincount(groups[known], minlength=size))
    return PromptGains(np.array(totals), np.array(counts))


def leave_out_each_prompt(runs: Sequence[PromptGains]) -> np.ndarray:
    """
    The worst and the mean gain without each of the prompts, mean over runs.

    Args:
        runs (`Sequence[PromptGains]`):
            Of all seeds.

    Returns:
        `np.ndarray` of shape `[2, G]`: NaN without the only prompt of a reward.
    """
    found = []
    for totals, counts in runs:
        rest = counts.sum(axis=1, keepdims=True) - counts
        gains = (totals.sum(axis=1, keepdims=True) - totals) / np.where(rest == 0, math.nan, rest)
        found.append([gains.min(axis=0), gains.mean(axis=0)])
    return np.mean(found, axis=0)


def jackknife_error(values: np.ndarray) -> float:
    """
    The standard error of what was computed without each of G prompts.

    Args:
        values (`np.ndarray` of shape `[G]`):
            One value for each prompt that was left out.
    """
    size = len(values)
    return math.sqrt((size - 1) / size * float(np.square(values - values.mean()).sum()))
