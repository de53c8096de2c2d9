# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Gains of rewards against the KL that they were paid with: of an evaluation, of a run, and at a given KL."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import clustered_mean, clustered_mean_of_means, joint_gain


Measured = tuple[float, float]
"""A mean and its standard error over prompts."""

_NOT_MEASURED: Measured = (math.nan, math.nan)


@dataclass(frozen=True)
class GainPoint:
    """
    How far the rewards came, and how far the policy drifted from the base model meanwhile.

    Each value is a pair: the value and its standard error over prompts; NaN where it is not known.

    Args:
        kl (`tuple[float, float]`):
            KL to the base model, the mean of `(v - v_base)^2`, see [`EvaluationResults.kl_to_base`].
        gains (`dict[str, tuple[float, float]]`):
            Reward name -> its mean minus the baseline's, in standard deviations of the reward over the baseline's
            images. NaN for a reward that applies to no image, or is the same for all of the baseline's images.
        worst (`tuple[float, float]`):
            The smallest gain. A minimum of noisy numbers is a little too low, the more so the more rewards there are.
            This and the following are of the rewards that are trained on, where others are held out.
        mean (`tuple[float, float]`):
            The mean over the rewards' gains.
        joint_gain (`tuple[float, float]`):
            The share of the prompts, in [0, 1], on which all rewards that apply rose, see [`joint_gain`].
        joint_fall (`tuple[float, float]`):
            The share on which all of them fell.
        step (`int`, *optional*):
            The optimizer step of a run's evaluation.
    """

    kl: Measured
    gains: dict[str, Measured]
    worst: Measured
    mean: Measured
    joint_gain: Measured = _NOT_MEASURED
    joint_fall: Measured = _NOT_MEASURED
    step: int | None = None

    def numbers(self) -> dict[str, Any]:
        """The point ready for JSON."""

        def named(value: Measured) -> dict[str, float]:
            return {"mean": value[0], "standard_error": value[1]}

        step = {} if self.step is None else {"step": self.step}
        pairs = {name: named(getattr(self, name)) for name in ("kl", "worst", "mean", "joint_gain", "joint_fall")}
        return step | pairs | {"gains": {name: named(gain) for name, gain in self.gains.items()}}


def differences_in_deviations(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """
    The gain of each image in standard deviations of the baseline's images.

    Args:
        before (`Mapping[str, np.ndarray]`):
            Reward name -> rewards of the baseline's N images; NaN where there is none.
        after (`Mapping[str, np.ndarray]`):
            The same for other images of the same prompts and seeds.

    Returns:
        `dict[str, np.ndarray]`: reward name -> N numbers, all of them NaN for a reward that applies to no image, or is
        the same for all of the baseline's images.
    """
    scaled = {}
    for name, values in before.items():
        valid = values[~np.isnan(values)]
        # By the range: the deviation of equal numbers may be that of a rounding.
        deviation = valid.std() if len(valid) and np.ptp(valid) > 0 else 0.0
        difference = np.asarray(after[name], dtype=float) - values
        scaled[name] = difference / deviation if deviation > 0 else np.full(len(values), math.nan)
    return scaled


def gains_in_deviations(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], groups: np.ndarray
) -> tuple[dict[str, Measured], Measured, Measured]:
    """
    Gains of rewards in standard deviations of the baseline's images, with which rewards of any scale can be compared.

    Args:
        before (`Mapping[str, np.ndarray]`):
            Reward name -> rewards of the baseline's N images; NaN where there is none.
        after (`Mapping[str, np.ndarray]`):
            The same for other images of the same prompts and seeds.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each pair.

    Returns:
        `tuple`: the gains by reward, the worst and the mean gain, see [`GainPoint`]. The standard deviation counts as
        a constant in the errors; that of the mean knows that the rewards of one image are not independent.
    """
    scaled = differences_in_deviations(before, after)
    gains = {name: clustered_mean(values, groups) for name, values in scaled.items()}
    measured = [scaled[name] for name, (gain, _) in gains.items() if not math.isnan(gain)]
    if not measured:
        return gains, _NOT_MEASURED, _NOT_MEASURED
    return gains, _worst(gains), clustered_mean_of_means(measured, groups)


