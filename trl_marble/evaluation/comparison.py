# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Several evaluations side by side: same prompts, same seeds, same rewards."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .contact_sheet import write_contact_sheet
from .formatting import format_p_value, format_percentage, format_value, format_with_error
from .measures import RewardMean, WinRate
from .records import write_atomically
from .results import (
    CONTACT_SHEET_FILE,
    OVERALL,
    EvaluationResults,
    geneval_names,
    mean_over_tasks,
    to_json,
)
from .statistics import WinCount, clustered_mean, composite_scores
from .summary import SIGNIFICANT


# Settings that say which pipeline was evaluated, or do not touch the images but by a rounding.
FREE_SETTINGS = ("pipeline", "pipeline_digest", "adapter", "adapter_digest", "batch_size")


@dataclass(frozen=True, eq=False)
class EvaluationComparison:
    """
    How several pipelines differ on the same prompts and seeds. Made by [`compare_evaluations`].

    Args:
        evaluations (`dict[str, EvaluationResults]`):
            The evaluations by name; the first one is the baseline.
        changes (`dict[str, dict[str, tuple[float, float]]]`):
            Name of an evaluation (all but the baseline) -> reward name -> mean of its images' rewards minus those of
            the baseline's images of the same prompts and seeds, over the pairs in which both have one, and the
            standard error of that mean, over prompts.
        win_rates (`dict[str, dict[str, WinCount]]`):
            Name of an evaluation (all but the baseline) -> reward name -> how often its image was the better one, and
            the sign test over prompts, see [`WinCount`].
        composite (`dict[str, float]`):
            Name of an evaluation -> mean of its z-scores, see [`composite_scores`].
        diversity (`dict[str, tuple[float, float]]`):
            Name of an evaluation -> diversity within a prompt and its standard error, see
            [`EvaluationResults.diversity`].
        diversity_changes (`dict[str, tuple[float, float]]`):
            Name of an evaluation (all but the baseline) -> mean over prompts of its diversity minus the baseline's,
            and the standard error.
    """

    evaluations: dict[str, EvaluationResults]
    changes: dict[str, dict[str, tuple[float, float]]]
    win_rates: dict[str, dict[str, WinCount]]
    composite: dict[str, float]
    diversity: dict[str, tuple[float, float]]
    diversity_changes: dict[str, tuple[float, float]]

    @property
    def baseline(self) -> str:
        """Name of the evaluation that the others are compared with."""
        return next(iter(self.evaluations))

    @property
    def reward_names(self) -> list[str]:
        """The rewards of all evaluations."""
        return self.evaluations[self.baseline].reward_names

    def averages(self, column: str) -> pd.DataFrame:
        """
        The changes for the prompts of each source or tag.

        Args:
            column (`str`):
                `"source"` or `"tag"`.

        Returns:
            `pandas.DataFrame`: one row for each evaluation but the baseline, each value of the column and each reward,
            with the columns `evaluation`, `<column>`, `reward`, `mean` (of the changes), `standard_error` and
            `num_images` (pairs in which both images have a reward).

        Raises:
            `ValueError`: if the prompt set has no such column.
        """
        before = self.evaluations[self.baseline]
        parts = []
        for name in self.changes:
            after = self.evaluations[name]
            table = before.table.assign(**{r: after.table[r] - before.table[r] for r in self.reward_names})
            part = dataclasses.replace(after, table=table).averages(column)
            part.insert(0, "evaluation", name)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def to_frame(self) -> pd.DataFrame:
        """
        The comparison as it is written to `comparison.csv`.

        Returns:
            `pandas.DataFrame`: one row for each reward and evaluation with the columns `reward`, `evaluation`, `mean`,
            `standard_error`, `change`, `change_standard_error` and the fields of [`WinCount`]; empty for the baseline
            from `change` on.
        """
        frame = pd.DataFrame(self._rows())
        counts = [name for name, kind in WinCount.__annotations__.items() if kind is int]
        return frame.astype(dict.fromkeys(counts, "Int64"))

    def _rows(self) -> list[dict[str, Any]]:
        summaries = {name: results.summary() for name, results in self.evaluations.items()}
        rows: list[dict[str, Any]] = []
        for reward in self.reward_names:
            for name, summary in summaries.items():
                mean, error = summary[reward]
                row = {"reward": reward, "evaluation": name, "mean": mean, "standard_error": error}
                if name != self.baseline:
                    change, change_error = self.changes[name][reward]
                    row |= {"change": change, "change_standard_error": change_error}
                    row |= self.win_rates[name][reward]._asdict()
                rows.append(row)
        return rows

    def to_table(self) -> Table:
        """
        A table for the terminal: for each reward a row an evaluation, then GenEval's overall score where it is a
        reward (see [`EvaluationResults.geneval_overall`]), the diversity and the composite scores.

        Changes of at least two standard errors are green where the value rose and red where it fell.
        """
        table = Table(title=f"Compared with {self.baseline}", title_justify="left", title_style="bold")
        table.add_column("Reward")
        table.add_column("Evaluation")
        for header in ("Mean", "Change", "Win rate", "p"):
            table.add_column(header, justify="right")
        for reward in self.reward_names:
            for name, results in self.evaluations.items():
                first = Text(reward if name == self.baseline else "")
                mean = format_value(results.summary()[reward][0])
                if name == self.baseline:
                    table.add_row(first, Text(name), mean)
                    continue
                wins = self.win_rates[name][reward]
                cells = [format_percentage(wins.win_rate), format_p_value(wins.p_value)]
                table.add_row(first, Text(name), mean, _change_cell(self.changes[name][reward]), *cells)
            table.add_section()
        for reward in geneval_names(self.evaluations[self.baseline]):
            changes = self.averages("tag")
            for name, results in self.evaluations.items():
                first = Text(f"{reward}, {OVERALL}" if name == self.baseline else "")
                mean = format_value(results.geneval_overall()[reward][0])
                own = changes[changes["evaluation"] == name]
                changed = [] if name == self.baseline else [_change_cell(mean_over_tasks(own, reward))]
                table.add_row(first, Text(name), mean, *changed)
            table.add_section()
        for name, value in self.diversity.items():
            first = Text("diversity" if name == self.baseline else "")
            changed = [] if name == self.baseline else [_change_cell(self.diversity_changes[name])]
            table.add_row(first, Text(name), format_value(value[0]), *changed)
        table.add_section()
        for name, score in self.composite.items():
            table.add_row("composite" if name == self.baseline else "", Text(name), f"{score:+.3f}")
        return table

    def print_table(self) -> None:
        """Print [`~EvaluationComparison.to_table`]."""
        Console().print(self.to_table())

    def save(self, folder: str | Path) -> None:
        """
        Write `comparison.json`, `comparison.csv` and `contact_sheet.html`.

        The contact sheet shows the images where the evaluations left them: move the folders together or not at all.

        Args:
            folder (`str` or `Path`):
                Where to; made if missing.

        Raises:
            `ValueError`: if it is the folder of one of the evaluations, whose contact sheet would be lost.
        """
        folder = Path(folder)
        for name, results in self.evaluations.items():
            if results.folder.resolve() == folder.resolve():
                raise ValueError(f"`{folder}` is the folder of the evaluation {name!r}; pass another `output_dir`.")
        rewards: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows():
            rewards.setdefault(row.pop("reward"), []).append(row)
        content = {
            "baseline": self.baseline,
            "evaluations": {name: results.settings for name, results in self.evaluations.items()},
            "rewards": rewards,
            "composite": self.composite,
            "diversity": _named_errors(self.diversity),
            "diversity_changes": _named_errors(self.diversity_changes),
        }
        write_atomically(folder / "comparison.json", to_json(content))
        write_atomically(
            folder / "comparison.csv", self.to_frame().to_csv(index=False, lineterminator="\n").encode("utf-8")
        )
        write_contact_sheet(self.evaluations, folder / CONTACT_SHEET_FILE, self)


