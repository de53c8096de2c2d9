# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Tables and the picture of `compare_recipes.py`: recipes at equal cost and equal KL, by worst and mean reward."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from trl_marble.evaluation import EvaluationResults, GainPoint
from trl_marble.evaluation.figures import FAINT, INK, new_figure, save_figure
from trl_marble.evaluation.gains import measure_gains
from trl_marble.evaluation.plots import PALETTE

from .costs import read_costs, total_until
from .methods import FIRST_RECIPE, find_method
from .parts import COSTS_FILE, RESCALED_FILE, Part
from .prompt_errors import PromptGains, jackknife_error, leave_out_each_prompt, sum_by_prompt
from .runs import Run, base_run, load_scores
from .statistics import Estimate, mean_over_seeds
from .tables import ABSENT, estimate_text, table


WORST_AND_MEAN = ("worst", "mean")


@dataclass(frozen=True)
class RecipeResult:
    """
    The finished runs of a recipe.

    Args:
        label (`str`):
            Its name in tables and pictures.
        ends (`dict[int, GainPoint]`):
            Seed -> gains at the end, of trained and of held-out rewards; worst and mean are of the trained ones.
        diversity (`list[float]`):
            Diversity within prompts divided by the base's, of each seed.
        cpu_seconds (`list[float]`):
            CPU time of all optimizer steps, of each seed.
        passes (`list[int]`):
            Passes of the transformer in them.
        factors (`list[float]`):
            What its adapter was scaled by, to have the KL of all.
        prompts (`dict[int, PromptGains]`):
            Seed -> gains of trained rewards by prompt.
        steps (`int`):
            Optimizer steps of all its trainings.
    """

    label: str
    ends: dict[int, GainPoint]
    diversity: list[float]
    cpu_seconds: list[float]
    passes: list[int]
    factors: list[float]
    prompts: dict[int, PromptGains]
    steps: int

    def over_seeds(self, value: str) -> Estimate:
        """Mean and error over seeds of `worst`, `mean`, `joint_gain` or `kl`."""
        return mean_over_seeds([getattr(point, value)[0] for point in self.ends.values()])

    def text(self, value: str, digits: int = 2) -> str:
        """Mean and error over seeds of `worst`, `mean`, `joint_gain` or `kl`; of the first two also over prompts."""
        found = self.over_seeds(value)
        if value in WORST_AND_MEAN:
            left_out = leave_out_each_prompt(list(self.prompts.values()))[WORST_AND_MEAN.index(value)]
            found = found._replace(prompt_error=jackknife_error(left_out))
        return estimate_text(found, digits=digits)

    def gain_text(self, reward: str) -> str:
        """Mean and error over seeds of a reward's gain."""
        return estimate_text(mean_over_seeds([point.gains[reward][0] for point in self.ends.values()]), digits=2)


def label_of(entry: str) -> str:
    """What an entry is called: the method, without its strength where that is the KL of all."""
    label = find_method(entry).label
    return label.partition(", target")[0].partition(", beta")[0].replace("MARBLE, N = 1", "MARBLE")


class Score(NamedTuple):
    """
    What a finished run reached.

    Args:
        end ([`GainPoint`]):
            Its gains, of trained and of held-out rewards.
        diversity (`float`):
            That of its images divided by the base's.
        prompts ([`PromptGains`]):
            Gains of trained rewards by prompt.
    """

    end: GainPoint
    diversity: float
    prompts: PromptGains


def score_run(run: Run, before: EvaluationResults, output_dir: Path) -> Score:
    """Compare the images of a finished run with those of the base."""
    after = load_scores(run, output_dir)
    held_out = [reward.__name__ for reward in run.world.heldout_funcs()]
    first, second = (
        {name: each.table[name].to_numpy() for name in (*run.world.rewards, *held_out)} for each in (before, after)
    )
    kl = after.kl_to_base()
    assert kl is not None  # the adapter is beside the base
    end = measure_gains(first, second, before.groups, kl, held_out)
    trained = {name: first[name] for name in run.world.rewards}
    diversity = after.diversity()[0] / before.diversity()[0]
    return Score(end, diversity, sum_by_prompt(trained, second, before.groups))


