# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The pictures that a run leaves on disk and with its experiment trackers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import TrainerCallback

from ..evaluation import (
    format_value,
    image_grid,
    plot_balance,
    plot_progress,
    plot_rewards,
    summarize_balance,
    summarize_progress,
)
from ..evaluation.plots import plot_histograms
from ..evaluation.policy_evaluation import PolicyEvaluation
from ..media import Sample
from ..rewards.call_log import column_names
from ..rollout import RolloutRecord
from .trackers import send_to_trackers


@dataclass(frozen=True)
class GridRow:
    """
    A prompt with some of its images.

    Args:
        prompt (`str`):
            The prompt.
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            The images, or videos.
        rewards (`Tensor` of shape `[K, number of images]`, float32):
            Their rewards, NaN where one does not apply.
        extras (`Mapping[str, Sequence[Any]]`):
            Column -> one value for each image.
    """

    prompt: str
    images: list[Sample]
    rewards: Tensor
    extras: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class RolloutPicture:
    """
    What is kept of a generation batch to be shown: of its images only those of a few prompts.

    Args:
        rows (`list[GridRow]`):
            Some prompts of this process, with some of their images.
        all_rewards (`Tensor` of shape `[K, B]`, float32):
            The rewards of the images of all processes.
        all_sources (`list[str]`, *optional*):
            The column `source` of the images of all processes, where the prompt set has it.
    """

    rows: list[GridRow]
    all_rewards: Tensor
    all_sources: list[str] | None

    @classmethod
    def of(cls, record: RolloutRecord, num_prompts: int) -> "RolloutPicture":
        """
        The picture of a rollout.

        Args:
            record ([`~trl_marble.rollout.RolloutRecord`]):
                The rollout.
            num_prompts (`int`):
                How many prompts the grid shows, and at most how many images of each.
        """
        shown: dict[str, list[int]] = {}
        for place, prompt in enumerate(record.prompts):
            if prompt in shown or len(shown) < num_prompts:
                shown.setdefault(prompt, []).append(place)
        scores = record.scores
        columns = dict(zip(column_names(list(scores.extras)), scores.extras.values(), strict=True))
        rows = []
        for prompt, all_places in shown.items():
            places = all_places[:num_prompts]
            extras = {column: [values[place] for place in places] for column, values in columns.items()}
            rows.append(GridRow(prompt, [record.images[p] for p in places], scores.rewards[:, places], extras))
        return cls(rows, record.all_rewards, record.all_sources)


