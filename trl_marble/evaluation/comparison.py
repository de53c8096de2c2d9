# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The differences between several evaluations of the same prompts and seeds."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .formatting import format_p_value, format_percentage, format_value, format_with_error
from .gain_plot import gains_table
from .gains import GainPoint
from .results import OVERALL, EvaluationResults, geneval_names, mean_over_tasks
from .statistics import WinCount
from .summary import SIGNIFICANT


@dataclass(frozen=True, eq=False)
class EvaluationComparison:
    """
    The differences between pipelines on the same prompts and seeds. Made by [`compare_evaluations`].

    Args:
        evaluations (`dict[str, EvaluationResults]`):
            The evaluations by name; the first one is the baseline.
        changes (`dict[str, dict[str, tuple[float, float]]]`):
            Name of an evaluation (all but the baseline) -> reward name -> mean of the reward of its images minus that
            of the baseline's images of the same prompts and seeds, over the pairs in which both have the reward, and
            the standard error of that mean, over prompts.
        win_rates (`dict[str, dict[str, WinCount]]`):
            Name of an evaluation (all but the baseline) -> reward name -> how often its image was better, and the sign
            test over prompts, see [`WinCount`].
        composite (`dict[str, float]`):
            Name of an evaluation -> mean of its z-scores, see [`composite_scores`].
        diversity (`dict[str, tuple[float, float]]`):
            Name of an evaluation -> diversity within a prompt and its standard error, see
            [`EvaluationResults.diversity`].
        diversity_changes (`dict[str, tuple[float, float]]`):
            Name of an evaluation (all but the baseline) -> mean over prompts of its diversity minus the baseline's,
            and the standard error.
        gains (`dict[str, GainPoint]`):
            Name of an evaluation -> its gains over the baseline in standard deviations of the baseline's images, on
            how many prompts all rewards rose together, and the KL to the base model that it was paid with. The KL is
            NaN where it was not measured, see [`EvaluationResults.kl_to_base`], or is one to another base model than
            the baseline's; 0 where the evaluation is of that model itself.
    """

    evaluations: dict[str, EvaluationResults]
    changes: dict[str, dict[str, tuple[float, float]]]
    win_rates: dict[str, dict[str, WinCount]]
    composite: dict[str, float]
    diversity: dict[str, tuple[float, float]]
    diversity_changes: dict[str, tuple[float, float]]
    gains: dict[str, GainPoint]

    @property
    def baseline(self) -> str:
        """Name of the evaluation that the others are compared with."""
        return next(iter(self.evaluations))

    @property
    def reward_names(self) -> list[str]:
        """The rewards of all evaluations."""
        return self.evaluations[self.baseline].reward_names

    def measured_gains(self) -> dict[str, list[GainPoint]]:
        """The gains of those evaluations that have a KL; empty if there is none but the base model itself."""
        known = {name: [point] for name, point in self.gains.items() if not math.isnan(point.kl[0])}
        return known if any(points[0].kl[0] > 0 for points in known.values()) else {}

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
        The comparison as a table, which is written to `comparison.csv`.

        Returns:
            `pandas.DataFrame`: one row for each reward and evaluation with the columns `reward`, `evaluation`, `mean`,
            `standard_error`, `change`, `change_standard_error`, the fields of [`WinCount`], and `gain` with
            `gain_standard_error` (the change in standard deviations of the baseline's images), which are empty for
            the baseline; and of the evaluation as a whole `kl`, `joint_gain` and `joint_fall`, each with its
            `..._standard_error`.
        """
        frame = pd.DataFrame(self.rows())
        for what in ("kl", "joint_gain", "joint_fall"):
            pairs = [getattr(self.gains[name], what) for name in frame["evaluation"]]
            frame[what], frame[f"{what}_standard_error"] = zip(*pairs, strict=True)
        counts = [name for name, kind in WinCount.__annotations__.items() if kind is int]
        return frame.astype(dict.fromkeys(counts, "Int64"))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of [`~EvaluationComparison.to_frame`]; those of the baseline have no change."""
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
                    row["gain"], row["gain_standard_error"] = self.gains[name].gains[reward]
                rows.append(row)
        return rows

    def to_table(self) -> Table:
        """
        A table for the terminal: for each reward one row per evaluation, then GenEval's overall score if it is one of
        the rewards (see [`EvaluationResults.geneval_overall`]), the diversity and the composite scores.

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

    def to_gains_table(self) -> Table:
        """A table for the terminal: KL to the base model, worst and mean gain and joint gain of each evaluation."""
        return gains_table({name: [point] for name, point in self.gains.items() if name != self.baseline})

    def print_table(self) -> None:
        """Print [`~EvaluationComparison.to_table`] and [`~EvaluationComparison.to_gains_table`]."""
        Console().print(self.to_table())
        Console().print(self.to_gains_table())


def _change_cell(change: tuple[float, float]) -> Text:
    """A mean change with its error, in colour from two standard errors on."""
    mean, error = change
    ratio = mean / error if error > 0 else np.nan
    style = "green" if ratio >= SIGNIFICANT else "red" if ratio <= -SIGNIFICANT else ""
    return Text(format_with_error(change, sign=True), style=style)
