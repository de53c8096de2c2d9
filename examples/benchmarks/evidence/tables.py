# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The report's tables, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_marble.evaluation import EvaluationResults
from trl_marble.evaluation.formatting import format_p_value, format_percentage

from .methods import BASE, METHODS, REWARDS, SPECIALISTS, find_method
from .runs import Run, Scale
from .statistics import Estimate, Gain, Gap, best_rate, mean_over_seeds


if TYPE_CHECKING:
    from .report import MethodResult


ABSENT = "–"


def markdown(
    main: Mapping[str, MethodResult],
    ablations: Mapping[str, Mapping[str, MethodResult]],
    gains: Mapping[str, Mapping[float, Gain]],
    rates: Sequence[float],
    base: EvaluationResults,
    runs: Mapping[str, Sequence[Run]],
    scale: Scale,
    unfinished: Sequence[str],
) -> str:
    """The complete report except its pictures; see [`write_report`] for the arguments."""
    seeds = sorted({run.seed for own in runs.values() for run in own})
    parts = ["# Comparison of methods\n"]
    if scale.quick:
        parts.append("**Only a test of the code: runs of this size measure nothing.**\n")
    parts.append(
        f"{scale.steps} optimizer steps per run, seeds {', '.join(map(str, seeds))}. Evaluated on "
        f"{base.settings['num_prompts']} held-out prompts with {base.settings['num_generations']} images each, from "
        "the same noise for every method and seed. Changes are relative to the untrained pipeline.\n"
    )
    if unfinished:
        parts.append(f"Not included, because not all seeds are finished: {', '.join(unfinished)}.\n")
    if gains:
        parts += ["## Learning rates\n", _rates_table(gains, rates)]
    parts += ["## Change of each reward\n", _ERRORS, _changes_table(main)]
    parts += ["## Mean of each reward\n", _means_table(main, base)]
    if any(result.fractions is not None for result in main.values()):
        parts += ["## Fraction of the upper bound\n", _FRACTIONS, _fractions_table(main)]
    against_sum = {name: (result.label, result.gaps["weighted_sum"]) for name, result in main.items() if result.gaps}
    if against_sum:
        parts += ["## More than the weighted sum\n", _GAPS, _gaps_table(against_sum.values())]
    for opponent in (BASE, "weighted_sum"):
        rows = {name: result for name, result in main.items() if opponent in result.wins}
        if rows:
            parts += [f"## Win rate against: {find_method(opponent).label}\n", _WINS, _wins_table(rows, opponent)]
    parts += ["## Cosines\n", _COSINES, _cosines_table(main)]
    for title, rows in ablations.items():
        parts += [f"## Ablation: {title.lower()}\n", _changes_table(rows)]
        if any(result.worst is not None for result in rows.values()):
            parts.append(_fractions_table(rows))
        gaps = [
            (f"{result.label} – {rows[parent].label}", result.gaps[parent])
            for name, result in rows.items()
            if (parent := find_method(name).opponent) in result.gaps
        ]
        parts.append(_gaps_table(gaps))
        parts.append(_cosines_table(rows))
        parts += [_SIGNALS + _signals_table(result) for name, result in rows.items() if name == "cross_gram"]
        parts += [_METRIC + _metric_table(result) for name, result in rows.items() if name == "optimizers_metric"]
    return "\n".join(parts)


_ERRORS = (
    "Mean over seeds ± its standard error over seeds / over held-out prompts. Composite: the mean over rewards of "
    "the z-scores among the methods that train on several rewards, ± standard error over seeds.\n"
)
_FRACTIONS = (
    "Change divided by that of the specialist, which trains on one reward only (means over seeds): 0 is the "
    "untrained pipeline, 1 is what the specialist reached with the same prompts and steps. Worst: the lowest "
    "fraction among the rewards that the method trains on, ± jackknife standard error over seeds. A reward has no "
    "bound if its specialist did not raise it by two standard errors.\n"
)
_GAPS = (
    "Difference between the changes of the same seed, mean over seeds ± its standard error over seeds / over "
    "held-out prompts. Mean: over the rewards that the method trains on, each in standard deviations of the "
    "untrained pipeline's images.\n"
)
_WINS = (
    "Share of the images, over all seeds, that have a higher reward than the other method's image of the same "
    "prompt and noise; ties count half. p: sign test with one vote per prompt.\n"
)
_SIGNALS = (
    "Share of the signal in a gradient's squared norm: the inner product between the gradients of two halves of the "
    "step's images, divided by the squared norm of the complete gradient; mean over steps, ± standard error over "
    "seeds.\n\n"
)
_METRIC = (
    "Cosines in AdamW's metric: between each reward's gradient and AdamW's step for the direction (without "
    "momentum), in the steps of this method. Once for the direction that is the shortest without the metric, and "
    "once for the one that was taken.\n\n"
)
_COSINES = (
    "Cosines between the update and each reward's gradient, over the steps of all seeds that measured them. Methods "
    "that do not compute per-reward gradients have none. Not taken: the weighted sum of the same gradients, in the "
    "same steps.\n"
)


