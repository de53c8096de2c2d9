# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""MARBLE and its baselines on ShapeWorld, from the same pretrained pipeline with the same prompts, seeds and steps.

```bash
python examples/benchmarks/compare.py
```

The first stage, `tune`, chooses a learning rate for each method: it tries every rate of the grid, with a separate
seed, on prompts of the train split, and takes the one with the greatest gain among those with which no reward fell.
`main` trains each method with at least three seeds, among them one specialist per reward, and scores all on the same
held-out prompts and noise. `ablations`, which does not run by default, trains the variants with the learning rates of
their methods. `report` writes tables and pictures of what is finished to `OUTPUT_DIR/report`.

The evaluation is the same for all: prompts of the test split, noise from one seed. Every run has its own folder with
its log, and is a process with one thread; as many run at once as there are cores. Finished runs are not repeated, and
interrupted ones continue from their last checkpoint. On two cores `tune` took 1.8 hours, `main` 2.3 and `ablations`
4.2. A complete run's images and adapters take 20 MB of disk. `--dry_run` prints what would be done.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from evidence.methods import BASE, METHODS, VARIANTS, find_method, missing_packages
from evidence.report import choose_rates, tuning_gains, write_report
from evidence.runs import (
    LEARNING_RATES,
    MAIN,
    QUICK,
    SEEDS,
    STEPS,
    TUNING,
    TUNING_SEED,
    Run,
    Scale,
    base_run,
    load_report,
)
from evidence.workers import execute_all
from rich.console import Console


STAGES = ("tune", "main", "ablations", "report")

# Measured over 3 steps and 2304 images with one thread, while the other core was busy (13.8 seconds per step with a
# weighted sum, 16.1 with MARBLE), for the first estimate of the duration. Later estimates use finished runs.
SECONDS_PER_STEP = 15.0
SECONDS_PER_IMAGE = 0.0225


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=["tune", "main", "report"], help="default: all but ablations"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, *VARIANTS],
        metavar="NAME",
        help=f"of {', '.join(METHODS)}; variants for the ablations: {', '.join(VARIANTS)}; default: all",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, SEEDS))}")
    parser.add_argument(
        "--learning_rates",
        type=float,
        nargs="+",
        help="the grid; with one rate there is nothing to tune; default: "
        + " ".join(f"{rate:g}" for rate in LEARNING_RATES),
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps of every run; default: {STEPS}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, and for how long")
    parser.add_argument(
        "--quick", action="store_true", help="two methods, one seed, one rate, two steps: tests only the code"
    )
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least one run has to be made at a time")
    args.scale = QUICK if args.quick else Scale()
    if args.steps is not None:
        args.scale = Scale(**{**vars(args.scale), "steps": args.steps})
    args.seeds = args.seeds or ([SEEDS[0]] if args.quick else list(SEEDS))
    args.learning_rates = sorted(set(args.learning_rates or ([LEARNING_RATES[1]] if args.quick else LEARNING_RATES)))
    args.methods = args.methods or (["weighted_sum", "marble"] if args.quick else [*METHODS, *VARIANTS])
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds has {args.seeds}; each has to be another one, or its run would count twice")
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds has {TUNING_SEED}, with which the learning rates are chosen; leave it out")
    for name in args.methods:
        stages = len(find_method(name).stages)
        if args.scale.steps < stages:
            parser.error(f"--steps is {args.scale.steps}; {name} has {stages} stages, so at least {stages} are needed")
        if "ablations" in args.stages and name in VARIANTS and (missing := missing_packages(find_method(name))):
            parser.error(
                f"{name} needs {' and '.join(missing)}, not installed here. Install what is missing "
                "(pip install torchjd qpsolvers cvxpy ecos), or leave it out by naming the others in --methods."
            )
    return args


def chosen_runs(args: argparse.Namespace, names: Sequence[str], rates: dict[str, float]) -> dict[str, list[Run]]:
    """The runs of each method or variant whose learning rate is known, one per seed."""
    runs: dict[str, list[Run]] = {}
    for name in names:
        parent = find_method(name).tuned_as or name
        if parent in rates:
            runs[name] = [Run(MAIN, name, rates[parent], seed, args.scale) for seed in args.seeds]
    return runs


def run_stage(title: str, runs: Sequence[Run], args: argparse.Namespace, console: Console) -> None:
    """
    Execute the missing runs of a stage.

    Raises:
        `SystemExit`: If a run failed; all others are finished.
    """
    missing = [run for run in runs if not run.is_finished(args.output_dir)]
    hours = estimated_seconds(missing, runs, args.output_dir) / min(args.jobs, len(missing) or 1) / 3600
    console.print(
        f"[bold]{title}[/bold]: {len(runs) - len(missing)} of {len(runs)} runs are finished, the rest takes about "
        f"{hours:.1f} hours, {args.jobs} at a time",
        highlight=False,
    )
    if args.dry_run or not missing:
        return
    failed = execute_all(missing, args.output_dir, args.jobs, console)
    if failed:
        console.print(f"[red]{len(failed)} runs failed.[/red] Their logs:")
        for run in failed:
            console.print(f"  {args.output_dir / run.name / 'log.txt'}", highlight=False)
        raise SystemExit("Run the same command again: finished runs are kept.")


def estimated_seconds(missing: Sequence[Run], all_runs: Sequence[Run], output_dir: Path) -> float:
    """Seconds on one thread: estimated from finished runs of the stage, or else from the constants above."""
    finished = [load_report(run, output_dir) for run in all_runs if run not in missing and run.steps]
    if finished:
        each = [report["training_seconds"] + report["evaluation_seconds"] for report in finished]
        return len(missing) * sum(each) / len(each)
    seconds = 0.0
    for run in missing:
        seconds += run.steps * SECONDS_PER_STEP + run.images * len(run.scale.prompts(run.phase)) * SECONDS_PER_IMAGE
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console()
    methods = [name for name in METHODS if name in args.methods and name != BASE]
    variants = [name for name in VARIANTS if name in args.methods]
    # Variants need the learning rates of their methods, and the report needs all of them.
    tuned = list(dict.fromkeys([*methods, *(parent for name in variants if (parent := find_method(name).tuned_as))]))
    rates = args.learning_rates

    if "tune" in args.stages and len(rates) > 1:
        grid = [Run(TUNING, name, rate, TUNING_SEED, args.scale) for name in tuned for rate in rates]
        run_stage("tune", [base_run(TUNING, args.scale), *grid], args, console)
    gains = tuning_gains(tuned, rates, TUNING_SEED, args.scale, args.output_dir) if len(rates) > 1 else {}
    chosen = choose_rates(gains, rates)
    untuned = [name for name in tuned if name not in chosen]
    if args.dry_run:
        chosen |= dict.fromkeys(untuned, rates[0])
    elif untuned:
        raise SystemExit(f"No learning rate is chosen yet for {', '.join(untuned)}; run the stage `tune` first.")

    runs = chosen_runs(args, methods, chosen)
    if "main" in args.stages:
        every = [base_run(MAIN, args.scale), *(run for own in runs.values() for run in own)]
        run_stage("main", every, args, console)
    varied = chosen_runs(args, variants, chosen)
    if "ablations" in args.stages:
        run_stage("ablations", [run for own in varied.values() for run in own], args, console)
    if "report" in args.stages and not args.dry_run:
        begun = {name: own for name, own in varied.items() if any(run.is_finished(args.output_dir) for run in own)}
        path = write_report({**runs, **begun}, gains, rates, args.scale, args.output_dir)
        console.print(f"The report is in {path.parent}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
