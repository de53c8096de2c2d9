# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How far the reward that gained least has come since the first evaluation of a run, and in which evaluation most."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorstGain:
    """
    An evaluation, by the reward that gained least since the first evaluation of the run.

    Args:
        step (`int`):
            Optimizer step of the evaluation.
        reward (`str`):
            The reward that gained least.
        gain (`float`):
            Its gain, in standard deviations between the images of the first evaluation.
    """

    step: int
    reward: str
    gain: float


def reward_gains(
    first: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str], prefix: str = "eval"
) -> dict[str, float]:
    """
    The gains of rewards between two evaluations, in units in which rewards can be compared.

    The unit is the standard deviation between the images of the first evaluation. Unlike the standard error of the
    mean it does not depend on how many prompts are evaluated, so the gains of runs with other evaluations can be
    compared. A reward that scored all those images alike has none; then it is that of the later evaluation.

    Args:
        first (`Mapping[str, Any]`):
            What the earlier evaluation has logged.
        now (`Mapping[str, Any]`):
            The same of the later one, on the same prompts and seeds.
        names (`Sequence[str]`):
            The rewards.
        prefix (`str`, *optional*, defaults to `"eval"`):
            What the metrics' names begin with.

    Returns:
        `dict[str, float]`: Reward name -> gain; NaN where a reward was not measured, or has no unit.
    """
    gains = {}
    for name in names:
        key = f"{prefix}_rewards/{name}"
        change = now.get(f"{key}/mean", math.nan) - first.get(f"{key}/mean", math.nan)
        units = [row.get(f"{key}/std", math.nan) for row in (first, now)]
        unit = next((value for value in units if value > 0), math.nan)
        gains[name] = 0.0 if change == 0 else change / unit
    return gains


def worst_gain(gains: Mapping[str, float], step: int) -> WorstGain | None:
    """
    The least of the gains of an evaluation.

    Args:
        gains (`Mapping[str, float]`):
            See [`reward_gains`]. Those that are NaN take no part.
        step (`int`):
            The evaluation's optimizer step.

    Returns:
        [`WorstGain`], or `None` where no gain was measured.
    """
    measured = {name: gain for name, gain in gains.items() if not math.isnan(gain)}
    if not measured:
        return None
    name = min(measured, key=measured.__getitem__)
    return WorstGain(step, name, measured[name])


def is_evaluation(row: Mapping[str, Any], prefix: str = "eval") -> bool:
    """Whether a row of a log is that of an evaluation."""
    return any(key.startswith(f"{prefix}_rewards/") for key in row)


def worst_gains(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[WorstGain]:
    """
    The worst gain of each evaluation of a run but the first, to which they are compared.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        names (`Sequence[str]`):
            The rewards that are trained on.
    """
    first, *later = [row for row in history if is_evaluation(row)] or [{}]
    found = [worst_gain(reward_gains(first, row, names), row["step"]) for row in later]
    return [each for each in found if each is not None]


def best_evaluation(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> WorstGain | None:
    """
    The evaluation with the best worst gain.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        names (`Sequence[str]`):
            The rewards that are trained on.

    Returns:
        [`WorstGain`]: Never the first evaluation, which is that of the base model with `eval_on_start=True`; the
        earlier one of two equal ones. `None` where nothing was measured after it.
    """
    return max(worst_gains(history, names), key=lambda each: each.gain, default=None)