def collect_recipes(runs: Sequence[Run], output_dir: Path) -> dict[str, RecipeResult]:
    """The finished runs of a phase by entry, the largest worst gain first; empty while the base is not scored."""
    if not runs or not (base := base_run(runs[0].phase, runs[0].scale)).is_finished(output_dir):
        return {}
    before = load_scores(base, output_dir)
    results: dict[str, RecipeResult] = {}
    for run in runs:
        if not run.is_finished(output_dir):
            continue
        score = score_run(run, before, output_dir)
        costs = [
            total_until(read_costs(output_dir / run.name / part.name / COSTS_FILE), part.steps)
            for part in run.parts
            if isinstance(part, Part)
        ]
        own = results.setdefault(run.method, RecipeResult(label_of(run.method), {}, [], [], [], [], {}, run.steps))
        own.ends[run.seed], own.prompts[run.seed] = score.end, score.prompts
        own.diversity.append(score.diversity)
        own.cpu_seconds.append(sum(cost.cpu_seconds for cost in costs))
        own.passes.append(sum(cost.passes for cost in costs))
        own.factors.append(json.loads((output_dir / run.name / "rescaled" / RESCALED_FILE).read_text())["factor"])
    return dict(sorted(results.items(), key=lambda item: item[1].over_seeds("worst").mean, reverse=True))


def recipe_table(results: Mapping[str, RecipeResult], rewards: Sequence[str]) -> str:
    """Where each recipe ended, and what it cost."""
    first = results.get(FIRST_RECIPE)
    header = ["", "seeds", "steps", "KL", "worst", "mean", *rewards]
    header += ["joint", "diversity", "scaled by", "passes", "CPU time"]
    rows = []
    for result in results.values():
        cost = [
            ABSENT if first is None else f"{np.mean(own) / np.mean(other):.2f}"
            for own, other in (
                (result.passes, first.passes if first else []),
                (result.cpu_seconds, first.cpu_seconds if first else []),
            )
        ]
        gains = [result.gain_text(name) for name in rewards]
        rows.append(
            [
                result.label,
                str(len(result.ends)),
                str(result.steps),
                result.text("kl", digits=3),
                result.text("worst"),
                result.text("mean"),
                *gains,
                result.text("joint_gain"),
                f"{np.mean(result.diversity):.2f}",
                f"{np.mean(result.factors):.2f}",
                *cost,
            ]
        )
    return table(header, rows)


def difference_table(results: Mapping[str, RecipeResult], best: str) -> str:
    """The recipe with the entry `best` minus each other, seed by seed, over the seeds that both have."""
    first, rows = results[best], []
    for entry, other in results.items():
        seeds = sorted(set(other.ends) & set(first.ends))
        if entry == best or not seeds:
            continue
        left_out = [leave_out_each_prompt([each.prompts[seed] for seed in seeds]) for each in (first, other)]
        errors = [jackknife_error(values) for values in left_out[0] - left_out[1]]
        cells = []
        for value, error in zip((*WORST_AND_MEAN, "kl"), (*errors, math.nan), strict=True):
            pairs = [(getattr(first.ends[seed], value)[0], getattr(other.ends[seed], value)[0]) for seed in seeds]
            found = mean_over_seeds([own - theirs for own, theirs in pairs])
            cells.append(estimate_text(found._replace(prompt_error=error), digits=3))
        rows.append([other.label, str(len(seeds)), *cells])
    return table(["minus", "seeds", "worst", "mean", "KL"], rows) if rows else ""


