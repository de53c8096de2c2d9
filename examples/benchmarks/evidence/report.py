# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Make a folder with `report.md`, `results.json` and pictures from the finished runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trl_marble.evaluation import EvaluationResults, WinCount, count_wins
from trl_marble.evaluation.records import write_atomically

from . import pictures, tables
from .methods import ABLATIONS, BASE, METHODS, REWARDS, SPECIALISTS, VARIANTS, find_method
from .runs import MAIN, TUNING, Run, Scale, base_run, load_report, load_scores
from .statistics import (
    Estimate,
    Gain,
    Gap,
    WorstReward,
    best_rate,
    compare_changes,
    composites,
    gain,
    mean_change,
    reached_fractions,
    upper_bound_is_known,
    worst_reward,
)


@dataclass(frozen=True)
class MethodResult:
    """
    The results of one method.

    Args:
        label (`str`):
            Its name in tables and pictures.
        trained (`tuple[str, ...]`):
            The rewards that it trains on.
        learning_rate (`float`):
            The chosen learning rate.
        differences (`np.ndarray` of shape `[S, N, K]`):
            Rewards of the held-out images minus those of the untrained pipeline; NaN where they do not apply.
        changes (`np.ndarray` of shape `[S, K]`):
            Means of `differences` over the images.
        estimates (`dict[str, Estimate]`):
            Change of each reward, with both standard errors.
        wins (`dict[str, dict[str, WinCount]]`):
            Name of the opponent -> reward -> how often the method's image was better, over all seeds.
        gaps (`dict[str, Gap]`):
            Name of another method -> how much more the rewards changed than with that one.
        histories (`list[list[dict]]`):
            The logs of each seed.
        results (`list[EvaluationResults]`):
            The evaluation of each seed.
        composite (`Estimate` or `None`):
            See [`composites`], among the methods of its table; `None` for a specialist, and if the methods do not
            all train on the same rewards.
        fractions (`dict[str, float]` or `None`):
            Reward -> fraction of the upper bound, see [`reached_fractions`]; `None` if a specialist is missing.
        worst (`WorstReward` or `None`):
            See [`worst_reward`]; `None` if a specialist is missing, and for a specialist.
    """

    label: str
    trained: tuple[str, ...]
    learning_rate: float
    differences: np.ndarray
    changes: np.ndarray
    estimates: dict[str, Estimate]
    wins: dict[str, dict[str, WinCount]]
    gaps: dict[str, Gap]
    histories: list[list[dict[str, Any]]]
    results: list[EvaluationResults]
    composite: Estimate | None = None
    fractions: dict[str, float] | None = None
    worst: WorstReward | None = None

    @property
    def trained_places(self) -> list[int]:
        """The indices in `REWARDS` of the rewards that it trains on."""
        return [k for k, reward in enumerate(REWARDS) if reward in self.trained]


def tuning_gains(
    methods: Sequence[str], rates: Sequence[float], seed: int, scale: Scale, output_dir: Path
) -> dict[str, dict[float, Gain]]:
    """Method -> learning rate -> gain, from the finished tuning runs."""
    base = base_run(TUNING, scale)
    gains: dict[str, dict[float, Gain]] = {}
    for name in methods:
        for rate in rates:
            run = Run(TUNING, name, rate, seed, scale)
            if not (base.is_finished(output_dir) and run.is_finished(output_dir)):
                continue
            before, after = load_scores(base, output_dir).table, load_scores(run, output_dir).table
            trained = find_method(name).rewards
            changes = {reward: float((after[reward] - before[reward]).mean()) for reward in trained}
            spreads = {reward: float(before[reward].std()) for reward in trained}
            gains.setdefault(name, {})[rate] = gain(changes, spreads)
    return gains


def choose_rates(gains: Mapping[str, Mapping[float, Gain]], rates: Sequence[float]) -> dict[str, float]:
    """The learning rate of each method whose tuning runs are all finished."""
    if len(rates) == 1:
        return {name: rates[0] for name in METHODS}
    return {name: best_rate(found) for name, found in gains.items() if set(found) == set(rates)}


