# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the log of a run says of rewards that are bought with others, and of a policy that drifts too far."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..evaluation import best_evaluation, format_value
from ..evaluation.summary import SIGNIFICANT


History = Sequence[Mapping[str, Any]]
Kind = Literal["reward", "cosine", "drift", "velocity", "diversity"]

DIVERSITY, VELOCITY = "drift/diversity", "drift/velocity_rms"
SMOOTHED = 5  # logged steps that a value which changes slowly is averaged over


@dataclass(frozen=True)
class Limits:
    """
    From where on a change is a signal. The defaults come from ShapeWorld, and are not tested on larger models.

    Args:
        threshold (`float`, *optional*, defaults to `2.0`):
            Number of standard errors from which the change between two evaluations is clear.
        step_threshold (`float`, *optional*, defaults to `3.0`):
            The same for means over steps, which are compared more often: with five rewards, 150 steps and cosines of 0
            but for noise, 2.0 would give a signal in two of three runs, 3.0 does in one of ten.
        window (`int`, *optional*, defaults to `20`):
            Number of logged steps that cosines, and rewards without evaluations, are averaged over.
        min_diversity (`float`, *optional*, defaults to `0.7`):
            Fraction of its first value.
        max_drift (`float`, *optional*, defaults to `0.08`):
            KL to the base model (`kl`, `eval_kl`) divided by the mean square of the first step's velocity, so that it
            does not depend on the scale of the latents. In runs of 100 steps on ShapeWorld the worst reward gained .22
            to .37 standard deviations where this ended at .07 or less, and .15 where it ended at .09 or more.
        max_velocity_growth (`float`, *optional*, defaults to `1.25`):
            Root mean square of the velocity divided by that of the first step. On ShapeWorld runs with a KL penalty
            reached 1.12, and those without, which lost two of five rewards, 1.4.
    """

    threshold: float = SIGNIFICANT
    step_threshold: float = 3.0
    window: int = 20
    min_diversity: float = 0.7
    max_drift: float = 0.08
    max_velocity_growth: float = 1.25

    def __post_init__(self) -> None:
        for name in ("threshold", "step_threshold"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; it must be a number of standard errors greater than 0."
                )
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"`window` is {self.window!r}; it must be a number of logged steps of at least 2.")
        if not 0 <= self.min_diversity < 1:
            raise ValueError(
                f"`min_diversity` is {self.min_diversity}; it must be a fraction in [0, 1) of the first value, 0 for "
                "none."
            )
        if not self.max_drift > 0:
            raise ValueError(f"`max_drift` is {self.max_drift}; it must be above 0, infinity for no limit.")
        if not self.max_velocity_growth > 1:
            raise ValueError(
                f"`max_velocity_growth` is {self.max_velocity_growth}; it must be above 1, infinity for no limit."
            )


@dataclass(frozen=True)
class HackingSignal:
    """
    A sign that a run buys some rewards with others, or drifts too far from its base model.

    Args:
        kind (`str`):
            `"reward"` (one fell while a trained one rose), `"cosine"` (updates go against one), `"drift"` (the KL),
            `"velocity"` (its growth) or `"diversity"`.
        reward (`str`, *optional*):
            The reward that it is about.
        message (`str`):
            What changed, and by how much.
    """

    kind: Kind
    reward: str | None
    message: str

    @property
    def is_damage(self) -> bool:
        """Whether something was lost, and not only put at risk."""
        return self.kind in ("reward", "diversity")