class RunPictures:
    """
    Saves the pictures of a run and sends them to its trackers.

    Args:
        output_dir (`str`):
            The output folder of the run.
        callbacks (`Sequence` of [`~transformers.TrainerCallback`]):
            Those of the trainer, among them the ones that hold the trackers.
    """

    def __init__(self, output_dir: str, callbacks: Sequence[TrainerCallback]) -> None:
        self.folder, self.callbacks = Path(output_dir), callbacks

    def log_rollout(self, step: int, names: list[str], picture: RolloutPicture) -> None:
        """
        Save a grid of a generation batch's images with their rewards, `<output_dir>/images/train_step_<step>.png`, and
        the histograms of all its rewards, `<output_dir>/images/rewards_step_<step>.png`; send both to the trackers.
        Beside a grid of videos one with them playing is saved, `train_step_<step>.webp`. What rewards logged with
        `log_extra` stands under the images too, and in full in a table of the grid's images, `train_step_<step>.csv`.

        Trackers get their own kind of histogram, `train/rewards/<name>/histogram`, and one more for each source.

        Args:
            step (`int`):
                The optimizer step.
            names (`list[str]`):
                The K rewards.
            picture ([`RolloutPicture`]):
                The generation batch.
        """
        path = self._path("train", step)
        _write_grid(picture.rows, names, path)
        values = dict(zip(names, picture.all_rewards.tolist(), strict=True))
        if values:  # a run may have no rewards
            title = f"Rewards of the images of the generation batch of step {step}"
            plot_histograms(values, self._path("rewards", step), sources=picture.all_sources, title=title)
        histograms = _histograms(values, picture.all_sources)
        send_to_trackers(self.callbacks, step, {"train/images": path}, histograms)

    def log_evaluation(self, step: int, prefix: str, result: PolicyEvaluation) -> None:
        """
        Save a grid of an evaluation's images with their rewards, `<output_dir>/images/<prefix>_step_<step>.png`, and
        send it to the trackers. Beside a grid of videos one with them playing is saved, `<prefix>_step_<step>.webp`;
        and where rewards logged with `log_extra`, a table, `<prefix>_step_<step>.csv`.

        Args:
            step (`int`):
                The optimizer step.
            prefix (`str`):
                Of the evaluation's metrics.
            result ([`~trl_marble.evaluation.policy_evaluation.PolicyEvaluation`]):
                The evaluation.
        """
        path = self._path(prefix, step)
        gallery, rewards, extras = result.evaluation.gallery, result.gallery_rewards, result.gallery_extras
        rows = [GridRow(prompt, list(images), rewards[prompt], extras[prompt]) for prompt, images in gallery.items()]
        _write_grid(rows, result.evaluation.reward_names, path)
        send_to_trackers(self.callbacks, step, {f"{prefix}/images": path})

    def log_plots(self, step: int, history: Sequence[Mapping[str, Any]]) -> None:
        """
        Draw the run so far, `<output_dir>/plots/balance.png` (weights and cosines) and `rewards.png` (rollouts and
        evaluations), and send both to the trackers. What nothing was logged of is left out.

        Args:
            step (`int`):
                The optimizer step.
            history (`Sequence[Mapping[str, Any]]`):
                `trainer.state.log_history`.
        """
        plots: dict[str, Path] = {}
        balance = summarize_balance(history)
        if balance is not None and balance.cos_min is not None:  # some step had a reward to balance
            plots["plots/balance"] = plot_balance(history, self.folder / "plots" / "balance.png")
        if summarize_progress(history) is not None:
            plots["plots/progress"] = plot_progress(history, self.folder / "plots" / "progress.png")
        if any(key.startswith(("rewards/", "eval_rewards/")) for row in history for key in row):
            plots["plots/rewards"] = plot_rewards(history, self.folder / "plots" / "rewards.png")
        if plots:
            send_to_trackers(self.callbacks, step, plots)

    def _path(self, name: str, step: int) -> Path:
        return self.folder / "images" / f"{name}_step_{step:06d}.png"


def _write_grid(rows: Sequence[GridRow], names: list[str], path: Path) -> None:
    """Write a grid and, where there is more to say of its images than their rewards, a table."""
    captions = [_captions(names, row.rewards, row.extras) for row in rows]
    image_grid([row.images for row in rows], [row.prompt for row in rows], captions=captions, path=path)
    if any(row.extras for row in rows):
        tables = [
            pd.DataFrame(
                {"prompt": row.prompt, "image": range(len(row.images))}
                | dict(zip(names, row.rewards.tolist(), strict=True))
                | {_free_name(column, ["prompt", "image", *names]): values for column, values in row.extras.items()}
            )
            for row in rows
        ]
        pd.concat(tables).to_csv(path.with_suffix(".csv"), index=False)


def _free_name(column: str, taken: Sequence[str]) -> str:
    """The name of a column that another one of the table does not have."""
    return f"{column} (logged)" if column in taken else column


def _captions(names: list[str], rewards: Tensor, extras: Mapping[str, Sequence[Any]]) -> list[str]:
    """
    The rewards of each image and what else was logged of it, one a line. The number comes first: a name that is too
    long is cut at its end.
    """
    return [
        "\n".join(
            [f"{_number(value)} {name}" for name, value in zip(names, column, strict=True)]
            + [_extra_line(name, values[place]) for name, values in extras.items()]
        )
        for place, column in enumerate(rewards.T.tolist())
    ]


def _extra_line(name: str, value: Any) -> str:
    if isinstance(value, str | bool):
        return f"{name}: {' '.join(str(value).split())}"
    return f"{_number(math.nan if value is None else value)} {name}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else format_value(value)


def _histograms(values: Mapping[str, list[float]], sources: list[str] | None) -> dict[str, list[float]]:
    """Values by the name of their histogram: of each reward where it applies, and of each source of it."""
    histograms = {}
    for name, row in values.items():
        key = f"train/rewards/{name}/histogram"
        histograms[key] = [value for value in row if not math.isnan(value)]
        for source in sorted(set(sources or ())):
            of_source = [
                value for value, own in zip(row, sources or (), strict=True) if own == source and not math.isnan(value)
            ]
            histograms[f"{key}/{source}"] = of_source
    return histograms
