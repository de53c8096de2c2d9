# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Balance, distil or average? Recipes for five rewards at equal cost and equal KL to the base.

```bash
python examples/benchmarks/compare_recipes.py
```

The budget of every recipe is what 150 steps of the demo's recipe cost, in passes of the transformer, with decoding and
scoring an image in the same unit; the base model's images of weights by progress and the training of specialists and
teachers are part of it. All have the demo's samples. Ways to balance aim at a KL of 0.04 (`kl_target`), and all
results are scaled to it at the end, on the images that are scored (which is not counted). Adapters are on every linear
layer of the transformer; one entry has them on attention only. A student gets half of the budget, its teachers the
other half; MapReduce has three rounds.

`tune` chooses with seed 0 on prompts of the train split, three settings each: for what combines specialists the KL's
coefficient and the learning rate of the specialists, with the whole budget; for ways to balance the learning rate,
first with a third of the budget, then the better two with all of it. The rule: the highest sum of the mean and the
worst gain at the end. By the same rule it chooses the best two recipes, which the report compares with every other.
`main` runs three seeds on held-out prompts, and `bounds` each reward alone on the prompts that it applies to, with the
first seed, at the same KL and cost. `report` writes tables, images and a picture of all worlds.

One more entry, MARBLE with advantages scaled by group, is not tuned: it has the settings that are chosen for MARBLE.

Nothing is tuned on the second world, [EmojiWorld](../../docs/emojiworld.md): its runs have the settings that were
chosen on ShapeWorld.

Every run has its own folder and is a process with one thread. Finished runs are not repeated, and interrupted ones
continue from their last checkpoint.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from evidence.methods import (
    COMPOSITE_ENTRIES,
    RECIPE_ENTRIES,
    RECIPES_KL,
    alone_entry,
    find_method,
    missing_packages,
)
from evidence.pictures import draw_some_images
from evidence.recipes_report import (
    RecipeResult,
    as_json,
    bounds_table,
    collect_recipes,
    difference_table,
    label_of,
    plot_recipes,
    recipe_table,
    score_run,
)
from evidence.runs import (
    LEARNING_RATES,
    LONG,
    LONG_RATE,
    LONG_STEPS,
    MAIN,
    QUICK_LONG,
    SEEDS,
    TUNING,
    TUNING_SEED,
    Run,
    Scale,
    base_run,
    load_scores,
)
from evidence.tables import ABSENT, table
from evidence.workers import run_missing
from evidence.worlds import WORLDS
from rich.console import Console

from trl_marble.evaluation import EvaluationResults, GainPoint
from trl_marble.evaluation.records import write_atomically
from trl_marble.evaluation.results import to_json


STAGES = ("tune", "main", "bounds", "report")
SCALE = replace(LONG, images=48, tuning_images=16, curve_steps=LONG_STEPS)
SHORT = 50  # steps of the recipe, when learning rates are tried first
FINALISTS = "finalists"  # the folder of those that are tried with the whole budget
FAST_RATE = 2 * LONG_RATE
# Whose images the report shows, beside those of the best: one of each kind.
SHOWN = ("r_weighted_sum", "r_gdpo", "r_marble", "r_published", "r_soup", "r_mapreduce", "r_distilled")
# Name -> entries that have its learning rate, which is not chosen again for them.
NOT_TUNED = {"r_marble": (f"r_marble_group@target{RECIPES_KL:g}",)}
ROUNDS = (
    "### First round: combinations of specialists with the whole budget, the others with a third of it\n",
    "### Second round: the better two settings of the others with the whole budget\n",
)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/recipes"), help="default: %(default)s")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=list(CANDIDATES), help="default: all", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    parser.add_argument("--quick", action="store_true", help="one setting, one seed, two steps: tests only the code")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least one run has to be made at a time")
    args.methods = args.methods or list(CANDIDATES)
    for name in args.methods:
        if missing := missing_packages(find_method(CANDIDATES[name][0][0])):
            parser.error(
                f"{name} needs {' and '.join(missing)}, not installed here. Install what is missing (pip install "
                "torchjd qpsolvers), or leave it out by naming the others in --methods."
            )
    return args


def _candidates() -> dict[str, list[tuple[str, float]]]:
    """Name -> the entries and learning rates that are tried."""
    found = {entry.partition("@")[0]: [(entry, rate) for rate in LEARNING_RATES] for entry in RECIPE_ENTRIES}
    for entry in COMPOSITE_ENTRIES:
        found.setdefault(entry.partition("@")[0], []).append((entry, LONG_RATE))
    for name in {entry.partition("@")[0]: None for entry in COMPOSITE_ENTRIES}:
        found[name].append((found[name][-1][0], FAST_RATE))
    return found