def measure_gains(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    groups: np.ndarray,
    kl: Measured,
    held_out: Collection[str] = (),
) -> GainPoint:
    """
    The gains of images over a baseline's images of the same prompts and seeds.

    Args:
        before (`Mapping[str, np.ndarray]`):
            Reward name -> rewards of the baseline's N images; NaN where there is none.
        after (`Mapping[str, np.ndarray]`):
            The same for the other images.
        groups (`np.ndarray` of shape `[N]`, integers):
            The prompt of each pair.
        kl (`tuple[float, float]`):
            KL of the other images' policy to the base model, and its standard error.
        held_out (`Collection[str]`, *optional*, defaults to `()`):
            Rewards that have a gain and do not count in what is said of all rewards together.
    """
    gains, _, _ = gains_in_deviations(before, after, groups)
    counted = {name: values * math.nan if name in held_out else values for name, values in before.items()}
    _, worst, mean = gains_in_deviations(counted, after, groups)
    shape = len(before), len(groups)  # also of no rewards at all
    first, second = (np.reshape([rewards[name] for name in before], shape) for rewards in (counted, after))
    joint = joint_gain(first, second, groups)
    return GainPoint(kl, gains, worst, mean, (joint.gain, joint.gain_error), (joint.fall, joint.fall_error))


def run_gains(history: Sequence[Mapping[str, Any]], deviations: Mapping[str, float] | None = None) -> list[GainPoint]:
    """
    The evaluations of a run as gains against KL, with the first one as the base.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`. Used are `eval_kl`, `eval_gain/<reward>/...`, `eval_gain_worst`,
            `eval_gain_mean`, `eval_joint_gain` and `eval_joint_fall`, each with its standard error.
        deviations (`Mapping[str, float]`, *optional*):
            Reward name -> standard deviation over the base's images, for a log with means and without gains. The
            errors are then those of two separate means, and upper limits, since the log has no pairs of images.

    Returns:
        `list[GainPoint]`: in the order of the steps, the first of them with gains of 0; empty if the run was not
        evaluated before its first step (`eval_on_start=True`), or its evaluations have no KL.
    """
    needed = "eval_gain_worst" if deviations is None else "eval_kl"
    # The latest of several evaluations at one step.
    rows = {row["step"]: row for row in history if "eval_kl" in row and needed in row}
    if 0 not in rows:
        return []
    ordered = [rows[step] for step in sorted(rows)]
    if deviations is None:
        return [_logged_point(row) for row in ordered]
    return [_point_of_means(rows[0], row, deviations) for row in ordered]


def _logged_point(row: Mapping[str, Any]) -> GainPoint:
    def pair(name: str) -> Measured:
        return row[f"eval_{name}"], row[f"eval_{name}_standard_error"]

    names = [match[1] for key in row if (match := re.fullmatch(r"eval_gain/(.+)/mean", key))]
    return GainPoint(
        kl=pair("kl"),
        gains={name: (row[f"eval_gain/{name}/mean"], row[f"eval_gain/{name}/standard_error"]) for name in names},
        worst=pair("gain_worst"),
        mean=pair("gain_mean"),
        joint_gain=pair("joint_gain"),
        joint_fall=pair("joint_fall"),
        step=row["step"],
    )


def _point_of_means(base: Mapping[str, Any], row: Mapping[str, Any], deviations: Mapping[str, float]) -> GainPoint:
    gains: dict[str, Measured] = {}
    for name, deviation in deviations.items():
        key = f"eval_rewards/{name}"
        gain = (row[f"{key}/mean"] - base[f"{key}/mean"]) / deviation
        errors = [each[f"{key}/standard_error"] / deviation for each in (base, row)]
        gains[name] = gain, 0.0 if row is base else math.hypot(*errors)
    measured = np.array([gain for gain in gains.values() if not math.isnan(gain[0])])
    # Errors of rewards of the same images: at most all of them go one way.
    mean = (float(measured[:, 0].mean()), float(measured[:, 1].mean())) if len(measured) else _NOT_MEASURED
    return GainPoint((row["eval_kl"], math.nan), gains, _worst(gains), mean, step=row["step"])


