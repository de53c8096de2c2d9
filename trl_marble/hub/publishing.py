# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves for the Hub: its card with pictures, its adapter, and checkpoints if asked for."""

import dataclasses
import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..evaluation import (
    best_evaluation,
    plot_balance,
    plot_gains,
    plot_progress,
    run_gains,
    summarize_balance,
    summarize_progress,
)
from ..evaluation.gain_plot import GAINS_FILE
from ..evaluation.time_summary import summarize_times
from ..evaluation.worst_gain import worst_gains
from ..extras import has_extra
from ..media import Sample, sample_suffix, save_sample
from ..version import __version__
from .card_inputs import CardInputs, GainsRow, GalleryItem, RewardRow
from .model_card import build_model_card
from .push import WEIGHTS, is_rendered_card, published_files
from .slider import part_file


logger = logging.get_logger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets")
CARD_SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
    "rollout_attention_backend",
    "rollout_cache",
    "eval_num_inference_steps",
    "eval_height",
    "eval_width",
    "num_generations",
    "timestep_fraction",
    "multi_objective_aggregation",
    "weighting",
    "balance_on",
    "balance_every",
    "balance_ema",
    "progress_temperature",
    "progress_ema",
    "progress_base_images",
    "reward_priorities",
    "reward_targets",
    "reward_bounds",
    "scale_rewards",
    "reward_weights",
    "policy_loss",
    "nft_beta",
    "awm_weighting",
    "awm_power",
    "awm_off_policy",
    "awm_clip_range",
    "awm_ema_beta",
    "grpo_sde",
    "grpo_noise_level",
    "grpo_window_size",
    "grpo_window",
    "grpo_window_every",
    "grpo_clip_range",
    "grpo_guard",
    "grpo_reweighting",
    "crd_objective",
    "crd_beta",
    "dgpo_beta",
    "dgpo_reference",
    "dgpo_clip_range",
    "gdro_beta",
    "gdro_temperature",
    "gdro_best",
    "dpo_beta",
    "beta",
    "reference_guidance_scale",
    "advantage_clip",
    "old_policy_preset",
    "sampling_policy_preset",
    "weight_ema_decay",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "seed",
)


@dataclass(frozen=True)
class RunSummary:
    """
    What the card of a run is made from.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        reward_names (`Sequence[str]`):
            The rewards that are trained on.
        held_out_names (`Sequence[str]`):
            Those that are scored in evaluations only.
        pipeline_class (`str`):
            The class of the pipeline.
        base_model (`str`, *optional*):
            Where the pipeline was loaded from: a Hub id or a folder.
        dataset_name (`str`, *optional*):
            The training prompts.
        settings (`Mapping[str, Any]`):
            What the card says of the training.
        gallery (`Mapping[str, Sequence[Sample]]`):
            Prompt -> images of the adapter's evaluation.
        edits_images (`bool`):
            Whether images are edited.
        model_id (`str`, *optional*):
            The repository on the Hub.
        adapter_step (`int`):
            The optimizer step that the adapter is from: the last one, unless a better one was loaded.
        teachers (`Mapping[str, str]`, *optional*):
            The adapters that it was distilled from, as the trainer is given them.
        parts (`Sequence[str]`, *optional*):
            Of an adapter with a part for each reward: the names of the parts.
    """

    history: Sequence[dict[str, Any]]
    reward_names: Sequence[str]
    held_out_names: Sequence[str]
    pipeline_class: str
    base_model: str | None
    dataset_name: str | None
    settings: Mapping[str, Any]
    gallery: Mapping[str, Sequence[Sample]]
    edits_images: bool
    model_id: str | None
    adapter_step: int
    teachers: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[str] = ()


