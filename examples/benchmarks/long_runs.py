# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Long runs on ShapeWorld: where methods end after 150 steps, and how far they drift from the base on the way.

```bash
python examples/benchmarks/long_runs.py
```

An entry is a method and how its drift is limited, `<method>@<strength>`: `marble@0.1` is MARBLE with `beta=0.1`. The
stage `tune` tries ways to limit the drift with a separate seed, and scores them on prompts of the train split. `main`
trains the methods with three seeds (what else is compared with one) and scores them on held-out
prompts, every 10 steps and at the end. `report` writes
tables and pictures of what is finished to `OUTPUT_DIR/report`.

Every run has its own folder and is a process with one thread; as many run at once as there are cores. A run takes
about 20 minutes on one core. Finished runs are not repeated, and interrupted ones continue from their last checkpoint.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from evidence.long_report import write_long_report
from evidence.methods import BASE, LONG_MAIN, LONG_ONCE, LONG_TUNING, long_method
from evidence.runs import LONG, LONG_RATE, MAIN, QUICK_LONG, SEEDS, TUNING, TUNING_SEED, Run, base_run
from evidence.workers import run_missing
from rich.console import Console


STAGES = ("tune", "main", "report")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/long"), help="default: %(default)s")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--entries", nargs="+", metavar="METHOD@STRENGTH", help="default: those of the stages")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"of `main`; default: {' '.join(map(str, SEEDS))}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    parser.add_argument("--quick", action="store_true", help="two entries, two small steps: tests only the code")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least one run has to be made at a time")
    args.seeds = args.seeds or ([SEEDS[0]] if args.quick else list(SEEDS))
    if TUNING_SEED in args.seeds or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds has {args.seeds}; each has to be another one, and not {TUNING_SEED}, that of `tune`")
    args.scale = QUICK_LONG if args.quick else LONG
    for entry in args.entries or ():
        try:
            long_method(entry)
        except (KeyError, ValueError):
            parser.error(f"{entry!r} is no entry; write `<method>@<strength>`, such as {LONG_MAIN[0]}")
    return args


def planned_runs(args: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of each stage, the untrained pipeline first."""
    few = ["weighted_sum@0.1", "progress@0.2"] if args.quick else None
    tuned, main = (args.entries or few or own for own in (LONG_TUNING, LONG_MAIN))
    tuning = [Run(TUNING, entry, LONG_RATE, TUNING_SEED, args.scale) for entry in tuned]
    # All methods with one seed first: what is finished can be looked at on the way.
    trained = [Run(MAIN, entry, LONG_RATE, seed, args.scale) for seed in args.seeds for entry in main]
    if not args.entries and not args.quick:
        trained += [Run(MAIN, entry, LONG_RATE, args.seeds[0], args.scale) for entry in LONG_ONCE]
    return {
        "tune": [base_run(TUNING, args.scale), *tuning],
        "main": [base_run(MAIN, args.scale), *trained],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console()
    planned = planned_runs(args)
    for stage, runs in planned.items():
        if stage not in args.stages:
            continue
        run_missing(stage, runs, args.output_dir, args.jobs, console, args.dry_run)
    if "report" in args.stages and not args.dry_run:
        finished = [
            run for runs in planned.values() for run in runs if run.method != BASE and run.is_finished(args.output_dir)
        ]
        path = write_long_report(finished, args.scale, args.output_dir)
        console.print(f"The report is in {path.parent}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
