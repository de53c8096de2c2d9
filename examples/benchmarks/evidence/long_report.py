# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The report of the long runs: where they end, what they had at equal KL, and whether a reward was ever lost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_marble.evaluation import GainPoint, gains_at_kl, interpolate_at_kl, plot_gains, run_gains
from trl_marble.evaluation.gains import measure_gains
from trl_marble.evaluation.records import write_atomically
from trl_marble.evaluation.results import to_json

from .long_pictures import plot_steps
from .methods import LONG_BASES, LONG_MAIN, LONG_STRENGTHS, RECIPE, REWARDS, SPECIALISTS, find_method
from .runs import MAIN, TUNING, Run, Scale, base_run, load_report, load_scores
from .statistics import Estimate, mean_over_seeds
from .tables import ABSENT, estimate_text, table


# KLs at which methods are compared: those that most runs pass.
EQUAL_KL = (0.04, 0.06, 0.08)
# The first evaluation after the 25 steps of the other tables.
EARLY_STEP = 30


@dataclass(frozen=True)
class LongResult:
    """
    The finished runs of one entry.

    Args:
        entry (`str`):
            `<method>@<strength>`.
        seeds (`list[int]`):
            Of its runs.
        curves (`list[list[GainPoint]]`):
            Of each seed: its evaluations, gains in standard deviations of the base's images.
        ends (`list[GainPoint]`):
            Of each seed: the last evaluation, with more images and solver steps, paired with the base's.
        diversity (`list[float]`):
            Of each seed: diversity within prompts divided by the base's.
        histories (`list[list[dict]]`):
            The logs.
    """

    entry: str
    seeds: list[int]
    curves: list[list[GainPoint]]
    ends: list[GainPoint]
    diversity: list[float]
    histories: list[list[dict[str, Any]]]

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        return find_method(self.entry).label

    def end_of(self, seed: int) -> GainPoint:
        """The last evaluation of one seed."""
        return self.ends[self.seeds.index(seed)]

    def at_end(self, value: Callable[[GainPoint], float]) -> Estimate:
        """Mean and error over seeds of a value of the last evaluations."""
        return mean_over_seeds(np.array([value(point) for point in self.ends]))

    def at_kl(self, kl: float, value: Callable[[GainPoint], float]) -> Estimate | None:
        """The same where the runs were at a KL; `None` if a seed never was."""
        points = [gains_at_kl(curve, kl) for curve in self.curves]
        found = [value(point) for point in points if point is not None]
        return mean_over_seeds(np.array(found)) if len(found) == len(points) else None

    @property
    def lowest(self) -> tuple[float, str, int]:
        """The lowest gain of any reward in any evaluation of any seed after the first, the reward, and the step."""
        trained = find_method(self.entry).rewards
        points = [point for curve in self.curves for point in curve[1:]]
        gains = [(point.gains[name][0], name, point.step or 0) for point in points for name in trained]
        return min(gains, key=lambda gain: math.inf if math.isnan(gain[0]) else gain[0])

    @property
    def least_rise(self) -> tuple[float, str] | None:
        """The least change of a gain since `EARLY_STEP`, of any reward and seed; `None` for shorter runs."""
        trained = find_method(self.entry).rewards
        changes = [
            (curve[-1].gains[name][0] - early.gains[name][0], name)
            for curve in self.curves
            for early in curve
            if early.step == EARLY_STEP
            for name in trained
        ]
        return min(changes, default=None)

    @property
    def mean_curve(self) -> list[GainPoint]:
        """The mean of the seeds' evaluations, with errors over seeds."""
        return [_mean_point(points) for points in zip(*self.curves, strict=True)]

    def cosines(self, prefix: str) -> dict[str, Estimate] | None:
        """Reward -> mean over steps of a logged cosine, with its error over the steps of all seeds."""
        found = {}
        for name in REWARDS:
            values = np.array([row.get(f"{prefix}/{name}", math.nan) for own in self.histories for row in own])
            values = values[np.isfinite(values)]
            if len(values) > 1:
                found[name] = Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
        return found or None