def collect(runs: Mapping[str, Sequence[Run]], scale: Scale, output_dir: Path) -> dict[str, MethodResult]:
    """The methods whose seeds are all finished, without the comparisons between methods."""
    base = load_scores(base_run(MAIN, scale), output_dir)
    groups = base.groups
    before = base.table[list(REWARDS)].to_numpy()
    collected: dict[str, MethodResult] = {}
    after: dict[str, np.ndarray] = {BASE: before[None]}
    for name, own in runs.items():
        if not own or not all(run.is_finished(output_dir) for run in own):
            continue
        reports = [load_report(run, output_dir) for run in own]
        results = [load_scores(run, output_dir) for run in own]
        after[name] = np.stack([result.table[list(REWARDS)].to_numpy() for result in results])
        differences = after[name] - before
        collected[name] = MethodResult(
            label=find_method(name).label,
            trained=find_method(name).rewards,
            learning_rate=own[0].learning_rate,
            differences=differences,
            changes=np.nanmean(differences, axis=1),
            estimates={reward: mean_change(differences[:, :, k], groups) for k, reward in enumerate(REWARDS)},
            wins={},
            gaps={},
            histories=[report["history"] for report in reports],
            results=results,
        )
    spreads = np.nanstd(before, axis=0, ddof=1)
    for name, result in collected.items():
        for opponent in (BASE, "weighted_sum"):
            if opponent in after and opponent != name:
                result.wins[opponent] = _pooled_wins(after[opponent], after[name], groups)
        for other in dict.fromkeys(("weighted_sum", find_method(name).opponent)):
            if other in collected and other != name and name not in SPECIALISTS.values():
                differences = result.differences - collected[other].differences
                result.gaps[other] = compare_changes(differences, groups, spreads, result.trained_places)
    return collected


def compare_with_specialists(
    results: Mapping[str, MethodResult], specialists: Mapping[str, MethodResult]
) -> dict[str, MethodResult]:
    """Complete the methods of one table: composites, and fractions of the upper bounds."""
    names = [name for name in results if name not in SPECIALISTS.values()]
    scores: dict[str, Estimate] = {}
    if len(names) > 1 and len({results[name].trained for name in names}) == 1:
        stacked = np.stack([results[name].changes for name in names])
        scores = dict(zip(names, composites(stacked), strict=True))
    bounds = _bounds(specialists)
    completed: dict[str, MethodResult] = {}
    for name, result in results.items():
        if bounds is not None:
            fractions = reached_fractions(result.changes, bounds)
            result = replace(result, fractions=dict(zip(REWARDS, fractions.tolist(), strict=True)))
        if bounds is not None and name in names:
            trained = result.trained_places
            worst = worst_reward(result.changes[:, trained], bounds[:, trained])
            place = None if worst.reward is None else trained[worst.reward]
            result = replace(result, worst=worst._replace(reward=place))
        completed[name] = replace(result, composite=scores.get(name))
    return completed


