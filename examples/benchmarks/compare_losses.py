# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Every loss on ShapeWorld with five rewards, at equal cost and with the same aim for the KL, with GDPO and MARBLE.

```bash
python examples/benchmarks/compare_losses.py
```

All runs have the demo's settings, and a `kl_target` of 0.03 in place of a fixed `beta`: coefficients of the KL cannot
be compared between losses. Slow losses end below it, so gains are also given for each unit of drift. They sample from
the trained policy, and CRD with its published old policy and sampling policy too. A run has as many optimizer steps as
cost what 60 steps of DiffusionNFT's loss with GDPO cost: passes of the transformer, and decoding and scoring an image
in the same unit.

Learning rates are chosen for each loss with GDPO, with seed 0 and prompts of the train split, at 40 steps' cost. The
rule: the highest sum of the mean and the worst gain at the end. If it is the lowest or the highest rate, one more in
that direction is run. With MARBLE a loss has the same rate. Then three seeds each, on held-out prompts.

Every run has its own folder and is a process with one thread. Finished runs are not repeated, and interrupted ones
continue from their last checkpoint. A run takes three minutes on one core, all of them an hour and a half on two.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from evidence.long_report import LongResult, collect_long, cosine_table, end_table
from evidence.methods import LOSS_AGGREGATIONS, LOSS_KL, LOSSES, find_method, loss_entry
from evidence.runs import LEARNING_RATES, LONG, MAIN, QUICK_LONG, SEEDS, TUNING, TUNING_SEED, Run, Scale, base_run
from evidence.statistics import mean_over_seeds
from evidence.tables import ABSENT, estimate_text, table
from evidence.workers import run_missing
from rich.console import Console

from trl_marble.evaluation import plot_gains
from trl_marble.evaluation.records import write_atomically
from trl_marble.evaluation.results import to_json


STAGES = ("tune", "main", "report")
# Of DiffusionNFT's loss with GDPO; the others have as many as cost the same.
SCALE = replace(LONG, steps=60, curve_steps=20, tuning_images=16)
TUNING_SCALE = replace(SCALE, steps=40)
TUNED_WITH = LOSS_AGGREGATIONS[0]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/losses"), help="default: %(default)s")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES), help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print what would be run")
    parser.add_argument("--quick", action="store_true", help="one rate, one seed, two steps: tests only the code")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; at least one run has to be made at a time")
    return args


def tuning_runs(losses: Sequence[str], scale: Scale, rates: Sequence[float] = LEARNING_RATES) -> list[Run]:
    """The runs that learning rates are chosen by."""
    rates = rates[:1] if scale.quick else rates
    return [Run(TUNING, loss_entry(TUNED_WITH, loss), rate, TUNING_SEED, scale) for loss in losses for rate in rates]


def scores_of(runs: Sequence[Run], scale: Scale, output_dir: Path) -> dict[Run, tuple[float, float]]:
    """Mean and worst gain at the end of each run of a phase that is finished."""
    scores = {}
    for run in runs:
        if run.is_finished(output_dir) and base_run(run.phase, scale).is_finished(output_dir):
            (result,) = collect_long([run], run.phase, scale, output_dir).values()
            scores[run] = result.ends[0].mean[0], result.ends[0].worst[0]
    return scores


def best_rate(scores: Mapping[Run, tuple[float, float]], loss: str) -> float:
    """The learning rate that the rule chooses for a loss."""
    own = [run for run in scores if run.method == loss_entry(TUNED_WITH, loss)]
    return max(own, key=lambda run: sum(scores[run])).learning_rate


def rates_beyond(scores: Mapping[Run, tuple[float, float]], losses: Sequence[str], scale: Scale) -> list[Run]:
    """For losses whose best rate is the lowest or the highest that was planned: one run with a rate beyond it."""
    beyond = {min(LEARNING_RATES): min(LEARNING_RATES) / 2, max(LEARNING_RATES): 2 * max(LEARNING_RATES)}
    first = {run: score for run, score in scores.items() if run.learning_rate in LEARNING_RATES}
    best = {loss: best_rate(first, loss) for loss in losses}
    return [run for loss in losses if best[loss] in beyond for run in tuning_runs([loss], scale, [beyond[best[loss]]])]


def tuning_table(scores: Mapping[Run, tuple[float, float]]) -> str:
    """Mean and worst gain of every loss with every learning rate."""
    rates = sorted({run.learning_rate for run in scores})
    rows: dict[str, dict[float, str]] = {}
    for run, (mean, worst) in scores.items():
        rows.setdefault(find_method(run.method).label, {})[run.learning_rate] = f"{mean:.2f} / {worst:.2f}"
    header = ["mean / worst gain", *(f"{rate:g}" for rate in rates)]
    return table(header, [[label, *(own.get(rate, ABSENT) for rate in rates)] for label, own in rows.items()])


