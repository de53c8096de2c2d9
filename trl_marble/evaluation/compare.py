# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Compare several evaluations of the same prompts, seeds and rewards."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..extras import has_extra
from .comparison import EvaluationComparison
from .contact_sheet import write_contact_sheet
from .gain_plot import GAINS_FILE, plot_gains
from .gains import GainPoint, measure_gains
from .records import write_atomically
from .results import CONTACT_SHEET_FILE, EvaluationResults, to_json
from .statistics import WinCount, clustered_mean, composite_scores, count_wins


logger = logging.get_logger(__name__)

# Settings that say which pipeline was evaluated, or change the images by rounding errors only.
FREE_SETTINGS = ("pipeline", "pipeline_digest", "base_digest", "adapter", "adapter_digest", "batch_size")


def compare_evaluations(
    evaluations: Mapping[str, EvaluationResults],
    output_dir: str | Path | None = None,
    may_differ: Collection[str] = (),
) -> EvaluationComparison:
    """
    Compare pipelines, or adapters of one, on the same prompts and seeds.

    Args:
        evaluations (`Mapping[str, EvaluationResults]`):
            At least two evaluations by name; all others are compared with the first.
        output_dir (`str` or `Path`, *optional*):
            Where to write `comparison.json`, `comparison.csv`, `contact_sheet.html` and, if an evaluation has a KL to
            the base model, `gain_against_kl.png` (with the extra `plots`). Defaults to writing nothing.
            The contact sheet links to the images of the evaluations: move all folders together or none.
        may_differ (`Collection[str]`, *optional*, defaults to `()`):
            Settings of sampling that may be different, such as `"guidance_scale"` to compare two of its values.

    Returns:
        [`EvaluationComparison`]

    Raises:
        `ValueError`: there are fewer than two evaluations; they differ in prompts, seeds, rewards or other settings of
            sampling; or `output_dir` is the folder of one of them, whose contact sheet would be lost.
    """
    if len(evaluations) < 2:
        raise ValueError(f"There are {len(evaluations)} evaluations; pass at least two, the baseline first.")
    (baseline, before), *others = evaluations.items()
    changes: dict[str, dict[str, tuple[float, float]]] = {}
    win_rates: dict[str, dict[str, WinCount]] = {}
    diversity_changes: dict[str, tuple[float, float]] = {}
    for name, after in others:
        _check_comparable(baseline, before, name, after, may_differ)
        changes[name], win_rates[name] = {}, {}
        for reward in before.reward_names:
            first, second = (results.table[reward].to_numpy() for results in (before, after))
            changes[name][reward] = clustered_mean(second - first, before.groups)
            win_rates[name][reward] = count_wins(first, second, before.groups)
        difference = np.array(after.prompt_diversity) - np.array(before.prompt_diversity)
        diversity_changes[name] = clustered_mean(difference, np.arange(len(difference)))
    gains = {name: compare_gains(before, after) for name, after in evaluations.items()}
    means = {
        name: {reward: mean for reward, (mean, _) in results.summary().items()}
        for name, results in evaluations.items()
    }
    comparison = EvaluationComparison(
        evaluations=dict(evaluations),
        changes=changes,
        win_rates=win_rates,
        composite=composite_scores(means),
        diversity={name: results.diversity() for name, results in evaluations.items()},
        diversity_changes=diversity_changes,
        gains=gains,
    )
    if output_dir is not None:
        _save(comparison, Path(output_dir))
    return comparison


def _check_comparable(
    baseline: str, before: EvaluationResults, name: str, after: EvaluationResults, may_differ: Collection[str]
) -> None:
    keys = [key for key in {**before.settings, **after.settings} if key not in (*FREE_SETTINGS, *may_differ)]
    differing = [
        f"`{key}` is {before.settings.get(key)!r} in {baseline!r} and {after.settings.get(key)!r} in {name!r}"
        for key in keys
        if before.settings.get(key) != after.settings.get(key)
    ]
    if len(before.table) == len(after.table):
        changed = np.flatnonzero((before.table["prompt"] != after.table["prompt"]).to_numpy())
        if len(changed):
            texts = [results.table["prompt"].iloc[changed[0]] for results in (before, after)]
            row = before.table["prompt_index"].iloc[changed[0]]
            differing.append(f"prompt {row} is {texts[0]!r} in {baseline!r} and {texts[1]!r} in {name!r}")
        elif (before.table["seed"] != after.table["seed"]).any():
            differing.append("the seeds of the images differ")
    if differing:
        raise ValueError(
            f"{baseline!r} and {name!r} cannot be compared: {'; '.join(differing)}. Evaluate both with the same "
            "settings."
        )


def compare_gains(before: EvaluationResults, after: EvaluationResults, held_out: Collection[str] = ()) -> GainPoint:
    """
    The gains of an evaluation over the baseline, which has none, and its KL to the baseline's base model. Rewards that
    are held out do not count in what is said of all together.
    """
    first, second = (
        {name: results.table[name].to_numpy(dtype=float) for name in before.reward_names}
        for results in (before, after)
    )
    return measure_gains(first, second, before.groups, _kl_to_base(before, after), held_out)


def _kl_to_base(before: EvaluationResults, results: EvaluationResults) -> tuple[float, float]:
    """
    The KL of an evaluation to the pipeline that the baseline's adapter is on, or that the baseline is; NaN if it is
    another pipeline than that with an adapter, such as one that was fused or trained in all of its weights.
    """
    base = before.settings.get("base_digest")
    if base is None or results.settings.get("base_digest") != base:
        return math.nan, math.nan
    if (kl := results.kl_to_base()) is not None:
        return kl
    is_base = results.settings["pipeline_digest"] == base and results.settings.get("adapter_digest") is None
    return (0.0, 0.0) if is_base else (math.nan, math.nan)


def _save(comparison: EvaluationComparison, folder: Path) -> None:
    for name, results in comparison.evaluations.items():
        if results.folder.resolve() == folder.resolve():
            raise ValueError(f"`{folder}` is the folder of the evaluation {name!r}; pass another `output_dir`.")
    rewards: dict[str, list[dict[str, Any]]] = {}
    for row in comparison.rows():
        rewards.setdefault(row.pop("reward"), []).append(row)
    content = {
        "baseline": comparison.baseline,
        "evaluations": {name: results.settings for name, results in comparison.evaluations.items()},
        "rewards": rewards,
        "composite": comparison.composite,
        "diversity": _named_errors(comparison.diversity),
        "diversity_changes": _named_errors(comparison.diversity_changes),
        "gains": {name: point.numbers() for name, point in comparison.gains.items()},
    }
    write_atomically(folder / "comparison.json", to_json(content))
    table = comparison.to_frame().to_csv(index=False, lineterminator="\n")
    write_atomically(folder / "comparison.csv", table.encode("utf-8"))
    write_contact_sheet(comparison.evaluations, folder / CONTACT_SHEET_FILE, comparison)
    curves = comparison.measured_gains()
    if curves and has_extra("plots"):
        plot_gains(curves, folder / GAINS_FILE)
    elif curves:
        logger.warning(f"There is no `{GAINS_FILE}`: the extra `plots` is not installed.")


def _named_errors(values: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in values.items()}
