# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Write the card of an adapter with the results of evaluations."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCard

from ..evaluation import EvaluationComparison, EvaluationResults, before_after_grid, compare_evaluations
from ..evaluation.compare import compare_gains
from ..evaluation.records import file_digest
from ..extras import require_extra
from ..media import Sample, open_sample, save_sample
from .card_inputs import INPUTS_FILE, CardInputs, GainsRow, GalleryItem, RewardRow
from .model_card import CALL_SETTINGS, build_model_card
from .push import CARD_FILE


GALLERY_PROMPTS = 8
GRID_IMAGES, GRID_VIDEOS = 4, 2  # of each prompt, before and after
GRID_VIDEO_SIDE = 320  # pixels; many videos are in memory at once
GRID_FILE = "before_after.png"


def card_from_evaluations(
    folder: str | os.PathLike, evaluations: Mapping[str, EvaluationResults], base_model: str | None = None
) -> ModelCard:
    """
    Write the card of an adapter with the results of evaluations: rewards, diversity, sources of prompts, and pictures.

    The training is described by `model_card.json`, which the trainer wrote. Rewards that were evaluated and not
    trained on are marked as held out. An adapter that was not trained with this package has no such file; its card
    says nothing about its training.

    Args:
        folder (`str` or `os.PathLike`):
            The folder with the adapter. `README.md`, `model_card.json`, `before_after.png` and `images/sample_*`
            are written there, and replace earlier ones.
        evaluations (`Mapping[str, EvaluationResults]`):
            The evaluation before training and the one after it, in this order, of the same prompts and seeds with the
            same rewards. With one alone there is no "before".
        base_model (`str`, *optional*):
            Hub id or local folder of the base pipeline. Defaults to the one in `model_card.json`, or to the pipeline
            that was evaluated.

    Returns:
        `huggingface_hub.ModelCard`: the card.

    Raises:
        [`~trl_marble.extras.MissingExtraError`]: Matplotlib, which draws the images before and after, is missing.
        `FileNotFoundError`: the folder has no adapter.
        `ValueError`: there are no evaluations or more than two, they cannot be compared, the last evaluation is of
            another adapter, or `model_card.json` is damaged.
    """
    if len(evaluations) == 2:
        require_extra("plots", "The picture of images before and after training")
    folder = Path(folder)
    if not (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        raise FileNotFoundError(f"The folder {str(folder)!r} has no adapter (no {LORA_WEIGHT_NAME_SAFE}).")
    if len(evaluations) not in (1, 2):
        raise ValueError(
            f"There are {len(evaluations)} evaluations ({', '.join(evaluations) or 'none'}). Pass the one before and "
            "the one after training; for more use `trl_marble.evaluation.compare_evaluations`."
        )
    *_, last = evaluations
    after = evaluations[last]
    if after.settings["adapter_digest"] not in (None, file_digest(folder / LORA_WEIGHT_NAME_SAFE)):
        raise ValueError(
            f"The evaluation {last!r} is of {after.settings['adapter']!r}, which is not the adapter in "
            f"{str(folder)!r}. Evaluate that adapter."
        )
    comparison = compare_evaluations(dict(evaluations)) if len(evaluations) == 2 else None

    inputs = _known_inputs(folder, after)
    trained = [row.name for row in inputs.rewards if inputs.trained_here and not row.held_out]
    measured = _rows(after, comparison)
    others = [name for name in measured if name not in trained]
    order, held_out = [*trained, *others], others if inputs.trained_here else []
    inputs = dataclasses.replace(
        inputs,
        base_model=base_model or inputs.base_model,
        rewards=[
            dataclasses.replace(measured.get(name, RewardRow(name)), held_out=name in held_out) for name in order
        ],
        diversity=_diversity(after, comparison),
        gains=_gains(after, comparison, held_out),
        sources=_sources(after, comparison),
        evaluated_on=_evaluated_on(after),
        **_save_pictures(folder, after, comparison),
    )
    inputs.save(folder)
    card = build_model_card(inputs)
    card.save(folder / CARD_FILE)
    return card


def _known_inputs(folder: Path, results: EvaluationResults) -> CardInputs:
    """The inputs that the trainer wrote; without them, those that follow from an evaluation."""
    if (folder / INPUTS_FILE).is_file():
        return CardInputs.load(folder)
    settings = {name: value for name, value in results.settings.items() if name in CALL_SETTINGS}
    return CardInputs(
        repo_name=folder.absolute().name,
        rewards=[],
        pipeline_class=results.settings["pipeline_class"],
        base_model=results.settings["pipeline"],
        settings=settings,
        trained_here=False,
    )


def _before(comparison: EvaluationComparison | None) -> EvaluationResults | None:
    return None if comparison is None else comparison.evaluations[comparison.baseline]


def _rows(after: EvaluationResults, comparison: EvaluationComparison | None) -> dict[str, RewardRow]:
    """One row for each reward that was evaluated."""
    before = _before(comparison)
    summary_before = {} if before is None else before.summary()
    (changes,) = [{}] if comparison is None else comparison.changes.values()
    return {
        name: _row(name, summary_before.get(name), mean_and_error, changes.get(name))
        for name, mean_and_error in after.summary().items()
    }


def _row(
    name: str,
    before: tuple[float, float] | None,
    after: tuple[float, float],
    change: tuple[float, float] | None,
) -> RewardRow:
    """A row from means and their standard errors."""
    missing = (None, None)
    (b, b_se), (c, c_se) = before or missing, change or missing
    return RewardRow(name, before=b, after=after[0], before_se=b_se, after_se=after[1], change=c, change_se=c_se)


def _diversity(after: EvaluationResults, comparison: EvaluationComparison | None) -> RewardRow | None:
    """Diversity before and after; `None` with one image per prompt."""
    if math.isnan(after.diversity()[0]):
        return None
    before = _before(comparison)
    (change,) = [None] if comparison is None else comparison.diversity_changes.values()
    return _row("diversity within a prompt", None if before is None else before.diversity(), after.diversity(), change)


def _gains(
    after: EvaluationResults, comparison: EvaluationComparison | None, held_out: Sequence[str]
) -> GainsRow | None:
    """The gains over the evaluation before; without one the KL alone, if it was measured."""
    if comparison is not None:
        return GainsRow.of(compare_gains(comparison.evaluations[comparison.baseline], after, held_out))
    kl = after.kl_to_base()
    return None if kl is None else GainsRow(kl=kl[0], kl_se=kl[1])


def _sources(after: EvaluationResults, comparison: EvaluationComparison | None) -> dict[str, list[RewardRow]]:
    """Each reward on the prompts of each source, if the prompt set has sources."""
    if "source" not in after.table:
        return {}
    before = _before(comparison)
    means_before = {} if before is None else _means_by_source(before)
    sources: dict[str, list[RewardRow]] = {}
    for (source, name), mean in _means_by_source(after).items():
        sources.setdefault(source, []).append(RewardRow(name, means_before.get((source, name)), mean))
    return sources


def _means_by_source(results: EvaluationResults) -> dict[tuple[str, str], float]:
    table = results.averages("source")
    return dict(zip(zip(table["source"], table["reward"], strict=True), table["mean"], strict=True))


def _evaluated_on(results: EvaluationResults) -> str:
    settings = results.settings
    text = (
        f"{len(results.table)} images of {settings['num_prompts']} prompts ({settings['num_generations']} each, seed "
        f"{settings['seed']}, {settings['num_inference_steps']} solver steps, guidance scale "
        f"{settings['guidance_scale']:g})"
    )
    failed = [f"`{name}` for {number}" for name, number in results.failed.items() if number]
    return text + (f" without those for which a reward failed ({', '.join(failed)})" if failed else "")


def _save_pictures(folder: Path, after: EvaluationResults, comparison: EvaluationComparison | None) -> dict[str, Any]:
    """Write the gallery, and the grid of images before and after. Returns the inputs that name them."""
    number = after.settings["num_prompts"]
    shown = [k * number // min(GALLERY_PROMPTS, number) for k in range(min(GALLERY_PROMPTS, number))]
    prompts, files = _files(after, shown)
    (folder / "images").mkdir(exist_ok=True)
    gallery = []
    for k, (prompt, row) in enumerate(zip(prompts, files, strict=True)):
        gallery.append(GalleryItem(path=f"images/sample_{k}{row[0].suffix}", prompt=prompt))
        save_sample(open_sample(row[0]), folder / gallery[-1].path, lossless=False)
    pictures: dict[str, Any] = {"gallery": gallery}
    before = _before(comparison)
    if before is not None:
        first, second = ([list(map(_open, row)) for row in rows] for rows in (_files(before, shown)[1], files))
        before_after_grid(prompts, first, second, folder / GRID_FILE)
        pictures["before_after"] = GRID_FILE
    return pictures


def _files(results: EvaluationResults, prompt_indices: list[int]) -> tuple[list[str], list[list[Path]]]:
    """Some prompts, and the first images or videos of each."""
    prompts, rows = [], []
    for index in prompt_indices:
        part = results.table[results.table["prompt_index"] == index].sort_values("generation")
        files = [results.folder / path for path in part["image"]]
        prompts.append(part["prompt"].iloc[0])
        rows.append(files[: GRID_VIDEOS if files[0].suffix == ".webp" else GRID_IMAGES])
    return prompts, rows


def _open(file: Path) -> Sample:
    """Read an image, or a video with its frames made small."""
    sample = open_sample(file)
    if isinstance(sample, list):
        for frame in sample:
            frame.thumbnail((GRID_VIDEO_SIDE, GRID_VIDEO_SIDE))
    return sample