def write_report(
    runs: Mapping[str, Sequence[Run]],
    gains: Mapping[str, Mapping[float, Gain]],
    rates: Sequence[float],
    scale: Scale,
    output_dir: Path,
) -> Path:
    """
    Write the report of the finished runs.

    Args:
        runs (`Mapping[str, Sequence[Run]]`):
            Method or variant -> its runs, one per seed.
        gains (`Mapping[str, Mapping[float, Gain]]`):
            See [`tuning_gains`].
        rates (`Sequence[float]`):
            The learning rates that were tried.
        scale ([`Scale`]):
            How large runs and evaluations are.
        output_dir (`Path`):
            The folder with the runs.

    Returns:
        `Path`: `report.md`, in the folder `report` with the other files.

    Raises:
        `FileNotFoundError`: if no method of the main table is finished.
    """
    collected = collect(runs, scale, output_dir)
    specialists = {name: result for name, result in collected.items() if name in SPECIALISTS.values()}
    main = compare_with_specialists(
        {name: result for name, result in collected.items() if name in METHODS}, specialists
    )
    if not main:
        raise FileNotFoundError(f"`{output_dir}` has no method of which all seeds are finished; run the stage `main`.")
    ablations: dict[str, dict[str, MethodResult]] = {}
    for title, variants in ABLATIONS.items():
        found = [name for name in variants if name in collected]
        if found:
            parents = dict.fromkeys(find_method(name).tuned_as or name for name in variants)
            rows = {name: collected[name] for name in (*parents, *found) if name in collected}
            ablations[title] = compare_with_specialists(rows, specialists)

    base = load_scores(base_run(MAIN, scale), output_dir)
    folder = output_dir / "report"
    unfinished = [name for name in runs if name not in collected]
    text = tables.markdown(main, ablations, gains, rates, base, runs, scale, unfinished)
    images = {
        "curves.png": pictures.plot_curves(main, folder / "curves.png"),
        "changes.png": pictures.plot_changes(main, folder / "changes.png"),
        "cosines.png": pictures.plot_cosines({**main, **_all(ablations)}, folder / "cosines.png"),
        "images.png": pictures.draw_images(base, main, folder / "images.png"),
    }
    text += "".join(f"\n![{description}]({name})\n" for name, description in images.items() if description)
    write_atomically(folder / "report.md", text.encode())
    content = {
        "scale": vars(scale),
        "learning_rates": {
            "grid": list(rates),
            "gains": {name: {rate: own._asdict() for rate, own in found.items()} for name, found in gains.items()},
        },
        "base": {name: {"mean": mean, "prompt_error": error} for name, (mean, error) in base.summary().items()},
        "main": {name: _as_json(result) for name, result in main.items()},
        "ablations": {
            title: {name: _as_json(result) for name, result in rows.items()} for title, rows in ablations.items()
        },
        "unfinished": unfinished,
    }
    write_atomically(folder / "results.json", json.dumps(_without_nan(content), indent=2).encode())
    return folder / "report.md"


def _bounds(specialists: Mapping[str, MethodResult]) -> np.ndarray | None:
    """Change of each specialist's own reward, `[S, K]`, NaN if it is no bound; `None` if a specialist is missing."""
    if len(specialists) < len(REWARDS):
        return None
    columns = []
    for k, reward in enumerate(REWARDS):
        result = specialists[SPECIALISTS[reward]]
        known = upper_bound_is_known(result.estimates[reward])
        columns.append(result.changes[:, k] if known else np.full(len(result.changes), math.nan))
    return np.stack(columns, axis=1)


def _pooled_wins(before: np.ndarray, after: np.ndarray, groups: np.ndarray) -> dict[str, WinCount]:
    """Wins of `after` `[S, N, K]` over `before` `[S or 1, N, K]`; each prompt has one vote over all seeds."""
    before = np.broadcast_to(before, after.shape)
    return {
        reward: count_wins(before[:, :, k].ravel(), after[:, :, k].ravel(), np.tile(groups, len(after)))
        for k, reward in enumerate(REWARDS)
    }


def _all(ablations: Mapping[str, Mapping[str, MethodResult]]) -> dict[str, MethodResult]:
    return {name: result for rows in ablations.values() for name, result in rows.items() if name in VARIANTS}


def _as_json(result: MethodResult) -> dict[str, Any]:
    worst = result.worst
    return {
        "label": result.label,
        "trained_on": list(result.trained),
        "learning_rate": result.learning_rate,
        "changes": {reward: estimate._asdict() for reward, estimate in result.estimates.items()},
        "changes_by_seed": dict(zip(REWARDS, result.changes.T.tolist(), strict=True)),
        "wins": {
            opponent: {reward: count._asdict() for reward, count in wins.items()}
            for opponent, wins in result.wins.items()
        },
        "composite": None if result.composite is None else result.composite._asdict(),
        "reached_fractions": result.fractions,
        "worst_reward": None
        if worst is None
        else worst._asdict() | {"reward": None if worst.reward is None else REWARDS[worst.reward]},
        "gaps": {
            other: {reward: estimate._asdict() for reward, estimate in zip(REWARDS, gap.rewards, strict=True)}
            | {"mean_in_standard_deviations": gap.mean._asdict()}
            for other, gap in result.gaps.items()
        },
        "cosines": tables.cosine_figures(result.histories),
    }


def _without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN: `None` in its place."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