def bounds_table(
    results: Mapping[str, RecipeResult], bounds: Mapping[str, RecipeResult], rewards: Sequence[str]
) -> str:
    """How much of what each reward gains alone each recipe has; empty while a bound is missing."""
    alone = {}
    for name in rewards:
        own = bounds.get(name)
        if own is None:
            return ""
        alone[name] = float(np.mean([point.gains[name][0] for point in own.ends.values()]))
    rows = []
    for result in results.values():
        shares = {
            name: float(np.mean([point.gains[name][0] for point in result.ends.values()])) / alone[name]
            for name in rewards
        }
        worst = min(shares, key=lambda name: shares[name])
        cells = [f"{shares[name]:.2f}" for name in rewards]
        rows.append([result.label, *cells, f"{np.mean(list(shares.values())):.2f}", f"{shares[worst]:.2f} ({worst})"])
    return table(["", *rewards, "mean", "lowest"], rows)


def plot_recipes(results: Mapping[str, Mapping[str, RecipeResult]], path: Path) -> None:
    """
    Worst against mean gain, one column for each world, with errors over seeds. Circles: weights by progress; squares
    and diamonds: other ways to balance; triangles: combinations of specialists. These can be far from the others, so
    a second row shows the ways to balance alone.

    Args:
        results (`Mapping[str, Mapping[str, RecipeResult]]`):
            World -> its recipes.
        path (`Path`):
            The file to write.
    """
    styles = _styles(dict.fromkeys(entry for own in results.values() for entry in own))
    balanced = {entry: style for entry, style in styles.items() if find_method(entry).composite is None}
    rows = [styles] if len(balanced) in (0, len(styles)) else [styles, balanced]
    figure = new_figure(6.2 * len(results), 4.6 * len(rows))
    panels = figure.subplots(len(rows), len(results), squeeze=False)
    for shown, row in zip(rows, panels, strict=True):
        for axes, (world, own) in zip(row, results.items(), strict=True):
            _draw_recipes(axes, own, shown)
            title = world if shown is styles else f"{world}, ways to balance only"
            axes.set_title(title, color=INK, fontsize=10, loc="left")
    panels[0, -1].legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def _draw_recipes(axes: Axes, results: Mapping[str, RecipeResult], styles: Mapping[str, tuple[str, str]]) -> None:
    for entry, (marker, color) in styles.items():
        if entry not in results:
            continue
        result = results[entry]
        means, worst = result.over_seeds("mean"), result.over_seeds("worst")
        axes.errorbar(
            means.mean,
            worst.mean,
            xerr=0.0 if math.isnan(means.seed_error) else means.seed_error,
            yerr=0.0 if math.isnan(worst.seed_error) else worst.seed_error,
            fmt=marker,
            color=color,
            markersize=6,
            elinewidth=1.0,
            label=result.label,
        )
    axes.set_xlabel("mean gain (standard deviations of the base)", color=FAINT, fontsize=9)
    axes.set_ylabel("worst gain (standard deviations of the base)", color=FAINT, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _styles(entries: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Marker and color of each entry, by kind; each kind has markers of its own, the next one when colors run out."""
    kinds: dict[str, list[str]] = {"oh": [], "sD": [], "^v": []}
    for entry in entries:
        method = find_method(entry)
        by_progress = method.settings.get("multi_objective_aggregation") == "progress"
        kinds["^v" if method.composite is not None else "oh" if by_progress else "sD"].append(entry)
    return {
        entry: (markers[place // len(PALETTE)], PALETTE[place % len(PALETTE)])
        for markers, own in kinds.items()
        for place, entry in enumerate(own)
    }


def as_json(results: Mapping[str, RecipeResult]) -> dict[str, Any]:
    """All numbers."""
    return {
        entry: {
            "label": result.label,
            "ends": {str(seed): point.numbers() for seed, point in result.ends.items()},
            "diversity": result.diversity,
            "cpu_seconds": result.cpu_seconds,
            "passes": result.passes,
            "factors": result.factors,
        }
        for entry, result in results.items()
    }