CANDIDATES = _candidates()


def tuning_runs(names: Sequence[str], scale: Scale) -> dict[str, list[Run]]:
    """Name -> a run for each of its candidates."""
    runs = {}
    for name in names:
        entries = CANDIDATES[name][:1] if scale.quick else CANDIDATES[name]
        own = scale if scale.quick or _is_composite(name) else replace(scale, steps=SHORT)
        runs[name] = [Run(TUNING, entry, rate, TUNING_SEED, own) for entry, rate in entries]
    return runs


def _is_composite(name: str) -> bool:
    return find_method(CANDIDATES[name][0][0]).composite is not None


def score_tuning(
    runs: Mapping[str, Sequence[Run]], before: EvaluationResults, output_dir: Path
) -> dict[str, dict[Run, GainPoint]]:
    """Name -> each of its runs, all of them finished, and what it has at its end."""
    return {name: {run: score_run(run, before, output_dir).end for run in own} for name, own in runs.items()}


def sum_of(end: GainPoint) -> float:
    """What the rule goes by: the sum of the mean and the worst gain."""
    return end.mean[0] + end.worst[0]


def finalists(scores: Mapping[str, Mapping[Run, GainPoint]], scale: Scale) -> dict[str, list[Run]]:
    """Name -> the better two of its settings, with the whole budget: of those that had less."""
    chosen = {}
    for name, own in scores.items():
        if not _is_composite(name):
            better = sorted(own, key=lambda run: sum_of(own[run]), reverse=True)[:2]
            chosen[name] = [replace(run, scale=scale) for run in better]
    return chosen


class Choice(NamedTuple):
    """
    What `tune` chose.

    Args:
        settings (`dict[str, tuple[str, float]]`):
            Name of each recipe -> its entry and learning rate.
        best (`list[str]`):
            Entries of the best two recipes, the better one first.
        text (`str`):
            The tables of what was tried.
    """

    settings: dict[str, tuple[str, float]]
    best: list[str]
    text: str


def choose(*rounds: Mapping[str, Mapping[Run, GainPoint]]) -> Choice:
    """
    Apply the rule, for each recipe and to all.

    Args:
        rounds (`Mapping[str, Mapping[Run, GainPoint]]`):
            Name -> runs and what they have: first of all settings, then of those that were tried again.
    """
    last = {name: own for scores in rounds for name, own in scores.items()}
    best_of = {name: max(own, key=lambda run: sum_of(own[run])) for name, own in last.items()}
    best = sorted(best_of, key=lambda name: sum_of(last[name][best_of[name]]), reverse=True)[:2]
    header = ["", "beta of the specialists", "learning rate", "mean", "worst", "sum", "KL", ""]
    tables = []
    for round_title, scores in zip(ROUNDS, rounds, strict=True):
        rows = []
        for name, own in scores.items():
            for run, end in own.items():
                strength = run.method.rpartition("@")[2] if _is_composite(name) else ABSENT
                mark = "chosen" if run is best_of[name] and own is last[name] else ""
                values = (end.mean[0], end.worst[0], sum_of(end), end.kl[0])
                numbers = (f"{value:.3f}" for value in values)
                rows.append([label_of(run.method), strength, f"{run.learning_rate:g}", *numbers, mark])
        tables += [round_title, table(header, rows)]
    settings = {name: (run.method, run.learning_rate) for name, run in best_of.items()}
    return Choice(settings, [best_of[name].method for name in best], "\n".join(tables))


_TEXT = (
    f"Scaled to a KL of {RECIPES_KL:g}. Gains in standard deviations of the untrained pipeline's images, "
    "mean over seeds ± standard error over seeds; after the slash that over prompts (jackknife). Worst: of the reward "
    "that gained least. Joint: share of the held-out prompts on which all rewards that apply rose. Steps: of all "
    "trainings. Passes (forward and backward ones alike) and CPU time of them, divided by those of weights by "
    "progress, temperature 0.15.\n"
)


