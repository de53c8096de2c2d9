# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Statistics of the comparison, from the change of each reward for each seed. Pure functions of arrays.

There are two standard errors. The one over seeds measures how much another training would differ, on the same held-out
prompts. The one over prompts measures how much other held-out prompts would change the mean of these trainings.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trl_marble.evaluation import clustered_mean
from trl_marble.evaluation.summary import SIGNIFICANT


class Estimate(NamedTuple):
    """
    A mean over seeds.

    Args:
        mean (`float`):
            In the unit of the values.
        seed_error (`float`):
            Its standard error over seeds; NaN with one seed.
        prompt_error (`float`, *optional*, defaults to NaN):
            Its standard error over held-out prompts; NaN if it was not computed.
    """

    mean: float
    seed_error: float
    prompt_error: float = math.nan


class WorstReward(NamedTuple):
    """
    The reward with the lowest fraction of its upper bound.

    Args:
        reward (`int` or `None`):
            Its index; `None` if no specialist raised its reward significantly.
        fraction (`float`):
            The method's change of it divided by its specialist's.
        seed_error (`float`):
            Standard error of the fraction over seeds (jackknife); NaN with one seed.
    """

    reward: int | None
    fraction: float
    seed_error: float


class Gap(NamedTuple):
    """
    How much more the rewards changed with one method than with another of the same seeds.

    Args:
        rewards (`list[Estimate]`):
            Of each reward, in its own unit.
        mean ([`Estimate`]):
            The mean over those that the method trains on, each in standard deviations of the reward over the untrained
            pipeline's images.
    """

    rewards: list[Estimate]
    mean: Estimate


def mean_over_seeds(values: np.ndarray) -> Estimate:
    """
    Mean and standard error over seeds.

    Args:
        values (`np.ndarray` of shape `[S]`):
            One value per seed.
    """
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


def mean_change(differences: np.ndarray, groups: np.ndarray) -> Estimate:
    """
    The change of one reward with both standard errors.

    Args:
        differences (`np.ndarray` of shape `[S, N]`):
            Reward of each held-out image after a training minus that of the untrained pipeline's image of the same
            prompt and noise, for each seed; NaN where the reward does not apply (the same images for all seeds).
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each image.
    """
    _, prompt_error = clustered_mean(differences.mean(axis=0), groups)
    return mean_over_seeds(_seed_means(differences, groups))._replace(prompt_error=prompt_error)