def cosine_figures(histories: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float] | None:
    """
    Statistics of the cosines of all steps that measured them.

    Args:
        histories (`Sequence[Sequence[Mapping[str, Any]]]`):
            What was logged, for each seed.

    Returns:
        `dict` with `steps`, their number; `lowest` and `mean_of_lowest`, of the worst reward of each step;
        `mean`, over rewards too; `conflict`, the share of the steps that go against a reward; `not_taken_lowest` and
        `not_taken_conflict`, of the weighted sum. `None` where no step measured any.
    """
    rows = steps_with_cosines(histories)
    if not rows:
        return None
    other = "balance/weighted_sum"
    return {
        "steps": len(rows),
        **_direction_figures(rows, "balance"),
        "not_taken_lowest": float(np.nanmin([row[f"{other}/cos_min"] for row in rows])),
        "not_taken_conflict": float(np.mean([row[f"{other}/conflict"] for row in rows])),
    }


def steps_with_cosines(
    histories: Sequence[Sequence[Mapping[str, Any]]], prefix: str = "balance"
) -> list[Mapping[str, Any]]:
    """
    The log entries of all steps, over all seeds, that measured the cosines of a direction.

    Args:
        histories (`Sequence[Sequence[Mapping[str, Any]]]`):
            What was logged, for each seed.
        prefix (`str`, *optional*, defaults to `"balance"`):
            Prefix of the direction's metrics.

    Returns:
        The entries, as they were logged.
    """
    key = f"{prefix}/cos_min"
    return [row for history in histories for row in history if math.isfinite(row.get(key, math.nan))]