class _Change(NamedTuple):
    """The change of a mean: both values, and the difference in its standard errors."""

    before: float
    now: float
    in_errors: float

    def describe(self, name: str) -> str:
        verb = "rose" if self.now > self.before else "fell"
        values = f"{format_value(self.before)} to {format_value(self.now)}"
        return f"`{name}` {verb} from {values} ({self.in_errors:+.1f} standard errors)"


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row of a log is that of an evaluation, of all prompt sets together."""
    return any(key.startswith("eval_rewards/") for key in row)


def _has_gains(row: Mapping[str, Any]) -> bool:
    """
    Whether the same images were evaluated before the first step. In a run that has such evaluations, those without
    gains are of others: it was resumed with another `eval_dataset`, or other settings of evaluations.
    """
    return any(key.startswith("eval_gain/") for key in row)


def find_signals(
    history: History, names: Sequence[str], held_out_names: Sequence[str], limits: Limits
) -> list[HackingSignal]:
    """
    What the latest row of a log says, in the light of those before it.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history` up to a row. What it lacks gives no signal.
        names (`Sequence[str]`):
            The rewards that are trained on.
        held_out_names (`Sequence[str]`):
            Those that are not.
        limits ([`Limits`]):
            From where on a change is a signal.

    Returns:
        `list[HackingSignal]`: Empty where the row is of neither an evaluation nor a step.
    """
    if history and is_evaluation(history[-1]):
        return _find_in_evaluation(history, names, held_out_names, limits)
    if history and "loss" in history[-1]:
        return _find_in_steps(history, names, limits)
    return []


def last_good_step(history: History, names: Sequence[str], limits: Limits) -> int:
    """
    The step to go back to: that of the best evaluation before the latest row, or of the latest one if none has gains
    (`eval_on_start=False`); without any, that before the window of steps which the latest row ends.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history` up to the row with a signal.
        names (`Sequence[str]`):
            The rewards that are trained on.
        limits ([`Limits`]):
            For the window.
    """
    earlier = history[:-1]
    if evaluated := [row["step"] for row in earlier if is_evaluation(row)]:
        best = best_evaluation(earlier, names)
        if best is None:
            return evaluated[-1]
        return best.step if best.gain >= 0 else 0
    steps = [row["step"] for row in history if "loss" in row]
    return steps[-limits.window - 1] if len(steps) > limits.window else 0


def _find_in_evaluation(
    history: History, names: Sequence[str], held_out_names: Sequence[str], limits: Limits
) -> list[HackingSignal]:
    """Compare the latest evaluation with the first one of the run that was of the same images."""
    now = history[-1]
    first = next(row for row in history if is_evaluation(row) and _has_gains(row) == _has_gains(now))
    changes = {name: _evaluation_change(first, now, name) for name in (*names, *held_out_names)}
    signals = _find_exchanges(changes, names, held_out_names, limits.threshold)
    key = f"eval_{DIVERSITY}"
    if key in first and key in now:
        signals += _check_diversity(first[key], now[key], limits)
    return signals + _check_drift(now.get("eval_kl", math.nan), _first_velocity(history), limits)


def _find_in_steps(history: History, names: Sequence[str], limits: Limits) -> list[HackingSignal]:
    """Compare the latest logged steps with the first ones of the run."""
    first_velocity, velocity = _first_velocity(history), _mean(_series(history, VELOCITY)[-SMOOTHED:])
    signals = _check_drift(_mean(_series(history, "kl")[-SMOOTHED:]), first_velocity, limits)
    if velocity > limits.max_velocity_growth * first_velocity:
        message = (
            f"the velocity's root mean square grew from {first_velocity:.2f} to {velocity:.2f}, to "
            f"{velocity / first_velocity:.2f} times its first value, where the limit is "
            f"{limits.max_velocity_growth:g}."
        )
        signals.append(HackingSignal("velocity", None, message))
    diversities = _series(history, DIVERSITY)
    if len(diversities) >= 2 * SMOOTHED:
        signals += _check_diversity(_mean(diversities[:SMOOTHED]), _mean(diversities[-SMOOTHED:]), limits)
    for name in names:
        signals += _check_cosine(_series(history, f"balance/heldout_cos/{name}"), name, limits)
    if not any(is_evaluation(row) for row in history):  # which have the same prompts and seeds each time
        changes = {name: _step_change(_series(history, f"rewards/{name}/mean"), limits.window) for name in names}
        signals += _find_exchanges(changes, names, (), limits.step_threshold)
    return signals


def _find_exchanges(
    changes: Mapping[str, _Change], names: Sequence[str], held_out_names: Sequence[str], threshold: float
) -> list[HackingSignal]:
    """Rewards that fell clearly while one that is trained on rose clearly."""
    rises = " and ".join(changes[name].describe(name) for name in names if changes[name].in_errors >= threshold)
    fallen = [name for name in (*names, *held_out_names) if rises and changes[name].in_errors <= -threshold]
    kinds = {name: "held-out" if name in held_out_names else "trained" for name in fallen}
    return [
        HackingSignal("reward", name, f"{kinds[name]} {changes[name].describe(name)}, while {rises}.")
        for name in fallen
    ]


def _check_diversity(before: float, now: float, limits: Limits) -> list[HackingSignal]:
    if not now < limits.min_diversity * before:
        return []
    message = (
        f"diversity, how much the images of a prompt differ, fell from {before:.3f} to {now:.3f}, less than "
        f"{limits.min_diversity:.0%} of it."
    )
    return [HackingSignal("diversity", None, message)]


def _check_drift(kl: float, velocity: float, limits: Limits) -> list[HackingSignal]:
    """The KL relative to the square of the first velocity; NaN where one of them was not measured."""
    drift = kl / velocity**2
    if not drift > limits.max_drift:
        return []
    message = (
        f"the KL to the base model is {format_value(kl)}, {drift:.3f} of the velocity's mean square, where the limit "
        f"is {limits.max_drift:g}."
    )
    return [HackingSignal("drift", None, message)]


def _check_cosine(cosines: Sequence[float], name: str, limits: Limits) -> list[HackingSignal]:
    """Whether the latest of the windows that follow each other is clearly negative; nothing within a window."""
    if not cosines or len(cosines) % limits.window:
        return []
    mean, error = _mean_and_error(cosines[-limits.window :])
    if not mean < -limits.step_threshold * error:
        return []
    message = (
        f"the updates go against `{name}`: their cosine with its gradient on the other half of the prompts was "
        f"{mean:+.3f} ± {error:.3f} in the last {limits.window} steps that measured it."
    )
    return [HackingSignal("cosine", name, message)]


def _evaluation_change(first: Mapping[str, Any], now: Mapping[str, Any], name: str) -> _Change:
    """
    The change of a reward's mean between evaluations. The errors are added as if they were independent, which is on
    the careful side for the same prompts and seeds.
    """
    key = f"eval_rewards/{name}"
    means = [row.get(f"{key}/mean", math.nan) for row in (first, now)]
    error = math.hypot(*(row.get(f"{key}/standard_error", math.nan) for row in (first, now)))
    return _change(means[0], means[1], error)


def _step_change(values: Sequence[float], window: int) -> _Change:
    """The change from the first window to the latest of those that follow it; none within a window."""
    if len(values) < 2 * window or len(values) % window:
        return _change(math.nan, math.nan, math.nan)
    (before, error), (now, other) = _mean_and_error(values[:window]), _mean_and_error(values[-window:])
    return _change(before, now, math.hypot(error, other))


def _change(before: float, now: float, error: float) -> _Change:
    """In standard errors 0 where it was not measured."""
    change = now - before
    if not math.isfinite(change) or not math.isfinite(error) or change == 0:
        return _Change(before, now, 0.0)
    return _Change(before, now, change / error if error > 0 else math.copysign(math.inf, change))


def _first_velocity(history: History) -> float:
    """That of the first step, which is that of the base model; NaN where it was not measured, or is 0."""
    return next((row[VELOCITY] for row in history if row.get(VELOCITY, math.nan) > 0), math.nan)


def _series(history: History, key: str) -> list[float]:
    return [row[key] for row in history if math.isfinite(row.get(key, math.nan))]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