def _seed_means(differences: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.array([clustered_mean(row, groups)[0] for row in differences])


def compare_changes(differences: np.ndarray, groups: np.ndarray, spreads: np.ndarray, trained: Sequence[int]) -> Gap:
    """
    How much more the rewards changed with one method than with another. Runs of one seed share their prompts and the
    noise of their images, so they are compared with each other.

    Args:
        differences (`np.ndarray` of shape `[S, N, K]`):
            Reward of each held-out image after the one training minus that after the other.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each image.
        spreads (`np.ndarray` of shape `[K]`):
            Standard deviation of each reward over the untrained pipeline's images. Where it is 0 (all of them have the
            same reward) the difference counts in the reward's own unit.
        trained (`Sequence[int]`):
            The indices of the rewards that count in the mean.
    """
    columns = np.moveaxis(differences, 2, 0)
    means = np.stack([_seed_means(column, groups) for column in columns], axis=1)
    units = np.where(spreads == 0, 1, spreads)
    mean = mean_over_seeds((means / units)[:, trained].mean(axis=1))
    return Gap([mean_change(column, groups) for column in columns], mean)


def composites(changes: np.ndarray) -> list[Estimate]:
    """
    The composite score of each method as in MARBLE (https://huggingface.co/papers/2605.06507), with its spread.

    The z-scores of a reward use the mean and the standard deviation over the methods of the changes averaged over
    seeds; a method's score is the mean of its z-scores. A change is a mean reward minus the same number for all
    methods, so its z-scores are those of the mean rewards, and the scores equal those of
    [`~trl_marble.evaluation.composite_scores`]. The error over seeds is that of the difference to the mean over the
    methods of the same seed: an effect of the seed that is common to all methods does not change their order.

    Args:
        changes (`np.ndarray` of shape `[M, S, K]`):
            Of M methods, S seeds and K rewards.
    """
    averages = changes.mean(axis=1)
    spread = averages.std(axis=0)
    equal = np.ptp(averages, axis=0) <= 1e-12 * np.abs(averages).max(axis=0)
    scores = np.where(equal, 0.0, (changes - changes.mean(axis=0)) / np.where(equal, 1.0, spread))
    return [mean_over_seeds(row) for row in scores.mean(axis=2)]


def upper_bound_is_known(specialist: Estimate) -> bool:
    """
    Whether a specialist raised its reward by at least two standard errors, both over seeds and over prompts. Otherwise
    its change is no bound to divide by.
    """
    errors = [error for error in (specialist.seed_error, specialist.prompt_error) if not math.isnan(error)]
    return specialist.mean > 0 and all(specialist.mean >= SIGNIFICANT * error for error in errors)


def reached_fractions(changes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """
    How much of the upper bound a method reached: its mean change over seeds divided by that of the specialist.

    This is the ratio of the means over seeds, not the mean of ratios, which one poor specialist would dominate.

    Args:
        changes (`np.ndarray` of shape `[S, K]`):
            Changes of the method.
        bounds (`np.ndarray` of shape `[S, K]`):
            Of each reward, that of the specialist that trains on it alone; NaN where the bound is not known.

    Returns:
        `np.ndarray` of shape `[K]`: 0 is the untrained pipeline, 1 the specialist; negative where the reward fell, NaN
        where the bound is not known.
    """
    return changes.mean(axis=0) / bounds.mean(axis=0)


def worst_reward(changes: np.ndarray, bounds: np.ndarray) -> WorstReward:
    """
    The lowest fraction of an upper bound that a method reached.

    Rewards differ in how far they can rise with this pipeline and these steps, so the smallest change would usually be
    that of the same reward. The specialist, with the same prompts and steps, shows how far a reward can rise. A
    fraction of 1 means that the reward rose as far as if trained alone.

    Args:
        changes (`np.ndarray` of shape `[S, K]`):
            Of the method, for the rewards that it trains on.
        bounds (`np.ndarray` of shape `[S, K]`):
            See [`reached_fractions`].
    """
    fractions = reached_fractions(changes, bounds)
    if np.isnan(fractions).all():
        return WorstReward(None, math.nan, math.nan)
    place = int(np.nanargmin(fractions))
    seeds = len(changes)
    if seeds < 2:
        return WorstReward(place, float(fractions[place]), math.nan)
    # Without one of the seeds another reward may be the worst: the error includes that.
    kept = [np.arange(seeds) != left_out for left_out in range(seeds)]
    least = np.array([np.nanmin(reached_fractions(changes[k], bounds[k])) for k in kept])
    error = math.sqrt((seeds - 1) / seeds * float(np.square(least - least.mean()).sum()))
    return WorstReward(place, float(fractions[place]), error)


class Gain(NamedTuple):
    """
    The criterion for learning rates: changes of the rewards that a method trains on, each in standard deviations.

    Args:
        mean (`float`):
            Over the rewards.
        least (`float`):
            That of the reward that changed least.
    """

    mean: float
    least: float


def gain(changes: Mapping[str, float], spreads: Mapping[str, float]) -> Gain:
    """
    Mean and least change of the rewards in standard deviations.

    Args:
        changes (`Mapping[str, float]`):
            Reward -> mean change, for the rewards that the method trains on.
        spreads (`Mapping[str, float]`):
            Reward -> standard deviation over the untrained pipeline's images of the same prompts. Where it is 0 (all
            of them have the same reward) the change counts in the reward's own unit.
    """
    units = [change / (spreads[name] or 1.0) for name, change in changes.items()]
    return Gain(float(np.mean(units)), float(np.min(units)))


def best_rate(gains: Mapping[float, Gain]) -> float:
    """
    The learning rate with the greatest mean gain among those with which no reward fell, or among all if some reward
    always fell; the smallest of equal ones.

    Args:
        gains (`Mapping[float, Gain]`):
            Learning rate -> gain.

    Raises:
        `ValueError`: if no gain is a number.
    """
    known = {rate: value for rate, value in sorted(gains.items()) if not math.isnan(value.mean)}
    if not known:
        raise ValueError(f"No learning rate of {sorted(gains)} has a gain that is a number; look at the runs' scores.")
    without_loss = {rate: value for rate, value in known.items() if value.least >= 0}
    candidates = without_loss or known
    return max(candidates, key=lambda rate: candidates[rate].mean)