def compare_evaluations(
    evaluations: Mapping[str, EvaluationResults],
    output_dir: str | Path | None = None,
    may_differ: Collection[str] = (),
) -> EvaluationComparison:
    """
    Compare pipelines, or adapters of one, on the same prompts and seeds.

    Args:
        evaluations (`Mapping[str, EvaluationResults]`):
            At least two evaluations by name; the others are compared with the first.
        output_dir (`str` or `Path`, *optional*):
            Where to write `comparison.json`, `comparison.csv` and `contact_sheet.html`. Defaults to writing nothing.
        may_differ (`Collection[str]`, *optional*, defaults to `()`):
            Settings of sampling that are compared themselves, such as `"guidance_scale"`.

    Returns:
        [`EvaluationComparison`]

    Raises:
        `ValueError`: if there are fewer than two evaluations, or they differ in prompts, seeds, rewards or other
            settings of sampling.
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
            pair = [results.table[reward].to_numpy() for results in (before, after)]
            changed = RewardMean().compute(data=pair[1] - pair[0], groups=before.groups)
            changes[name][reward] = changed["mean"], changed["standard_error"]
            counted = WinRate().compute(predictions1=pair[0], predictions2=pair[1], groups=before.groups)
            win_rates[name][reward] = WinCount(**counted)
        difference = np.array(after.prompt_diversity) - np.array(before.prompt_diversity)
        diversity_changes[name] = clustered_mean(difference, np.arange(len(difference)))
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
    )
    if output_dir is not None:
        comparison.save(output_dir)
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


def _change_cell(change: tuple[float, float]) -> Text:
    mean, error = change
    ratio = mean / error if error > 0 else np.nan
    style = "green" if ratio >= SIGNIFICANT else "red" if ratio <= -SIGNIFICANT else ""
    return Text(format_with_error(change, sign=True), style=style)


def _named_errors(values: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in values.items()}