def write_report(
    name: str, results: Mapping[str, RecipeResult], bounds: Mapping[str, RecipeResult], choice: Choice, folder: Path
) -> None:
    """Write `report.md` and `recipes.json` of one world."""
    world = WORLDS[name]
    parts = [f"# Recipes: {name}\n", _TEXT, recipe_table(results, world.rewards)]
    if world.heldout_funcs():
        names = [reward.__name__ for reward in world.heldout_funcs()]
        rows = [[own.label, *(own.gain_text(name) for name in names)] for own in results.values()]
        parts += ["## Held-out networks\n", table(["", *names], rows)]
    for place, best in zip(("Best", "Second"), choice.best, strict=False):
        if best in results:
            title = f"## {place} in tuning, {results[best].label}, minus each other, same seed\n"
            parts += [title, difference_table(results, best)]
    if shares := bounds_table(results, bounds, world.rewards):
        parts += ["## Shares of what each reward gains alone\n", shares]
    parts += [f"## Settings: seed {TUNING_SEED}, prompts of ShapeWorld's train split\n", choice.text]
    write_atomically(folder / "recipes.json", to_json({"results": as_json(results), "bounds": as_json(bounds)}))
    write_atomically(folder / "report.md", "\n".join(parts).encode())


def draw_images(scale: Scale, choice: Choice, output_dir: Path, path: Path) -> None:
    """The same prompts and noise with some of the recipes, those whose first seed is finished."""
    evaluations = {"untrained": load_scores(base_run(MAIN, scale), output_dir)}
    rates = dict(choice.settings.values())
    shown = [choice.best[0], *(choice.settings[name][0] for name in SHOWN if name in choice.settings)]
    for entry in dict.fromkeys(shown):
        run = Run(MAIN, entry, rates[entry], SEEDS[0], scale)
        if run.is_finished(output_dir):
            label = "best in tuning" if entry == choice.best[0] else label_of(entry)
            evaluations[label] = load_scores(run, output_dir)
    draw_some_images(evaluations, path)


def tune(args: argparse.Namespace, scale: Scale, console: Console) -> Choice | None:
    """Choose the settings, on ShapeWorld; `None` in a dry run, while runs are missing."""
    base, rounds = base_run(TUNING, scale), list[dict[str, dict[Run, GainPoint]]]()
    for folder in (args.output_dir, args.output_dir / FINALISTS):
        runs = finalists(rounds[0], scale) if rounds else tuning_runs(args.methods, scale)
        every = [run for own in runs.values() for run in own]
        if "tune" in args.stages:
            title = f"tune, {folder.name}" if rounds else "tune"
            run_missing(title, every if rounds else [base, *every], folder, args.jobs, console, args.dry_run)
        if missing := [run for run in every if not run.is_finished(folder)]:
            if args.dry_run:
                return None
            raise SystemExit(f"No settings are chosen yet: {len(missing)} runs of `tune` are missing.")
        rounds.append(score_tuning(runs, load_scores(base, args.output_dir), folder))
    return choose(*rounds)


def entries_of(choice: Choice) -> list[tuple[str, float]]:
    """Each entry of the comparison and its learning rate."""
    return [
        (entry, rate) for name, (own, rate) in choice.settings.items() for entry in (own, *NOT_TUNED.get(name, ()))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console()
    scale = QUICK_LONG if args.quick else SCALE
    choice = tune(args, scale, console)
    if choice is None:
        console.print("The runs of `main` follow when these are finished.")
        return
    seeds = SEEDS[:1] if args.quick else SEEDS
    report, of_worlds = args.output_dir / "report", {}
    for world in args.worlds:
        own = replace(scale, world=world)
        runs = [Run(MAIN, entry, rate, seed, own) for seed in seeds for entry, rate in entries_of(choice)]
        if "main" in args.stages:
            title = f"main, {world}"
            run_missing(title, [base_run(MAIN, own), *runs], args.output_dir, args.jobs, console, args.dry_run)
        alone = {name: Run(MAIN, alone_entry(name), LONG_RATE, SEEDS[0], own) for name in WORLDS[world].rewards}
        if "bounds" in args.stages and not args.quick:
            run_missing(f"bounds, {world}", list(alone.values()), args.output_dir, args.jobs, console, args.dry_run)
        if "report" in args.stages and not args.dry_run:
            of_worlds[world] = collect_recipes(runs, args.output_dir)
            found = collect_recipes(list(alone.values()), args.output_dir)
            bounds = {name: found[run.method] for name, run in alone.items() if run.method in found}
            write_report(world, of_worlds[world], bounds, choice, report / world)
            if of_worlds[world]:
                draw_images(own, choice, args.output_dir, report / world / "images.png")
    if shown := {world: results for world, results in of_worlds.items() if results}:
        plot_recipes(shown, report / "recipes.png")
        console.print(f"The report is in {report}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