def _mean_point(points: Sequence[GainPoint]) -> GainPoint:
    def over_seeds(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
        estimate = mean_over_seeds(np.array([mean for mean, _ in values]))
        return estimate.mean, estimate.seed_error

    return GainPoint(
        kl=over_seeds([point.kl for point in points]),
        gains={name: over_seeds([point.gains[name] for point in points]) for name in points[0].gains},
        worst=over_seeds([point.worst for point in points]),
        mean=over_seeds([point.mean for point in points]),
        joint_gain=over_seeds([point.joint_gain for point in points]),
        joint_fall=over_seeds([point.joint_fall for point in points]),
        step=points[0].step,
    )


def collect_long(runs: Sequence[Run], phase: str, scale: Scale, output_dir: Path) -> dict[str, LongResult]:
    """The finished runs of a phase by entry; empty while the untrained pipeline is not scored."""
    base = base_run(phase, scale)
    if not base.is_finished(output_dir):
        return {}
    before = load_scores(base, output_dir)
    by_entry: dict[str, list[Run]] = {}
    for run in runs:
        if run.phase == phase:
            by_entry.setdefault(run.method, []).append(run)
    results = {}
    for entry, own in by_entry.items():
        reports = [load_report(run, output_dir) for run in own]
        scores = [load_scores(run, output_dir) for run in own]
        trained = find_method(entry).rewards
        ends = []
        for after in scores:
            first, second = ({name: each.table[name].to_numpy() for name in trained} for each in (before, after))
            kl = after.kl_to_base()
            assert kl is not None  # the adapter is beside the base
            ends.append(measure_gains(first, second, before.groups, kl))
        results[entry] = LongResult(
            entry=entry,
            seeds=[run.seed for run in own],
            curves=[run_gains(report["history"]) for report in reports],
            ends=ends,
            diversity=[after.diversity()[0] / before.diversity()[0] for after in scores],
            histories=[report["history"] for report in reports],
        )
    return results


def write_long_report(runs: Sequence[Run], scale: Scale, output_dir: Path) -> Path:
    """
    Write the report of the finished runs.

    Args:
        runs (`Sequence[Run]`):
            Finished runs, without the untrained pipeline.
        scale ([`Scale`]):
            How large they are.
        output_dir (`Path`):
            The folder with the runs.

    Returns:
        `Path`: `report.md`, in the folder `report` with the other files.

    Raises:
        `FileNotFoundError`: if nothing is finished.
    """
    folder = output_dir / "report"
    phases = {phase: collect_long(runs, phase, scale, output_dir) for phase in (MAIN, TUNING)}
    if not any(phases.values()):
        raise FileNotFoundError(f"`{output_dir}` has no finished run; run the stage `main`.")
    parts = [f"# Long runs\n\n{scale.steps} optimizer steps.\n"]
    for phase, results in phases.items():
        if not results:
            continue
        seeds = sorted({seed for result in results.values() for seed in result.seeds})
        parts.append(f"## {phase.capitalize()}: seeds {', '.join(map(str, seeds))}\n")
        parts += ["### At the end\n", _ENDS, end_table(results)]
        parts += ["### At equal KL\n", _EQUAL, equal_kl_table(results)]
        beside = beside_recipe_table(results)
        if beside:
            parts += ["### At equal KL and equal steps\n", _BESIDE, beside]
        bounds = bounds_table(results)
        if bounds:
            parts += ["### Shares of bounds\n", _BOUNDS, bounds]
        cosines = cosine_table(results)
        if cosines:
            parts += ["### Cosines\n", _COSINES, cosines]
        # One without a limit to its drift would press the others into a corner.
        compared = [own for own_results in _comparable(results).values() for own in own_results]
        if phase == MAIN:
            compared = [own for own in compared if own.entry in LONG_MAIN]
        if compared:
            curves = {own.label: own.mean_curve for own in compared}
            plot_gains(curves, folder / f"{phase}_gain_against_kl.png", EQUAL_KL)
            plot_steps(curves, folder / f"{phase}_steps.png")
            parts.append(f"![Gains against the KL to the base]({phase}_gain_against_kl.png)\n")
            parts.append(f"![Gains over the steps]({phase}_steps.png)\n")
    write_atomically(folder / "report.md", "\n".join(parts).encode())
    content = {phase: {name: _as_json(own) for name, own in results.items()} for phase, results in phases.items()}
    write_atomically(folder / "results.json", to_json(content))
    return folder / "report.md"


_ENDS = (
    "KL: mean of (v - v_base)^2. Gains in standard deviations of the untrained pipeline's images, mean over seeds ± "
    "standard error over seeds. Worst: of the reward that gained least. Joint: share of the held-out prompts on which "
    "all rewards that apply rose. Lowest: the lowest gain of any reward and seed in any evaluation on the way, and "
    f"its step. Since: the least change of any reward of any seed between step {EARLY_STEP} and the end, in the same "
    "evaluations. Bound: the lowest share of what a reward gains when it is trained alone, at the same KL.\n"
)
_EQUAL = (
    "Worst / mean gain where a run's policy was at this KL, between two of its evaluations (8 images a prompt). "
    f"{ABSENT}: not all seeds came there.\n"
)
_BESIDE = (
    f"Worst / mean gain at the end of the runs, at the KL where the recipe ({RECIPE}) ended: interpolated linearly in "
    "KL between two strengths of a method, seed by seed; a method with one strength as it is. Then the difference "
    "from the recipe with the same seed. Outside: seeds whose KL does not lie between the strengths.\n"
)
_BOUNDS = (
    "What each reward gained, as a share of what it gains when it is trained alone, at the KL where the method ended, "
    "the most of the strengths that were run. Of the evaluations on the way (8 images a prompt), linear in KL between "
    "two of them, mean over seeds.\n"
)
_COSINES = (
    "Mean over steps of the cosine between the update and each reward's gradient: on the prompts that the update was "
    "computed from / between the update of one half of the prompts and the gradient of the other half, ± standard "
    "error over steps.\n"
)


def end_table(results: Mapping[str, LongResult]) -> str:
    """Where the runs ended."""
    header = ["", "seeds", "KL", *REWARDS, "worst", "mean", "joint", "lowest", "since", "diversity", "bound"]
    rows = []
    for result in results.values():
        shares = shares_of_bounds(result, results)
        worst = None if shares is None else min(shares.items(), key=lambda item: item[1])
        gain, name, step = result.lowest
        rise = result.least_rise
        rows.append(
            [
                result.label,
                str(len(result.seeds)),
                f"{result.at_end(lambda point: point.kl[0]).mean:.3f}",
                *(
                    estimate_text(result.at_end(lambda point, name=name: point.gains[name][0]), digits=2)
                    if name in find_method(result.entry).rewards
                    else ABSENT
                    for name in REWARDS
                ),
                estimate_text(result.at_end(lambda point: point.worst[0]), digits=2),
                estimate_text(result.at_end(lambda point: point.mean[0]), digits=2),
                f"{result.at_end(lambda point: point.joint_gain[0]).mean:.2f}",
                f"{gain:+.2f} ({name}, {step})",
                ABSENT if rise is None else f"{rise[0]:+.2f} ({rise[1]})",
                f"{np.mean(result.diversity):.2f}",
                ABSENT if worst is None else f"{worst[1]:.2f} ({worst[0]})",
            ]
        )
    return table(header, rows)


def shares_of_bounds(result: LongResult, results: Mapping[str, LongResult]) -> dict[str, float] | None:
    """
    How much of its bound each reward gained; `None` while a bound is not known. A bound is the most that a run on this
    reward alone had when its policy was as far from the base, or at its end if it never was.
    """
    end = result.mean_curve[-1]
    shares = {}
    for name in find_method(result.entry).rewards:
        alone = [own for entry, own in results.items() if entry.startswith(f"{SPECIALISTS[name]}@")]
        if not alone or result in alone:
            return None
        bounds = [gains_at_kl(own.mean_curve, end.kl[0]) or own.mean_curve[-1] for own in alone]
        shares[name] = end.gains[name][0] / max(bound.gains[name][0] for bound in bounds)
    return shares


def bounds_table(results: Mapping[str, LongResult]) -> str:
    """How much of its bound each reward gained, for the methods with all rewards; empty while a bound is not known."""
    rows = [
        [result.label, *(f"{shares[name]:.2f}" for name in REWARDS)]
        for result in results.values()
        for shares in [shares_of_bounds(result, results)]
        if shares is not None
    ]
    return table(["", *REWARDS], rows) if rows else ""


def equal_kl_table(results: Mapping[str, LongResult]) -> str:
    """Worst and mean gain at some KLs."""
    rows = []
    for result in results.values():
        cells = []
        for kl in EQUAL_KL:
            worst, mean = (
                result.at_kl(kl, value) for value in (lambda point: point.worst[0], lambda point: point.mean[0])
            )
            cells.append(
                ABSENT
                if worst is None or mean is None
                else f"{estimate_text(worst, digits=2)} / {estimate_text(mean, digits=2)}"
            )
        rows.append([result.label, *cells])
    return table(["", *(f"KL {kl:g}" for kl in EQUAL_KL)], rows)


def beside_recipe_table(results: Mapping[str, LongResult]) -> str:
    """
    Where the methods end beside the recipe, at its KL and after the same steps. Empty while nothing can be compared.
    """
    recipe = results.get(RECIPE)
    rows = []
    for label, own in _comparable(results).items():
        if recipe is None or recipe in own:
            continue
        seeds = [seed for seed in recipe.seeds if all(seed in result.seeds for result in own)]
        pairs = [(_end_at_kl(own, seed, recipe.end_of(seed).kl[0]), recipe.end_of(seed)) for seed in seeds]
        found = [(other, (end.worst[0], end.mean[0])) for other, end in pairs if other is not None]
        if not found:
            continue
        others, ours = np.array([other for other, _ in found]), np.array([end for _, end in found])
        columns = [*others.T[1:], *(ours - others[:, 1:]).T]
        cells = [estimate_text(mean_over_seeds(column), digits=2) for column in columns]
        outside = f" ({len(seeds) - len(found)} outside)" if len(found) < len(seeds) else ""
        rows.append([label, f"{len(found)}{outside}", f"{others[:, 0].mean():.3f}", *cells])
    header = ["", "seeds", "KL", "worst", "mean", "worst of the recipe, minus this", "mean of the recipe, minus this"]
    return table(header, rows) if rows else ""


def _comparable(results: Mapping[str, LongResult]) -> dict[str, list[LongResult]]:
    """
    What stands in a row beside the recipe, by its label: the strengths of a method that are run for it, and each other
    entry with all rewards and a limit to its drift.
    """
    rows: dict[str, list[LongResult]] = {}
    for method, strengths in LONG_STRENGTHS.items():
        own = [results[f"{method}@{strength}"] for strength in strengths if f"{method}@{strength}" in results]
        if len(own) > 1:
            betas = " to ".join(result.entry.partition("@")[2] for result in own)
            rows[f"{LONG_BASES[method].label}, beta {betas}"] = own
        elif own:
            rows[own[0].label] = own
    for entry, result in results.items():
        limited = entry.partition("@")[2] != "0"
        if entry not in LONG_MAIN and limited and len(find_method(entry).rewards) == len(REWARDS):
            rows[result.label] = [result]
    return rows


def _end_at_kl(results: Sequence[LongResult], seed: int, kl: float) -> tuple[float, float, float] | None:
    """
    KL, worst and mean gain of one seed: of the only strength as it is, of several between those whose ends are nearest
    to the KL.
    """
    ends = sorted((own.end_of(seed) for own in results), key=lambda point: point.kl[0])
    if len(ends) == 1:
        return ends[0].kl[0], ends[0].worst[0], ends[0].mean[0]
    kls = [point.kl[0] for point in ends]
    worst = interpolate_at_kl(kls, [point.worst[0] for point in ends], kl)
    mean = interpolate_at_kl(kls, [point.mean[0] for point in ends], kl)
    return None if worst is None or mean is None else (kl, worst, mean)


def cosine_table(results: Mapping[str, LongResult]) -> str:
    """In-sample and held-out cosines; empty if no run has any."""
    rows = []
    for result in results.values():
        inside, held_out = result.cosines("balance/cos"), result.cosines("balance/heldout_cos")
        if inside and held_out:
            cells = [
                f"{inside[name].mean:.2f} / {estimate_text(held_out[name], digits=3)}" if name in held_out else ABSENT
                for name in REWARDS
            ]
            rows.append([result.label, *cells])
    return table(["", *REWARDS], rows) if rows else ""


def _as_json(result: LongResult) -> dict[str, Any]:
    gain, name, step = result.lowest
    return {
        "label": result.label,
        "seeds": result.seeds,
        "ends": [point.numbers() for point in result.ends],
        "curves": [[point.numbers() for point in curve] for curve in result.curves],
        "lowest": {"gain": gain, "reward": name, "step": step},
        "least_rise": result.least_rise,
        "diversity": result.diversity,
        "cosines": {
            key: own and {name: estimate._asdict() for name, estimate in own.items()}
            for key in ("balance/cos", "balance/heldout_cos", "balance/signal")
            for own in [result.cosines(key)]
        },
    }
