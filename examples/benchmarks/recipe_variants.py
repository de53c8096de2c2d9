# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Which policy samples, over 150 steps of the demo's recipe: the trained one, or one that lags behind.

```bash
python examples/benchmarks/recipe_variants.py --list
python examples/benchmarks/recipe_variants.py
```

The trained policy is preset 0, and presets 1 and 2 lag. Group `old_policy` has the recipe's KL and `no_kl` none, on
held-out prompts; `cosines` is the same with MARBLE, which measures held-out cosines.

The rule, stated before any of these runs: the means over seeds at the end, with the recipe's KL, decide. A preset is
better if its worst gain is ahead by more than the standard error over prompts, and out if a reward was below the base
in any evaluation. Of those that differ by less, the simplest is chosen, which is on-policy.

A run takes about ten minutes on one core.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence.long_report import LongResult, collect_long, cosine_table, end_table
from evidence.methods import OLD_POLICY_COSINES, OLD_POLICY_ENTRIES, OLD_POLICY_NO_KL, find_method
from evidence.runs import LONG, LONG_RATE, MAIN, QUICK_LONG, SEEDS, Run, Scale, base_run
from evidence.tables import table
from evidence.workers import run_missing
from rich.console import Console

from trl_marble.evaluation.records import write_atomically


# Group -> title, seeds and entries. All seeds of the first entry, which is the demo's recipe, are in the first group.
GROUPS: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {
    "old_policy": ("The policy that samples", SEEDS, OLD_POLICY_ENTRIES),
    "no_kl": ("The same without a KL", SEEDS[:1], OLD_POLICY_NO_KL),
    "cosines": ("The same with MARBLE", SEEDS[:1], OLD_POLICY_COSINES),
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
    """The runs of a group."""
    _, seeds, entries = GROUPS[group]
    if scale.quick:
        seeds, entries = seeds[:1], entries[:2]
    return [Run(MAIN, entry, LONG_RATE, seed, scale) for seed in seeds for entry in entries]


def describe_runs(runs: Sequence[Run]) -> str:
    """What each entry changes, and how many steps it has."""
    rows = {run.method: [run.method, find_method(run.method).label, str(run.steps)] for run in runs}
    return table(["", "what it is", "steps"], rows.values())


def write_report(planned: Mapping[str, Sequence[Run]], scale: Scale, output_dir: Path) -> Path:
    """Write `variants.md` about what is finished."""
    parts = ["# Variants of the recipe\n"]
    for group, runs in planned.items():
        finished = [run for run in runs if run.is_finished(output_dir)]
        results: Mapping[str, LongResult] = collect_long(finished, MAIN, scale, output_dir)
        if results:
            parts += [f"## {GROUPS[group][0]}: held-out prompts\n", end_table(results), cosine_table(results)]
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
    for group, runs in planned.items():
        if runs:
            every = [base_run(MAIN, args.scale), *runs]
            run_missing(group, every, args.output_dir, args.jobs, console, args.dry_run)
    if not args.dry_run:
        console.print(f"The report is {write_report(planned, args.scale, args.output_dir)}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
