# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The results of an evaluation: the scores of all images, their means, and the files that hold them."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .formatting import format_kl, format_with_error
from .records import is_within, write_atomically
from .statistics import clustered_mean, number_prompts


# Columns of the table that are not rewards; the last two only if the prompt set has them.
NUMBER_COLUMNS = ("index", "prompt_index", "generation", "seed")
TEXT_COLUMNS = ("prompt", "image", "source", "tag")
GROUP_COLUMNS = ("source", "tag")
KL_COLUMN = "kl"  # only where the pipeline without its adapter is known
# Settings that other modules use, with their types in JSON.
SETTINGS: dict[str, Any] = {
    "pipeline": str,
    "pipeline_class": str,
    "adapter": str | None,
    "adapter_digest": str | None,
    "num_prompts": int,
    "num_generations": int,
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": int | float,
    "height": int | None,
    "width": int | None,
    "max_sequence_length": int | None,
}
NO_GROUP = "(none)"
OVERALL = "overall (mean over tasks)"

TABLE_FILE = "scores.csv"
SUMMARY_FILE = "evaluation.json"
CONTACT_SHEET_FILE = "contact_sheet.html"


@dataclass(frozen=True, eq=False)
class EvaluationResults:
    """
    The images that a pipeline made for a prompt set, with all rewards of each image.

    Standard errors are taken over prompts, because the images of one prompt are not independent, see
    [`~trl_marble.evaluation.clustered_mean`]. Rows of the prompt set with the same text are one prompt, unless they
    are instructions to edit images, where each row has its own image.

    Args:
        folder (`Path`):
            The folder of the images.
        settings (`dict`):
            What was evaluated and how. Two results can be compared if all settings are equal except `batch_size` and
            those that name or identify the pipeline and the adapter.
        reward_names (`list[str]`):
            The K rewards.
        table (`pandas.DataFrame`):
            One row per image: `index`, `prompt_index` (row of the prompt set), `generation` (number among the images
            of that row), `seed`, `prompt`, `source` and `tag` (if the prompt set has these columns; `None` where it
            has no value), `image` (path relative to the folder), `kl` (if the pipeline has an adapter, see
            [`EvaluationResults.kl_to_base`]), and a column for each reward (NaN where it does not apply or failed).
        failed (`dict[str, int]`):
            Reward name -> number of images for which it failed.
        prompt_diversity (`list[float]`):
            Root mean square difference between the images of each prompt, in [0, 1], in the order in which the prompts
            first appear in the table; NaN for a prompt with fewer than two images.
    """

    folder: Path
    settings: dict[str, Any]
    reward_names: list[str]
    table: pd.DataFrame
    failed: dict[str, int]
    prompt_diversity: list[float]

    @classmethod
    def load(cls, folder: str | Path) -> "EvaluationResults":
        """
        Read the results that [`evaluate_pipeline`] wrote to a folder.

        Args:
            folder (`str` or `Path`):
                The `output_dir` of the evaluation.

        Raises:
            `FileNotFoundError`: the folder has no finished evaluation.
            `ValueError`: its files are damaged or do not agree.
        """
        folder = Path(folder)
        if not (folder / SUMMARY_FILE).is_file():
            unfinished = (folder / "records").is_dir()
            raise FileNotFoundError(
                f"`{folder}` has no finished evaluation (no `{SUMMARY_FILE}`). "
                + ("Continue it with the same settings." if unfinished else "Pass the `output_dir` of one.")
            )
        try:
            content = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
            _check_summary(content)
            names = content["reward_names"]
            settings, failed = content["settings"], content["failed"]
            diversity = [math.nan if value is None else float(value) for value in content["prompt_diversity"]]
            table = _read_table(folder / TABLE_FILE, names)
            _check_images(folder, table["image"])
            images = settings["num_prompts"] * settings["num_generations"]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"The evaluation in `{folder}` is damaged: {error}. Evaluate again.") from error
        num_groups = len(set(_groups(table, settings)))
        if len(table) != images or num_groups != len(diversity):
            raise ValueError(
                f"The evaluation in `{folder}` is damaged: `{TABLE_FILE}` has {len(table)} images of {num_groups} "
                f"prompts, but `{SUMMARY_FILE}` has {images} of {len(diversity)}. Evaluate again."
            )
        return cls(folder, settings, names, table, failed, diversity)

    def save(self) -> None:
        """Write `scores.csv` and `evaluation.json` to the folder. The second completes the evaluation and is last."""
        text = self.table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        write_atomically(self.folder / TABLE_FILE, text.encode("utf-8"))
        content = {
            "settings": self.settings,
            "reward_names": self.reward_names,
            "rewards": {
                name: {"mean": mean, "standard_error": error, "num_valid": int(self.table[name].notna().sum())}
                for name, (mean, error) in self.summary().items()
            },
            "geneval_overall": {
                name: {"mean": mean, "standard_error": error} for name, (mean, error) in self.geneval_overall().items()
            },
            "kl": None if (kl := self.kl_to_base()) is None else {"mean": kl[0], "standard_error": kl[1]},
            "diversity": dict(zip(("mean", "standard_error"), self.diversity(), strict=True)),
            "failed": self.failed,
            "prompt_diversity": self.prompt_diversity,
        }
        write_atomically(self.folder / SUMMARY_FILE, to_json(content))

    @property
    def groups(self) -> np.ndarray:
        """The prompt of each image, shape `[N]`, numbered from 0 on in the order in which the prompts first appear."""
        return _groups(self.table, self.settings)

    def summary(self) -> dict[str, tuple[float, float]]:
        """
        Mean of each reward over the images that it applies to, and its standard error over prompts.

        Returns:
            `dict[str, tuple[float, float]]`: reward name -> (mean, standard error), in the reward's own unit; NaN
            without images that have the reward, and for the error of a single prompt.
        """
        groups = self.groups
        return {name: clustered_mean(self.table[name].to_numpy(), groups) for name in self.reward_names}

    def averages(self, column: str) -> pd.DataFrame:
        """
        The means of [`~EvaluationResults.summary`] for the prompts of each source or tag.

        Args:
            column (`str`):
                `"source"` or `"tag"`.

        Returns:
            `pandas.DataFrame`: one row for each value of the column and each reward, in the order in which they first
            appear, with the columns `<column>`, `reward`, `mean`, `standard_error` and `num_images` (those that the
            reward applies to). Prompts without a value are under `(none)`.

        Raises:
            `ValueError`: the prompt set has no such column.
        """
        if column not in GROUP_COLUMNS or column not in self.table:
            available = [name for name in GROUP_COLUMNS if name in self.table]
            raise ValueError(
                f"There are no averages by {column!r}; the prompt set has {available or 'no such column'}."
            )
        rows = []
        for value, part in self.table.groupby(self.table[column].fillna(NO_GROUP), sort=False):
            groups = _groups(part, self.settings)
            for name in self.reward_names:
                mean, error = clustered_mean(part[name].to_numpy(), groups)
                rows.append((value, name, mean, error, int(part[name].notna().sum())))
        return pd.DataFrame(rows, columns=[column, "reward", "mean", "standard_error", "num_images"])

    def geneval_overall(self) -> dict[str, tuple[float, float]]:
        """
        GenEval's published "overall" score: the mean over its tasks of the mean of each task.

        The tasks (column `tag`) have different numbers of prompts, so that this is not the mean over all images.
        Published scores are those of `GenEval(strict=True)`; scores with partial credit are averaged in the same way.

        Returns:
            `dict[str, tuple[float, float]]`: name of each reward whose name contains "geneval" -> the mean and its
            standard error over prompts. Empty without such a reward or without the column `tag`.
        """
        return {name: mean_over_tasks(self.averages("tag"), name) for name in geneval_names(self)}

    def diversity(self) -> tuple[float, float]:
        """
        How much the images of one prompt differ, which shows a collapse of the policy.

        Returns:
            `tuple[float, float]`: the root mean square difference between two images of one prompt at 16 x 16 pixels,
            averaged over prompts, in [0, 1], and its standard error. NaN with one image per prompt.
        """
        return clustered_mean(np.array(self.prompt_diversity), np.arange(len(self.prompt_diversity)))

    def kl_to_base(self) -> tuple[float, float] | None:
        """
        How far the adapter has moved the pipeline from its base model.

        It is the mean of `(v - v_base)^2` over the elements of the velocities with and without the adapter, at noised
        versions of the images that the pipeline made itself, without guidance: what training logs as `kl`. Each image
        has one time of the solver's grid; the images of a prompt are spread over the grid.

        Returns:
            `tuple[float, float]`: mean over images and its standard error over prompts; `None` where it was not
            measured, because the pipeline without its adapter is not known: it has no adapter (is a base model, or was
            trained in all of its weights, or has an adapter fused into them), or one that is not of the transformer
            only.
        """
        return clustered_mean(self.table[KL_COLUMN].to_numpy(), self.groups) if KL_COLUMN in self.table else None

    def to_table(self) -> Table:
        """A table for the terminal: one row per reward, the diversity, and the KL to the base model if measured."""
        table = Table(title=f"Rewards of {self.title}", title_justify="left", title_style="bold")
        table.add_column("Reward")
        for header in ("Mean", "Images"):
            table.add_column(header, justify="right")
        if any(self.failed.values()):
            table.add_column("Failed", justify="right")
        for name, value in self.summary().items():
            cells = [format_with_error(value), str(self.table[name].notna().sum())]
            table.add_row(Text(name), *cells, *([str(self.failed[name])] if any(self.failed.values()) else []))
        for name, value in self.geneval_overall().items():
            table.add_row(Text(f"{name}, {OVERALL}"), format_with_error(value))
        table.add_section()
        table.add_row("diversity within a prompt", format_with_error(self.diversity()), str(len(self.table)))
        if (kl := self.kl_to_base()) is not None:
            table.add_row("KL to the base model", format_kl(kl), str(self.table[KL_COLUMN].notna().sum()))
        return table

    def print_table(self) -> None:
        """Print [`~EvaluationResults.to_table`]."""
        Console().print(self.to_table())

    @property
    def title(self) -> str:
        """The adapter and the pipeline that were evaluated; of a local folder only its name."""
        names = [self.settings["adapter"], self.settings["pipeline"]]
        return " on ".join(Path(name).name if Path(name).is_absolute() else name for name in names if name is not None)


