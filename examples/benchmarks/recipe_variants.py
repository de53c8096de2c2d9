# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Variants of the recipe that the demo follows, each with one setting changed: which policy samples, and how samples
are made and used.

```bash
python examples/benchmarks/recipe_variants.py --list
python examples/benchmarks/recipe_variants.py
```

**The policy that samples** (group `old_policy`): the trained one, or one that lags (presets 1 and 2), with the
recipe's KL and without any, 150 steps, seeds 1 and 2, held-out prompts. Group `cosines` is the same with MARBLE, which
measures held-out cosines, with one seed.

**Cheaper samples** (group `samples`): the number of solver steps and of trained timesteps, images of each prompt,
images a step, optimizer steps for each generation batch. Seed 0, prompts of the train split. A variant has as many
steps as cost what the recipe's 150 cost, by an estimate (`estimate_passes`), and its learning rate falls to 0 within
them.

The rule, stated before any of these runs:

1. A variant is run with the recipe's strength of the KL. If the KL at its end is more than a tenth away from the
   recipe's, it is run once more, with its strength times its KL divided by the recipe's, and its gains are
   interpolated linearly in KL between its two ends.
2. Variants of the samples replace the recipe by their worst gain at the recipe's KL, after equal CPU time. One that
   took over a tenth more CPU time than the recipe is out.
3. A variant is better if its worst gain is ahead by more than the standard error over prompts. Of those that are ahead
   of the recipe, the best is chosen; of several that differ by no more than that error, the simplest, which is the
   first in the list. If none is better, the recipe stays.
4. The policy that samples is chosen in the same way with the means over both seeds, at the end and with the recipe's
   KL. A preset with which a reward was below the base in any evaluation is out. On-policy is the simplest.

Runs are kept in the folder of `long_runs.py`, whose runs of the recipe are used here too. A run takes about 20 minutes
on one core.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence.choosing import End, at_equal_kl, choose, second_strength
from evidence.costs import read_costs
from evidence.long_report import LongResult, collect_long, cosine_table, end_table
from evidence.methods import (
    OLD_POLICY_COSINES,
    OLD_POLICY_ENTRIES,
    RECIPE,
    SAMPLE_ENTRIES,
    find_method,
)
from evidence.runs import COSTS_FILE, LONG, LONG_RATE, MAIN, QUICK_LONG, TUNING, TUNING_SEED, Run, Scale, base_run
from evidence.tables import ABSENT, table
from evidence.workers import run_missing
from rich.console import Console

from trl_marble.evaluation.records import write_atomically


