# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which reward gained least in each evaluation of a run, and in which evaluation that gain was largest."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorstGain:
    """
    An evaluation, by the reward that gained least since the evaluation before the first step.

    Args:
        step (`int`):
            Optimizer step of the evaluation.
        reward (`str`):
            The reward that gained least.
        gain (`float`):
            Its gain, in standard deviations of the reward over the images of the evaluation before the first step.
    """

    step: int
    reward: str
    gain: float


def worst_gains(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[WorstGain]:
    """
    The worst gain of each evaluation of a run after the first step.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `eval_gain/<reward>/mean`; those that are NaN take no part.
        names (`Sequence[str]`):
            The rewards that are trained on.
    """
    found = []
    for row in history:
        gains = {name: row.get(f"eval_gain/{name}/mean", math.nan) for name in names}
        known = [name for name in names if not math.isnan(gains[name])]
        if known and row["step"] > 0:
            worst = min(known, key=gains.__getitem__)
            found.append(WorstGain(row["step"], worst, gains[worst]))
    return found


def best_evaluation(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> WorstGain | None:
    """
    The evaluation with the best worst gain.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `eval_gain/<reward>/mean`.
        names (`Sequence[str]`):
            The rewards that are trained on.

    Returns:
        [`WorstGain`]: Never that of the base model; the earlier one of two equal ones. `None` where no gain was
        measured, as without an evaluation before the first step (`eval_on_start=True`).
    """
    return max(worst_gains(history, names), key=lambda each: each.gain, default=None)