def write_card(run: RunSummary, folder: Path, model_name: str | None = None) -> None:
    """
    Write `README.md`, the pictures it shows, and `model_card.json`, what it was rendered from.

    Args:
        run ([`RunSummary`]):
            The run.
        folder (`Path`):
            Where to.
        model_name (`str`, *optional*):
            Title of the card. Defaults to the name of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    balance, balance_plot = summarize_balance(run.history), None
    if balance is not None and balance.cos_min is not None:  # some step had a reward to balance
        balance_plot = _draw(folder, "balance.png", "the balance between rewards", partial(plot_balance, run.history))
    progress, progress_plot = summarize_progress(run.history), None
    if progress is not None:
        progress_plot = _draw(folder, "progress.png", "progress and weights", partial(plot_progress, run.history))
    of_adapter = [row for row in run.history if row["step"] <= run.adapter_step]
    curve, gain_plot = run_gains(run.history), None
    if len(curve) > 1:
        gain_plot = _draw(folder, GAINS_FILE, "gains against KL", partial(plot_gains, {run.pipeline_class: curve}))
    curve_of_adapter = [point for point in curve if point.step is not None and point.step <= run.adapter_step]
    inputs = CardInputs(
        repo_name=model_name or folder.absolute().name,
        rewards=reward_rows(run.reward_names, of_adapter)
        + [dataclasses.replace(row, held_out=True) for row in reward_rows(run.held_out_names, of_adapter)],
        pipeline_class=run.pipeline_class,
        base_model=run.base_model,
        dataset_name=run.dataset_name,
        balance=balance,
        progress=progress,
        times=summarize_times(run.history),
        settings=run.settings,
        gallery=_save_gallery(run.gallery, folder),
        balance_plot=balance_plot,
        progress_plot=progress_plot,
        before_after="before_after.png" if (folder / "before_after.png").is_file() else None,
        model_id=run.model_id,
        framework_versions=framework_versions(),
        diversity=diversity_row(of_adapter),
        edits_images=run.edits_images,
        gains=GainsRow.of(curve_of_adapter[-1]) if len(curve_of_adapter) > 1 else None,
        gain_plot=gain_plot,
        adapter_step=run.adapter_step,
        best_evaluation=best_evaluation(run.history, run.reward_names),
        adapter_evaluation=next(reversed(worst_gains(of_adapter, run.reward_names)), None),
        teachers=run.teachers,
        parts=list(run.parts),
    )
    inputs.save(folder)
    build_model_card(inputs).save(folder / "README.md")


def _draw(folder: Path, file: str, what: str, plot: Callable[[Path], Path]) -> str | None:
    """Draw a picture of the card. Returns its name, or `None` where Matplotlib is missing."""
    if not has_extra("plots"):
        logger.warning(f"The card has no plot of {what}: the extra `plots` is not installed.")
        return None
    return plot(folder / file).name


def write_card_beside_adapter(run: RunSummary, folder: Path) -> None:
    """
    Write the card to the folder of a saved adapter, unless that has a `README.md` of somebody else's.

    Args:
        run ([`RunSummary`]):
            The run.
        folder (`Path`):
            The adapter's folder.
    """
    readme = folder / "README.md"
    try:
        is_ours = not readme.exists() or is_rendered_card(folder)
    except ValueError:  # of another version of this package: nobody knows
        is_ours = False
    if is_ours:
        write_card(run, folder)
        return
    logger.warning(
        f"The adapter is saved, and {readme} is left as it is: it was not written by this package, or was changed "
        "since. Move it away and save again, or call `trainer.create_model_card()`, which replaces that of the output "
        "folder, for the card of this run."
    )


def card_settings(
    chosen: Mapping[str, Any], unused: Sequence[str], history: Sequence[tuple[int, Mapping[str, Any]]]
) -> dict[str, Any]:
    """
    The settings that a card shows.

    Args:
        chosen (`Mapping[str, Any]`):
            All settings of the run by name.
        unused (`Sequence[str]`):
            Those that the run does not use.
        history (`Sequence[tuple[int, Mapping[str, Any]]]`):
            The step from which on settings were in use, and these settings, the first ones first.
    """
    settings = {name: chosen[name] for name in CARD_SETTINGS if name not in unused}
    for (_, before), (step, after) in itertools.pairwise(history):
        for name in CARD_SETTINGS:
            if name in settings and before.get(name) != after.get(name):
                settings[f"{name} until step {step}"] = before.get(name)
    return settings


def framework_versions() -> dict[str, str]:
    """Versions of this package and of those that it stands on."""
    # Not from the installed metadata: the package may be run from a source tree.
    return {"trl_marble": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def reward_rows(names: Sequence[str], history: Sequence[dict[str, Any]]) -> list[RewardRow]:
    """
    Each reward before and after training.

    Args:
        names (`Sequence[str]`):
            The rewards.
        history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`.

    Returns:
        `list[RewardRow]`: From the first and the last evaluation, if the first was before training; else not measured.
    """
    rows = []
    for name in names:
        key = f"eval_rewards/{name}"
        before, after = _first_and_last(history, f"{key}/mean")
        rows.append(
            RewardRow(
                name=name,
                before=before.get(f"{key}/mean"),
                after=after.get(f"{key}/mean"),
                before_se=before.get(f"{key}/standard_error"),
                after_se=after.get(f"{key}/standard_error"),
            )
        )
    return rows


def diversity_row(history: Sequence[dict[str, Any]]) -> RewardRow | None:
    """
    How much the images of one prompt differed before and after training.

    Args:
        history (`Sequence[dict[str, Any]]`):
            `trainer.state.log_history`.

    Returns:
        `RewardRow`: From the same evaluations as [`reward_rows`]; `None` if diversity was not measured, as with one
        image per prompt.
    """
    key = "eval_drift/diversity"
    before, after = (row.get(key) for row in _first_and_last(history, key))
    if before is None and after is None:
        return None
    return RewardRow("diversity within a prompt", before=before, after=after)


def _first_and_last(history: Sequence[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The log's first row with a key if it is of before training, and the last one if it is not; else empty rows."""
    found = [entry for entry in history if key in entry]
    before = found[0] if found and found[0]["step"] == 0 else {}
    after = found[-1] if found and found[-1]["step"] > 0 else {}
    return before, after


def push_folder(
    folder: Path, repo_id: str, message: str, *, token: str | None, revision: str | None, blocking: bool
) -> CommitInfo | Future[CommitInfo]:
    """
    Push a saved adapter with its card and the card's pictures, and nothing else of the folder: no logs, which name the
    machine and its folders, and no private state of the run.

    Args:
        folder (`Path`):
            The output folder of a run.
        repo_id (`str`):
            The repository.
        message (`str`):
            Title of the commit.
        token (`str`, *optional*):
            An access token with the right to write.
        revision (`str`, *optional*):
            The branch.
        blocking (`bool`):
            Whether to return only when everything is pushed.

    Returns:
        The commit, or its future where `blocking` is `False`.
    """
    upload: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "run_as_future": not blocking}
    wanted = published_files(folder)
    return HfApi(token=token).upload_folder(
        folder_path=folder, commit_message=message, allow_patterns=wanted, **upload
    )


def push_checkpoint(
    checkpoint: Path,
    folder: Path,
    repo_id: str,
    step: int,
    strategy: HubStrategy,
    write_card_to: Callable[[], None],
    *,
    token: str | None,
    revision: str | None,
) -> list[Future[CommitInfo]]:
    """
    Push the adapter of a checkpoint with its card, and the checkpoint itself where `hub_strategy` asks for it.

    Args:
        checkpoint (`Path`):
            A complete checkpoint folder.
        folder (`Path`):
            The output folder of the run, which the adapter is copied to.
        repo_id (`str`):
            The repository.
        step (`int`):
            The optimizer step.
        strategy (`HubStrategy`):
            `hub_strategy`.
        write_card_to (`Callable[[], None]`):
            Writes the card to the output folder, once the adapter is there.
        token (`str`, *optional*):
            An access token with the right to write.
        revision (`str`, *optional*):
            The branch.

    Returns:
        `list[Future[CommitInfo]]`: The uploads, which go on.
    """
    for file in [*checkpoint.glob(WEIGHTS), *checkpoint.glob(part_file("*"))]:
        copied = folder / file.relative_to(checkpoint)
        copied.parent.mkdir(parents=True, exist_ok=True)
        unfinished = copied.with_name(f"tmp-{file.name}")
        shutil.copy(file, unfinished)
        os.replace(unfinished, copied)  # never half a file, nor one that changes while it is uploaded
    write_card_to()
    api, message = HfApi(token=token), f"Training in progress, step {step}"
    upload: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "run_as_future": True}
    wanted = published_files(folder)
    jobs: Any = [api.upload_folder(folder_path=folder, commit_message=message, allow_patterns=wanted, **upload)]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
        message += ", checkpoint"
        jobs.append(api.upload_folder(folder_path=checkpoint, path_in_repo=place, commit_message=message, **upload))
    for job in jobs:
        job.add_done_callback(_warn_of_failure)
    return jobs


def _warn_of_failure(job: Future[CommitInfo]) -> None:
    """`transformers` waits for uploads and does not look at what became of them."""
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(f"A push to the Hub failed, and training goes on: {error}")


def _save_gallery(gallery: Mapping[str, Sequence[Sample]], folder: Path) -> list[GalleryItem]:
    """The first image of each prompt."""
    items = []
    for number, (prompt, images) in enumerate(gallery.items()):
        path = f"images/sample_{number}{sample_suffix(images[0])}"
        (folder / "images").mkdir(exist_ok=True)
        save_sample(images[0], folder / path, lossless=False)
        items.append(GalleryItem(path=path, prompt=prompt))
    return items