# Group -> phase, seeds and entries.
GROUPS: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {
    "samples": (TUNING, (TUNING_SEED,), SAMPLE_ENTRIES),
    "old_policy": (MAIN, (1, 2), OLD_POLICY_ENTRIES),
    "cosines": (MAIN, (1,), OLD_POLICY_COSINES),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long"), help="default: %(default)s")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="default: all")
    parser.add_argument(
        "--list", action="store_true", help="print the variants with what they change, and run nothing"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    parser.add_argument(
        "--quick", action="store_true", help="two entries of each group, two steps: tests only the code"
    )
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least one run has to be made at a time")
    args.scale = QUICK_LONG if args.quick else LONG
    return args


def planned_runs(group: str, scale: Scale) -> list[Run]:
    """The runs of a group with the recipe's strength."""
    phase, seeds, entries = GROUPS[group]
    entries = entries[:2] if scale.quick else entries
    return [Run(phase, entry, LONG_RATE, seed, scale) for seed in seeds for entry in entries]


def second_runs(ends: Mapping[str, End], scale: Scale) -> list[Run]:
    """The runs of the group `samples` with another strength, once the others are finished."""
    wanted = ends[RECIPE].kl
    runs = []
    for entry, end in ends.items():
        method, _, strength = entry.partition("@")
        second = second_strength(strength, end.kl, wanted)
        if second is not None:
            runs.append(Run(TUNING, f"{method}@{second}", LONG_RATE, TUNING_SEED, scale))
    return runs


def describe_runs(runs: Sequence[Run]) -> str:
    """What each entry changes, and how many steps it has."""
    rows = {run.method: [run.method, find_method(run.method).label, str(run.steps)] for run in runs}
    return table(["", "what it is", "steps"], rows.values())


def read_ends(runs: Sequence[Run], scale: Scale, output_dir: Path) -> dict[str, End]:
    """Where finished runs with the tuning seed have ended."""
    finished = [run for run in runs if run.is_finished(output_dir)]
    results = collect_long(finished, TUNING, scale, output_dir)
    ends = {}
    for run in finished:
        if run.method not in results:
            continue
        point, costs = results[run.method].end_of(TUNING_SEED), output_dir / run.name / "stage-1" / COSTS_FILE
        seconds = sum(cost.cpu_seconds for cost in read_costs(costs).values()) if costs.is_file() else None
        ends[run.method] = End(point.kl[0], *point.worst, point.mean[0], seconds)
    return ends


def sample_table(ends: Mapping[str, End]) -> str:
    """The variants of the samples at the recipe's KL, and which of them the rule chooses."""
    recipe, own = ends[RECIPE], {}
    for entry in SAMPLE_ENTRIES[1:]:
        method = entry.partition("@")[0]
        strengths = [end for name, end in ends.items() if name.partition("@")[0] == method]
        if strengths:
            own[entry] = at_equal_kl(strengths, recipe.kl)
    chosen = choose(recipe, own)
    rows = []
    for entry, end in {RECIPE: recipe, **own}.items():
        known = end.cpu_seconds is not None and recipe.cpu_seconds is not None
        ratio = f"{end.cpu_seconds / recipe.cpu_seconds:.2f}x" if known else ABSENT  # type: ignore[operator]
        label = find_method(entry).label + (" (chosen)" if entry == (chosen or RECIPE) else "")
        rows.append([label, ratio, f"{end.kl:.3f}", f"{end.worst:.2f} ± {end.error:.2f}", f"{end.mean:.2f}"])
    return table(["", "CPU", "KL", "worst", "mean"], rows)


def write_report(planned: Mapping[str, Sequence[Run]], scale: Scale, output_dir: Path) -> Path:
    """Write `variants.md` about what is finished."""
    parts = ["# Variants of the recipe\n"]
    ends = read_ends(planned["samples"], scale, output_dir)
    if RECIPE in ends:
        parts += [
            f"## Samples: at the recipe's KL, seed {TUNING_SEED}, prompts of the train split\n",
            "CPU: of the optimizer steps. Worst: ± standard error over prompts.\n",
            sample_table(ends),
        ]
    for group, title in (("old_policy", "The policy that samples"), ("cosines", "The same with MARBLE")):
        finished = [run for run in planned[group] if run.is_finished(output_dir)]
        results: Mapping[str, LongResult] = collect_long(finished, MAIN, scale, output_dir)
        if results:
            parts += [f"## {title}: held-out prompts\n", end_table(results), cosine_table(results)]
    path = output_dir / "report" / "variants.md"
    write_atomically(path, "\n".join(parts).encode())
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console()
    planned = {group: planned_runs(group, args.scale) if group in args.groups else [] for group in GROUPS}
    if args.list:
        for group in args.groups:
            console.print(f"[bold]{group}[/bold]")
            console.print(describe_runs(planned[group]), markup=False, highlight=False)
        return
    for group in args.groups:
        phase, runs = GROUPS[group][0], planned[group]
        every = [base_run(phase, args.scale), *runs]
        run_missing(group, every, args.output_dir, args.jobs, console, args.dry_run)
        if group == "samples" and not args.dry_run:
            ends = read_ends(runs, args.scale, args.output_dir)
            planned[group] = [*runs, *second_runs(ends, args.scale)]
            run_missing(f"{group}, once more", planned[group], args.output_dir, args.jobs, console)
    if not args.dry_run:
        console.print(f"The report is {write_report(planned, args.scale, args.output_dir)}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
