# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Time to the same rewards on ShapeWorld: how soon a run has what earlier recipes have after 25 steps.

```bash
python examples/benchmarks/time_to_reward.py
```

There are two baselines of 25 steps: the recipe of the demo at commit 61ec878 (an old policy that lags, 8 solver steps,
6 timesteps, 256 images, no KL, balanced at every step), and that of MARBLE's paper at these sizes (new weights at
every tenth step, from whole losses, an old policy that lags, a KL of 1e-4). What is compared has the demo's settings
of today and 75 steps.

A run has reached a baseline when both its mean gain (in standard deviations of the base's images) and its worst
reward's fraction of its bound are what the baseline of the same seed had at its end. Bounds are how far each reward
rises when it is trained alone (docs/evidence/short_runs.md). All are evaluated alike, every fifth step on held-out
prompts with 8 solver steps, and between evaluations both numbers are taken to be linear. A target counts as reached if
the next evaluation is not below it again.

Time is CPU time of the optimizer steps, rollouts and rewards included, evaluations not. Beside it are passes of the
transformer, which do not depend on what else the machine does. Every run has its own folder and is a process with one
thread; finished runs are not repeated, and interrupted ones continue from their last checkpoint. All of them take
about an hour on two cores.

The settings of today were chosen with `--tuning`: how samples are made and used, with seed 0 on prompts of the train
split, where the demo at 61ec878 is the baseline. A setting has as many steps as cost what 50 steps of the long runs'
recipe (128 images) cost, by an estimate, and its learning rate falls to 0 within them. The rule: settings that reach
the baseline in less than 0.9 of the CPU time of the recipe are combined. A combination is kept if it needs less than
0.9 of the passes of its best part. What is chosen has to lose no reward in 150 steps (docs/evidence/long_runs.md).
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evidence.costs import read_costs
from evidence.methods import BASELINES, EARLIER_DEMO, FAST_ENTRIES, SAMPLE_ENTRIES, TIMED_ENTRIES, find_method
from evidence.parts import COSTS_FILE
from evidence.reaching import Ratio, TimedCurve, compare_curves, known_bounds, timed_curve
from evidence.runs import (
    LONG_RATE,
    LONG_STEPS,
    MAIN,
    SEEDS,
    STEPS,
    TUNING,
    TUNING_SEED,
    Run,
    Scale,
    load_report,
)
from evidence.statistics import mean_over_seeds
from evidence.tables import estimate_text, table
from evidence.workers import run_missing
from rich.console import Console

from trl_marble.evaluation.records import write_atomically
from trl_marble.evaluation.results import to_json


SCALE = Scale(
    steps=STEPS, images=8, tuning_images=8, curve_steps=5, curve_images=8, curve_inference_steps=8, long=True
)
QUICK = Scale(
    steps=3, images=1, tuning_images=1, curve_steps=2, curve_images=1, curve_inference_steps=2, long=True, quick=True
)
COMPARED_STEPS = LONG_STEPS // 2
TUNING_STEPS = 50  # of the recipe; what is compared with it has as many as cost the same
RESULTS = Path(__file__).parents[2] / "docs" / "evidence" / "results.json"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/time_to_reward"), help="default: %(default)s")
    parser.add_argument("--tuning", action="store_true", help="how samples are made and used, with seed 0")
    parser.add_argument(
        "--entries",
        nargs="+",
        metavar="METHOD@STRENGTH",
        help=f"what is compared; default: {' '.join(TIMED_ENTRIES)}, or with --tuning all variants of the samples",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {SEEDS}, or with --tuning {TUNING_SEED}")
    parser.add_argument(
        "--steps", type=int, help=f"of what is compared; default: {COMPARED_STEPS}, or with --tuning {TUNING_STEPS}"
    )
    parser.add_argument(
        "--bounds", type=Path, default=RESULTS, help="results.json of compare.py; default: the one of docs"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    parser.add_argument("--quick", action="store_true", help="one entry and three small steps: tests only the code")
    args = parser.parse_args(arguments)
    args.entries = args.entries or list(SAMPLE_ENTRIES if args.tuning else TIMED_ENTRIES)
    args.seeds = args.seeds or list([TUNING_SEED] if args.tuning else SEEDS)
    if args.steps is None:
        args.steps = TUNING_STEPS if args.tuning else COMPARED_STEPS
    if args.jobs < 1 or args.steps < 1:
        parser.error(f"--jobs is {args.jobs} and --steps is {args.steps}; both have to be at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds has {args.seeds}; each has to be another one, or its run would count twice")
    for entry in args.entries:
        try:
            find_method(entry)
        except (KeyError, ValueError):
            parser.error(f"{entry!r} is no entry; write `<method>@<strength>`, such as {TIMED_ENTRIES[0]}")
    if args.quick:
        args.entries, args.seeds, args.steps = args.entries[:1], args.seeds[:1], QUICK.steps
    return args


def planned_runs(args: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed: those that are divided by each other run at the same time."""
    baseline = QUICK if args.quick else SCALE
    compared = replace(baseline, steps=args.steps)
    if args.tuning:
        others = [(name, LONG_RATE) for name in args.entries]
        others += [(name, 2 * LONG_RATE) for name in args.entries if name in FAST_ENTRIES]
        wanted = [(baseline, EARLIER_DEMO, LONG_RATE), *((compared, *other) for other in others)]
    else:
        wanted = [(baseline, name, LONG_RATE) for name in BASELINES]
        wanted += [(compared, name, LONG_RATE) for name in args.entries]
    phase = TUNING if args.tuning else MAIN
    return [Run(phase, name, rate, seed, scale) for seed in args.seeds for scale, name, rate in wanted]


def label_of(run: Run) -> str:
    """What a run is called in the tables."""
    label = find_method(run.method).label
    return label if run.learning_rate == LONG_RATE else f"{label}, learning rate {run.learning_rate:g}"


def collect_curves(
    runs: Sequence[Run], bounds: Mapping[str, float], output_dir: Path
) -> dict[str, dict[int, TimedCurve]]:
    """Label -> seed -> the evaluations of a finished run."""
    curves: dict[str, dict[int, TimedCurve]] = {}
    for run in runs:
        if run.is_finished(output_dir):
            costs = read_costs(output_dir / run.name / "stage-1" / COSTS_FILE)
            curve = timed_curve(load_report(run, output_dir)["history"], costs, bounds)
            curves.setdefault(label_of(run), {})[run.seed] = curve
    return curves


def describe_baseline(label: str, curves: Mapping[int, TimedCurve]) -> str:
    """What a baseline has at its end, and what it costs."""
    mean, worst, seconds = (
        estimate_text(mean_over_seeds(values), digits=digits)
        for values, digits in (
            ([curve.end.mean for curve in curves.values()], 2),
            ([curve.end.worst for curve in curves.values()], 2),
            ([curve.cpu_seconds[-1] for curve in curves.values()], 0),
        )
    )
    return (
        f"## Until what {label} has after {curves[min(curves)].steps[-1]} steps\n\n"
        f"Mean gain {mean}, worst fraction {worst}, {seconds} seconds of CPU time, seeds "
        f"{', '.join(map(str, sorted(curves)))}.\n"
    )


def comparison_table(baseline: str, curves: Mapping[str, Mapping[int, TimedCurve]]) -> str:
    """How soon each of the others has what a baseline has, of the seeds that both have finished."""
    rows = []
    for name, own in curves.items():
        seeds = sorted(own.keys() & curves[baseline].keys())
        if name == baseline or not seeds:
            continue
        ratios = compare_curves([own[seed] for seed in seeds], [curves[baseline][seed] for seed in seeds])
        reached = ratios["steps"]
        ends = [own[seed].end for seed in seeds]
        rows.append(
            [
                name,
                f"{reached.reached} of {reached.seeds}",
                *(_over(ratios[unit]) for unit in ("cpu_seconds", "passes", "steps")),
                estimate_text(mean_over_seeds([end.mean for end in ends]), digits=2),
                estimate_text(mean_over_seeds([end.worst for end in ends]), digits=2),
            ]
        )
    return table(["", "seeds", "CPU time", "passes", "steps", "mean at its end", "worst at its end"], rows)


def _over(ratio: Ratio) -> str:
    return ("" if ratio.reached == ratio.seeds else "over ") + estimate_text(ratio.estimate, digits=2)


_COLUMNS = (
    "Seeds: those that reached it. CPU time, passes of the transformer and optimizer steps until then, divided by "
    "those of the baseline's whole run; mean over seeds ± standard error over seeds. Over: not all seeds reached it, "
    "and the others count with their whole run. The last two: at the end of the own run.\n"
)


def write_report(curves: Mapping[str, Mapping[int, TimedCurve]], output_dir: Path) -> Path:
    """Write `report.md` and `times.json`, which has all evaluations."""
    parts = ["# Time to the same rewards\n", _COLUMNS]
    for label in (method.label for method in BASELINES.values()):
        if label in curves:
            parts += [describe_baseline(label, curves[label]), comparison_table(label, curves)]
    folder = output_dir / "report"
    content = {name: {str(seed): vars(curve) for seed, curve in own.items()} for name, own in curves.items()}
    write_atomically(folder / "times.json", to_json(content))
    write_atomically(folder / "report.md", "\n".join(parts).encode())
    return folder / "report.md"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console()
    runs = planned_runs(args)
    run_missing("tuning" if args.tuning else "time to reward", runs, args.output_dir, args.jobs, console, args.dry_run)
    if not args.dry_run:
        bounds = known_bounds(json.loads(args.bounds.read_text()))
        path = write_report(collect_curves(runs, bounds, args.output_dir), args.output_dir)
        console.print(f"The report is in {path.parent}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