def _worst(gains: Mapping[str, Measured]) -> Measured:
    """The smallest gain that is known."""
    return min((gain for gain in gains.values() if not math.isnan(gain[0])), default=_NOT_MEASURED)


def gains_at_kl(points: Sequence[GainPoint], kl: float) -> GainPoint | None:
    """
    What a run had gained where its policy was a given KL away from the base model. Runs can be compared by it, which
    drift differently far at equal settings.

    Args:
        points (`Sequence[GainPoint]`):
            The evaluations of a run in the order of their steps, see [`run_gains`].
        kl (`float`):
            The KL, not negative.

    Returns:
        [`GainPoint`]: all numbers are interpolated linearly in KL between the two evaluations that it lies between,
        see [`interpolate_at_kl`]; errors too, which makes them upper limits. `None` if the run was never so far from
        the base, or never so near.
    """
    kls = [point.kl[0] for point in points]
    if interpolate_at_kl(kls, kls, kl) is None:
        return None

    def at(values: Sequence[Measured]) -> Measured:
        means, errors = (interpolate_at_kl(kls, part, kl) for part in zip(*values, strict=True))
        return math.nan if means is None else means, math.nan if errors is None else errors

    return GainPoint(
        kl=(kl, math.nan),
        gains={name: at([point.gains[name] for point in points]) for name in points[0].gains},
        worst=at([point.worst for point in points]),
        mean=at([point.mean for point in points]),
        joint_gain=at([point.joint_gain for point in points]),
        joint_fall=at([point.joint_fall for point in points]),
    )


def interpolate_at_kl(kls: Sequence[float], values: Sequence[float], kl: float) -> float | None:
    """
    A value of a run's evaluations at a given KL to the base model, linear in KL between two evaluations.

    Args:
        kls (`Sequence[float]`):
            The KL of each evaluation, in the order of the steps. It need not grow: where the run came by several
            times, the last time counts.
        values (`Sequence[float]`):
            The value of each evaluation.
        kl (`float`):
            The KL that is asked for.

    Returns:
        `float`, or `None` where no two consecutive evaluations have the KL between them. NaN if a value that is needed
        is.

    Raises:
        `ValueError`: there is not one value per KL.
    """
    if len(kls) != len(values):
        raise ValueError(f"There are {len(values)} values for {len(kls)} evaluations; pass one value for each.")
    for place in range(len(kls) - 1, -1, -1):
        if kls[place] == kl:
            return float(values[place])
        if place and min(kls[place - 1], kls[place]) < kl < max(kls[place - 1], kls[place]):
            share = (kl - kls[place - 1]) / (kls[place] - kls[place - 1])
            return float((1 - share) * values[place - 1] + share * values[place])
    return None


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """
    The log of a run from what it left on disk.

    Args:
        folder (`str` or `Path`):
            The output folder of the run, whose latest checkpoint is read, or one of its checkpoints.

    Returns:
        `list[dict]`: `trainer.state.log_history` at that checkpoint.

    Raises:
        `FileNotFoundError`: there is no `trainer_state.json`.
        `ValueError`: it is damaged.
    """
    folder = Path(folder)
    checkpoints = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    }
    file = folder / "trainer_state.json"
    if not file.is_file():
        if not checkpoints:
            raise FileNotFoundError(f"`{folder}` has no `trainer_state.json` and no checkpoint that has one.")
        file = checkpoints[max(checkpoints)]
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        if not all(isinstance(row, dict) and isinstance(row["step"], int) for row in history):
            raise TypeError("`log_history` is not a list of rows with a `step`")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"`{file}` is damaged ({type(error).__name__}: {error}).") from error
    return history
