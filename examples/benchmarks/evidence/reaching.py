# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""When a run has reached what another had at its end, and what it had cost until then. Pure functions of numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .costs import StepCost, total_until
from .statistics import Estimate, mean_over_seeds, upper_bound_is_known


class Target(NamedTuple):
    """
    What is to be reached, both of it.

    Args:
        mean (`float`):
            Mean gain over the rewards, in standard deviations of the base's images.
        worst (`float`):
            The lowest fraction of its bound that any reward has reached.
    """

    mean: float
    worst: float


@dataclass(frozen=True)
class TimedCurve:
    """
    The evaluations of one run in the order of its steps, the first of them before any training.

    Args:
        steps (`list[int]`):
            Optimizer steps taken.
        cpu_seconds (`list[float]`):
            CPU time of these steps, without evaluations.
        passes (`list[float]`):
            Passes of the transformer in these steps, one for each image.
        means (`list[float]`):
            Mean gains, see [`Target`].
        worsts (`list[float]`):
            Worst fractions, see [`Target`].
    """

    steps: list[int]
    cpu_seconds: list[float]
    passes: list[float]
    means: list[float]
    worsts: list[float]

    @property
    def end(self) -> Target:
        """What the run had at its last evaluation."""
        return Target(self.means[-1], self.worsts[-1])


class Ratio(NamedTuple):
    """
    Cost until a target was reached, divided by the cost of the run that has set it.

    Args:
        estimate ([`Estimate`]):
            Mean and standard error over seeds. A seed that has not reached the target counts with the cost of its
            whole run, so that the mean is a lower bound.
        reached (`int`):
            Seeds that have reached it.
        seeds (`int`):
            All seeds.
    """

    estimate: Estimate
    reached: int
    seeds: int


def known_bounds(results: Mapping[str, Any]) -> dict[str, float]:
    """
    Reward -> how far it rises when it is trained alone, where that is known.

    Args:
        results (`Mapping[str, Any]`):
            `results.json` of the comparison of methods.
    """
    prefix = "specialist_"
    alone = {name.removeprefix(prefix): row for name, row in results["main"].items() if name.startswith(prefix)}
    changes = {name: Estimate(**row["changes"][name]) for name, row in alone.items()}
    return {name: change.mean for name, change in changes.items() if upper_bound_is_known(change)}


def timed_curve(
    history: Sequence[Mapping[str, Any]], costs: Mapping[int, StepCost], bounds: Mapping[str, float]
) -> TimedCurve:
    """
    The evaluations of a run with what they had cost.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history` of a run that was evaluated before its first step.
        costs (`Mapping[int, StepCost]`):
            Step -> its cost.
        bounds (`Mapping[str, float]`):
            Reward -> the change that is its bound.

    Raises:
        `ValueError`: if the cost of a step is not known.
    """
    rows = {row["step"]: row for row in history if "eval_gain_mean" in row}
    steps = sorted(rows)
    missing = sorted(set(range(1, steps[-1] + 1)) - costs.keys())
    if missing:
        raise ValueError(f"The cost of steps {missing} was not measured; delete the run's folder and run it again.")
    totals = [total_until(costs, step) for step in steps]
    means = {name: [rows[step][f"eval_rewards/{name}/mean"] for step in steps] for name in bounds}
    fractions = [[(mean - own[0]) / bounds[name] for mean in own] for name, own in means.items()]
    return TimedCurve(
        steps=steps,
        cpu_seconds=[total.cpu_seconds for total in totals],
        passes=[float(total.passes) for total in totals],
        means=[rows[step]["eval_gain_mean"] for step in steps],
        worsts=[min(own) for own in zip(*fractions, strict=True)],
    )


def place_reached(means: Sequence[float], worsts: Sequence[float], target: Target) -> float | None:
    """
    Where both numbers have reached the target, as a place between evaluations: 2.5 is half way from the third to the
    fourth. Between evaluations both are taken to be linear.

    Because evaluations are noisy, the target counts as reached only if the next evaluation, where there is one, is not
    below it again in either number.

    Args:
        means (`Sequence[float]`):
            Mean gain at each evaluation.
        worsts (`Sequence[float]`):
            Worst fraction at each evaluation.
        target ([`Target`]):
            What is to be reached.

    Returns:
        `float`, or `None` if it was never reached.
    """
    curves = [(means, target.mean), (worsts, target.worst)]
    reached = [all(values[i] >= wanted for values, wanted in curves) for i in range(len(means))]
    for i, own in enumerate(reached):
        if own and all(reached[i : i + 2]):
            crossings = [
                (wanted - values[i - 1]) / (values[i] - values[i - 1])
                for values, wanted in curves
                if i > 0 and values[i - 1] < wanted
            ]
            return i - 1 + max(crossings) if crossings else float(i)
    return None


def value_at(values: Sequence[float], place: float) -> float:
    """A number of each evaluation at a place between them, see [`place_reached`]."""
    return float(np.interp(place, range(len(values)), values))


def ratio_over_seeds(costs: Sequence[float | None], whole_runs: Sequence[float], baselines: Sequence[float]) -> Ratio:
    """
    Mean ratio of costs with its error over seeds. Runs of one seed see the same prompts in the same order, so each is
    divided by the baseline of its seed.

    Args:
        costs (`Sequence[float | None]`):
            Of each seed, the cost until the target was reached; `None` if it was not.
        whole_runs (`Sequence[float]`):
            Of each seed, the cost of the whole run.
        baselines (`Sequence[float]`):
            Of each seed, the cost of the run that has set the target.

    Raises:
        `ValueError`: if there is no seed, or not one number of each kind for each.
    """
    if not costs or not len(costs) == len(whole_runs) == len(baselines):
        raise ValueError(
            f"There are {len(costs)} costs, {len(whole_runs)} whole runs and {len(baselines)} baselines; pass one of "
            "each for every seed."
        )
    known = [whole if cost is None else cost for cost, whole in zip(costs, whole_runs, strict=True)]
    ratios = np.array(known) / np.array(baselines)
    return Ratio(mean_over_seeds(ratios), sum(cost is not None for cost in costs), len(costs))


def compare_curves(curves: Sequence[TimedCurve], baselines: Sequence[TimedCurve]) -> dict[str, Ratio]:
    """
    What a method costs until each of its seeds has what the baseline of that seed had at its end, relative to the
    baseline's cost: in `"steps"`, `"cpu_seconds"` and `"passes"`.
    """
    places = [place_reached(own.means, own.worsts, other.end) for own, other in zip(curves, baselines, strict=True)]
    ratios = {}
    for unit in ("steps", "cpu_seconds", "passes"):
        costs = [
            None if place is None else value_at(getattr(own, unit), place)
            for own, place in zip(curves, places, strict=True)
        ]
        ratios[unit] = ratio_over_seeds(
            costs, [getattr(own, unit)[-1] for own in curves], [getattr(own, unit)[-1] for own in baselines]
        )
    return ratios