def _direction_figures(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    lowest = np.array([row[f"{prefix}/cos_min"] for row in rows])
    return {
        "lowest": float(lowest.min()),
        "mean_of_lowest": float(lowest.mean()),
        "mean": float(np.mean([row[f"{prefix}/cos_mean"] for row in rows])),
        "conflict": float(np.mean([row[f"{prefix}/conflict"] for row in rows])),
    }


def _changes_table(results: Mapping[str, MethodResult]) -> str:
    rows = []
    for result in results.values():
        cells = [estimate_text(result.estimates[reward], sign=True) for reward in REWARDS]
        composite = ABSENT if result.composite is None else estimate_text(result.composite, sign=True, digits=2)
        rows.append([result.label, f"{result.learning_rate:g}", *cells, composite])
    return table(["method", "learning rate", *REWARDS, "composite"], rows)


def _means_table(results: Mapping[str, MethodResult], base: EvaluationResults) -> str:
    before = base.summary()
    rows = [[METHODS[BASE].label, *(f"{before[reward][0]:.3f}" for reward in REWARDS)]]
    for result in results.values():
        # From the same images of both, so that the mean is that of the method.
        cells = [f"{before[reward][0] + result.estimates[reward].mean:.3f}" for reward in REWARDS]
        rows.append([result.label, *cells])
    return table(["method", *REWARDS], rows)


def _fractions_table(results: Mapping[str, MethodResult]) -> str:
    rows = []
    for name, result in results.items():
        if result.fractions is None or name in SPECIALISTS.values():
            continue
        cells = [_number(result.fractions[reward], ".2f") for reward in REWARDS]
        worst = ABSENT
        if result.worst is not None and result.worst.reward is not None:
            number = Estimate(result.worst.fraction, result.worst.seed_error)
            worst = f"{estimate_text(number, digits=2)} ({REWARDS[result.worst.reward]})"
        rows.append([result.label, *cells, worst])
    return table(["method", *REWARDS, "worst"], rows)


def _gaps_table(gaps: Iterable[tuple[str, Gap]]) -> str:
    rows = [
        [label, *(estimate_text(reward, sign=True) for reward in gap.rewards), estimate_text(gap.mean, sign=True)]
        for label, gap in gaps
    ]
    return table(["", *REWARDS, "mean"], rows)


def _wins_table(results: Mapping[str, MethodResult], opponent: str) -> str:
    rows = []
    for result in results.values():
        wins = [result.wins[opponent][reward] for reward in REWARDS]
        rows.append([result.label, *(f"{format_percentage(w.win_rate)}{_p_value(w.p_value)}" for w in wins)])
    return table(["method", *REWARDS], rows)


def _cosines_table(results: Mapping[str, MethodResult]) -> str:
    rows = []
    for result in results.values():
        figures = cosine_figures(result.histories)
        if figures is None or len(result.trained) < 2:
            continue
        cosines = [figures[key] for key in ("lowest", "mean_of_lowest", "mean")]
        shown = [f"{value:+.2f}" for value in cosines] + [format_percentage(figures["conflict"])]
        not_taken = [f"{figures['not_taken_lowest']:+.2f}", format_percentage(figures["not_taken_conflict"])]
        rows.append([result.label, str(figures["steps"]), *shown, *not_taken])
    header = ["method", "steps", "lowest", "mean of each step's lowest", "mean", "steps in conflict"]
    return table([*header, "not taken: lowest", "not taken: steps in conflict"], rows)


def _signals_table(result: MethodResult) -> str:
    cells = []
    for reward in REWARDS:
        key = f"experiment/signal/{reward}"
        seeds = [np.nanmean([row[key] for row in history if key in row]) for history in result.histories]
        cells.append(estimate_text(mean_over_seeds(np.array(seeds)), digits=2))
    return table(["", *REWARDS], [["signal", *cells]])


def _metric_table(result: MethodResult) -> str:
    rows = []
    for label, prefix in (("without the metric", "experiment/step_plain"), ("taken", "experiment/step_taken")):
        steps = steps_with_cosines(result.histories, prefix)
        figures = _direction_figures(steps, prefix)
        cosines = [f"{figures[key]:+.2f}" for key in ("lowest", "mean_of_lowest")]
        rows.append([label, str(len(steps)), *cosines, format_percentage(figures["conflict"])])
    return table(["direction", "steps", "lowest", "mean of each step's lowest", "steps in conflict"], rows)


def _rates_table(gains: Mapping[str, Mapping[float, Gain]], rates: Sequence[float]) -> str:
    text = (
        "Chosen once per method, with a separate seed, on prompts of the train split: the rate with the greatest mean "
        "change of the method's rewards, in standard deviations of the untrained pipeline's images, among those with "
        "which none of them fell. In brackets: the reward that changed least. Bold: the chosen rate. Beyond a rate at "
        "the edge of the grid there may be a better one.\n\n"
    )
    rows = []
    for name, found in gains.items():
        best = best_rate(found) if len(found) == len(rates) else None
        cells = [f"{found[rate].mean:+.3f} ({found[rate].least:+.3f})" if rate in found else ABSENT for rate in rates]
        cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]
        at_edge = best is not None and best in (min(rates), max(rates))
        rows.append([find_method(name).label, *cells, "yes" if at_edge else "no" if best is not None else ABSENT])
    return text + table(["method", *(f"{rate:g}" for rate in rates), "at the edge"], rows)


def estimate_text(value: Estimate, sign: bool = False, digits: int = 3) -> str:
    """A mean with its errors: over seeds, and over prompts where there is one."""
    shown = f"{value.mean:{'+' if sign else ''}.{digits}f} ± {_number(value.seed_error, f'.{digits}f')}"
    return shown if math.isnan(value.prompt_error) else f"{shown} / {value.prompt_error:.{digits}f}"


def _number(value: float, form: str) -> str:
    return ABSENT if math.isnan(value) else f"{value:{form}}"


def _p_value(value: float) -> str:
    if math.isnan(value):  # no prompt changed
        return ""
    shown = format_p_value(value)
    return f" (p {shown})" if shown.startswith("<") else f" (p = {shown})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first hold numbers."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