def geneval_names(results: EvaluationResults) -> list[str]:
    """The rewards whose names contain "geneval", if the prompt set names the task of each prompt (column `tag`)."""
    return [name for name in results.reward_names if "tag" in results.table and "geneval" in name.lower()]


def mean_over_tasks(averages: pd.DataFrame, reward: str) -> tuple[float, float]:
    """
    The mean of a reward's averages by tag, with its standard error.

    Args:
        averages (`pandas.DataFrame`):
            The result of [`EvaluationResults.averages`] for `"tag"`.
        reward (`str`):
            The reward. Tags that it does not apply to, and prompts without a tag, do not count.

    Returns:
        `tuple[float, float]`: mean and standard error. The tasks have different prompts, so that their errors are
        independent; the error is NaN if that of a task is.
    """
    tasks = averages[(averages["reward"] == reward) & (averages["tag"] != NO_GROUP) & (averages["num_images"] > 0)]
    if not len(tasks):
        return math.nan, math.nan
    errors = tasks["standard_error"].to_numpy()
    return float(tasks["mean"].mean()), float(np.sqrt(np.square(errors).sum())) / len(tasks)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Encode as standard JSON, with `null` for NaN."""

    def without_nan(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without_nan(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [without_nan(entry) for entry in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return (json.dumps(without_nan(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")


def _groups(table: pd.DataFrame, settings: Mapping[str, Any]) -> np.ndarray:
    return number_prompts(table["prompt"], table["prompt_index"], bool(settings.get("edits_images")))


def _check_summary(content: Any) -> None:
    """Raise a `ValueError` if `evaluation.json` does not have the form that [`EvaluationResults.save`] writes."""
    if not isinstance(content, dict):
        raise ValueError(f"`{SUMMARY_FILE}` is a {type(content).__name__}, not an object")
    names, settings, failed, diversity = (
        content[key] for key in ("reward_names", "settings", "failed", "prompt_diversity")
    )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("`reward_names` is not a list of different texts")
    if not isinstance(settings, dict):
        raise ValueError("`settings` is not an object")
    for key in ("pipeline", "adapter", "num_prompts", "num_generations"):
        settings[key]  # raises where it is missing
    for key, kinds in SETTINGS.items():
        if key in settings and (not isinstance(settings[key], kinds) or isinstance(settings[key], bool)):
            raise ValueError(f"the setting `{key}` is {str(settings[key])[:80]!r}")
    if not isinstance(failed, dict) or not all(type(failed[name]) is int for name in names):
        raise ValueError("`failed` is not an object with a number for each reward")
    if not isinstance(diversity, list) or not all(value is None or type(value) in (int, float) for value in diversity):
        raise ValueError("`prompt_diversity` is not a list of numbers")


def _check_images(folder: Path, images: pd.Series) -> None:
    """Raise a `ValueError` if the table names a file outside the folder, which would be shown and published."""
    root = folder.resolve()
    for name in images:
        if not is_within(root, name):
            raise ValueError(f"`{TABLE_FILE}` names the image {str(name)[:80]!r}, which is not in the folder")


def _read_table(file: Path, reward_names: Sequence[str]) -> pd.DataFrame:
    # Without conversion of texts: a prompt may be "NA" or "007".
    columns = dict.fromkeys(NUMBER_COLUMNS, "int64") | dict.fromkeys(TEXT_COLUMNS, "object")
    columns |= dict.fromkeys((*reward_names, KL_COLUMN), "float64")
    table = pd.read_csv(
        file,
        dtype=columns,
        keep_default_na=False,
        na_values={name: [""] for name in (*reward_names, KL_COLUMN)},
        float_precision="round_trip",
        encoding="utf-8",
    )
    missing = [name for name in (*NUMBER_COLUMNS, "prompt", "image", *reward_names) if name not in table]
    if missing:
        raise ValueError(f"`{file.name}` has no column {missing[0]!r}")
    for column in GROUP_COLUMNS:
        if column in table:
            table[column] = table[column].replace({"": None})
    return table