def difference_table(results: Mapping[str, LongResult]) -> str:
    """Mean and worst gain of each loss minus those of the first with the same rewards' balance and seed."""
    first = next(iter(LOSSES))
    rows = []
    for loss in [loss for loss in LOSSES if any(loss_entry(name, loss) in results for name in LOSS_AGGREGATIONS)]:
        cells = []
        for aggregation in LOSS_AGGREGATIONS:
            own, other = (results.get(loss_entry(aggregation, name)) for name in (loss, first))
            seeds = sorted(set(own.seeds) & set(other.seeds)) if own and other else []
            for value in ("mean", "worst"):
                gains = [[getattr(each.end_of(seed), value)[0] for seed in seeds] for each in (own, other) if each]
                cells.append(
                    estimate_text(mean_over_seeds(np.subtract(*gains)), digits=2)
                    if seeds and loss != first
                    else ABSENT
                )
        rows.append([LOSSES[loss][0], *cells])
    header = [f"{value}, {name}" for name in ("GDPO", "MARBLE") for value in ("mean", "worst")]
    return table(["", *header], rows)


def drift_table(results: Mapping[str, LongResult]) -> str:
    """
    Mean and worst gain at the end divided by the square root of the KL, which is how far the velocities have moved:
    near the base gains grow in proportion to that, so that runs that ended at other KLs can be compared.
    """
    rows = []
    for result in results.values():
        cells = [
            estimate_text(
                result.at_end(lambda point, name=name: getattr(point, name)[0] / point.kl[0] ** 0.5), digits=2
            )
            for name in ("mean", "worst")
        ]
        rows.append([result.label, *cells])
    return table(["", "mean / root of KL", "worst / root of KL"], rows)


_TEXT = (
    f"`kl_target={LOSS_KL:g}`. Gains in standard deviations of the untrained pipeline's images, mean over seeds ± "
    "standard error over seeds. Worst: of the reward that gained least. Joint: share of the held-out prompts on which "
    "all rewards that apply rose. Lowest: the lowest gain of any reward and seed in any evaluation on the way.\n"
)


def write_report(
    scores: Mapping[Run, tuple[float, float]], runs: Sequence[Run], scale: Scale, output_dir: Path
) -> Path:
    """Write `report.md`, its pictures and `losses.json` about what is finished."""
    folder = output_dir / "report"
    parts = ["# Losses\n", _TEXT]
    if scores:
        parts += [f"## Learning rates: seed {TUNING_SEED}, prompts of the train split\n", tuning_table(scores)]
    results = collect_long([run for run in runs if run.is_finished(output_dir)], MAIN, scale, output_dir)
    content = {}
    if results:
        steps = {run.method: (run.steps, run.learning_rate) for run in runs}
        rows = [[own.label, str(steps[entry][0]), f"{steps[entry][1]:g}"] for entry, own in results.items()]
        parts += ["## At the end\n", end_table(results), table(["", "optimizer steps", "learning rate"], rows)]
        parts += ["## For each unit of drift\n", drift_table(results)]
        parts += [f"## Minus {next(iter(LOSSES.values()))[0]}, same seed\n", difference_table(results)]
        cosines = cosine_table(results)
        if cosines:
            parts += ["## Cosines, in-sample / held-out\n", cosines]
        for name in LOSS_AGGREGATIONS:
            own = {r.label: r.mean_curve for entry, r in results.items() if entry.startswith(f"{name}_")}
            if own:
                plot_gains(own, folder / f"{name}.png", [LOSS_KL])
                parts.append(f"![Gains against the KL to the base]({name}.png)\n")
        for entry, own_result in results.items():
            ends = [point.numbers() for point in own_result.ends]
            content[entry] = {"steps": steps[entry][0], "learning_rate": steps[entry][1], "ends": ends}
    write_atomically(folder / "losses.json", to_json(content))
    write_atomically(folder / "report.md", "\n".join(parts).encode())
    return folder / "report.md"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    console = Console()
    scale, tuning = (QUICK_LONG, QUICK_LONG) if args.quick else (SCALE, TUNING_SCALE)
    planned = tuning_runs(args.losses, tuning)
    if "tune" in args.stages:
        runs = [base_run(TUNING, tuning), *planned]
        run_missing("tune", runs, args.output_dir, args.jobs, console, args.dry_run)
    scores = scores_of(planned, tuning, args.output_dir)
    missing = [run.name for run in planned if run not in scores]
    if not missing and not args.quick:
        beyond = rates_beyond(scores, args.losses, tuning)
        if "tune" in args.stages:
            run_missing("tune, rates beyond", beyond, args.output_dir, args.jobs, console, args.dry_run)
        scores |= scores_of(beyond, tuning, args.output_dir)
        missing = [run.name for run in beyond if run not in scores]
    if missing:
        if not args.dry_run:
            raise SystemExit(f"The learning rates are not known yet: {len(missing)} runs of `tune` are missing.")
        console.print("The runs of `main` follow when these are finished.")
        return
    rates = {loss: best_rate(scores, loss) for loss in args.losses}
    seeds = SEEDS[:1] if args.quick else SEEDS
    runs = [
        Run(MAIN, loss_entry(name, loss), rates[loss], seed, scale)
        for seed in seeds
        for loss in args.losses
        for name in LOSS_AGGREGATIONS
    ]
    if "main" in args.stages:
        run_missing("main", [base_run(MAIN, scale), *runs], args.output_dir, args.jobs, console, args.dry_run)
    if "report" in args.stages and not args.dry_run:
        path = write_report(scores, runs, scale, args.output_dir)
        console.print(f"The report is in {path.parent}", highlight=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. Run the same command again to continue.") from None
