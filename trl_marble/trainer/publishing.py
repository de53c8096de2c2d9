# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run pushes to the Hub: its card with pictures, its adapter, and checkpoints if asked for."""

import dataclasses
import importlib.metadata
import itertools
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

import trl_marble

from ..evaluation import plot_balance, summarize_balance
from ..extras import has_extra
from ..hub import CardInputs, GalleryItem, RewardRow, build_model_card, published_files
from ..hub.push import is_rendered_card
from ..media import sample_suffix, save_sample


if TYPE_CHECKING:
    from .marble_nft_trainer import MarbleNFTTrainer

logger = logging.get_logger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets")
BALANCE_SETTINGS = ("balance_on", "balance_every", "balance_ema")
CARD_SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
    "num_generations",
    "timestep_fraction",
    "multi_objective_aggregation",
    *BALANCE_SETTINGS,
    "scale_rewards",
    "reward_weights",
    "nft_beta",
    "beta",
    "advantage_clip",
    "old_policy_preset",
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


def write_card(trainer: "MarbleNFTTrainer", model_name: str | None = None, folder: Path | None = None) -> None:
    """
    Write `README.md`, the pictures it shows, and `model_card.json`, what it was rendered from.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run.
        model_name (`str`, *optional*):
            Title of the card. Defaults to the name of the folder.
        folder (`Path`, *optional*):
            Where to. Defaults to the output folder.
    """
    folder = Path(trainer.args.output_dir) if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    history = trainer.state.log_history
    balance = summarize_balance(history)
    balance_plot = None
    if balance is not None and balance.cos_min is not None:  # some step had a reward to balance
        if has_extra("plots"):
            balance_plot = "balance.png"
            plot_balance(history, folder / balance_plot)
        else:
            logger.warning("The card has no plot of the balance between rewards: the extra `plots` is not installed.")
    inputs = CardInputs(
        repo_name=model_name or folder.absolute().name,
        rewards=reward_rows(trainer.scorer.names, history)
        + [dataclasses.replace(row, held_out=True) for row in reward_rows(trainer.held_out_names, history)],
        pipeline_class=trainer.flow.family.pipeline_class.__name__,
        base_model=_source(trainer.pipeline),
        dataset_name=trainer.train_dataset.info.dataset_name,
        balance=balance,
        settings=_card_settings(trainer),
        gallery=_save_gallery(trainer, folder),
        balance_plot=balance_plot,
        before_after="before_after.png" if (folder / "before_after.png").is_file() else None,
        model_id=trainer.hub_model_id,
        framework_versions=framework_versions(),
        diversity=diversity_row(history),
        edits_images=trainer.edits,
    )
    inputs.save(folder)
    build_model_card(inputs).save(folder / "README.md")


def write_card_beside_adapter(trainer: "MarbleNFTTrainer", folder: Path) -> None:
    """
    Write the card to the folder of a saved adapter, unless that has a `README.md` of somebody else's.

    Args:
        trainer ([`MarbleNFTTrainer`]):
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
        write_card(trainer, folder=folder)
        return
    logger.warning(
        f"The adapter is saved, and {readme} is left as it is: it was not written by this package, or was changed "
        "since. Move it away and save again, or call `trainer.create_model_card()`, which replaces that of the output "
        "folder, for the card of this run."
    )


def framework_versions() -> dict[str, str]:
    """Versions of this package and of those that it stands on."""
    # Not from the installed metadata: the package may be run from a source tree.
    return {"trl_marble": trl_marble.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def reward_rows(names: list[str], history: list[dict[str, Any]]) -> list[RewardRow]:
    """
    Each reward before and after training.

    Args:
        names (`list[str]`):
            The rewards.
        history (`list[dict[str, Any]]`):
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


def diversity_row(history: list[dict[str, Any]]) -> RewardRow | None:
    """
    How much the images of one prompt differed before and after training.

    Args:
        history (`list[dict[str, Any]]`):
            `trainer.state.log_history`.

    Returns:
        `RewardRow`: From the same evaluations as [`reward_rows`]; `None` if diversity was not measured, as with one
        image a prompt.
    """
    key = "eval_drift/diversity"
    before, after = (row.get(key) for row in _first_and_last(history, key))
    if before is None and after is None:
        return None
    return RewardRow("diversity within a prompt", before=before, after=after)


def _first_and_last(history: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The log's first row with a key if it is of before training, and the last one if it is not; else empty rows."""
    found = [entry for entry in history if key in entry]
    before = found[0] if found and found[0]["step"] == 0 else {}
    after = found[-1] if found and found[-1]["step"] > 0 else {}
    return before, after


def push_output(
    trainer: "MarbleNFTTrainer",
    commit_message: str,
    blocking: bool,
    token: str | None,
    revision: str | None,
    private: bool | None,
    model_name: str | None,
) -> CommitInfo | Future[CommitInfo] | None:
    """
    Save the adapter, write its card and push both, with the card's pictures and nothing else of the output folder: no
    logs, which name the machine and its folders, and no private state of the run.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run. The other arguments are those of its `push_to_hub`.

    Returns:
        The commit, or its future where `blocking` is `False`; `None` in all processes but the first.
    """
    args = trainer.args
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    token = args.hub_token if token is None else token
    if trainer.hub_model_id is None:  # not asked for in the configuration
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(model_name=model_name or trainer.hub_model_id.split("/")[-1])
    trainer._finish_current_push()
    upload: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "revision": args.hub_revision if revision is None else revision,
        "run_as_future": not blocking,
    }
    return HfApi(token=token).upload_folder(
        folder_path=args.output_dir,
        allow_patterns=published_files(args.output_dir),
        commit_message=commit_message,
        **upload,
    )


def push_checkpoint(trainer: "MarbleNFTTrainer", checkpoint: Path) -> None:
    """
    Push the adapter of a checkpoint with its card, and the checkpoint itself where `hub_strategy` asks for it.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run.
        checkpoint (`Path`):
            A whole checkpoint folder.
    """
    args = trainer.args
    if not args.hub_always_push and trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        return
    folder = Path(args.output_dir)
    for file in checkpoint.glob("pytorch_lora_weights*.safetensors"):
        unfinished = folder / f"tmp-{file.name}"
        shutil.copy(file, unfinished)
        os.replace(unfinished, folder / file.name)  # never half a file, nor one that changes while it is uploaded
    trainer.create_model_card(model_name=trainer.hub_model_id.split("/")[-1])
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    api = HfApi(token=args.hub_token)
    message = f"Training in progress, step {trainer.state.global_step}"
    upload: dict[str, Any] = {
        "repo_id": trainer.hub_model_id,
        "revision": args.hub_revision,
        "run_as_future": True,
    }
    wanted = published_files(folder)
    jobs: Any = [api.upload_folder(folder_path=folder, commit_message=message, allow_patterns=wanted, **upload)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        message += ", checkpoint"
        jobs.append(api.upload_folder(folder_path=checkpoint, path_in_repo=place, commit_message=message, **upload))
    for job in jobs:
        job.add_done_callback(_tell_failure)
    if trainer.push_in_progress is None or trainer.push_in_progress.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        trainer.push_in_progress.jobs.extend(jobs)


def _tell_failure(job: Future[CommitInfo]) -> None:
    """`transformers` waits for uploads and does not look at what became of them."""
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning(f"A push to the Hub failed, and training goes on: {error}")


def _source(pipeline: DiffusionPipeline) -> str | None:
    """Where a pipeline was loaded from: a Hub id or a folder (which diffusers keeps as given, `Path` or string)."""
    source = pipeline.config.get("_name_or_path")
    return None if source is None else str(source)


def _card_settings(trainer: "MarbleNFTTrainer") -> dict[str, Any]:
    args = trainer.args
    config = trainer.flow.transformer.peft_config["default"]
    unused = () if args.balances_gradients else BALANCE_SETTINGS
    settings = {name: getattr(args, name) for name in CARD_SETTINGS if name not in unused}
    if not trainer.flow.is_listed:  # the card cannot look its guidance up
        settings |= trainer.flow.family.guidance_arguments(settings.pop("guidance_scale"))
    settings |= {"optimizer_steps": trainer.state.global_step, "processes": args.world_size}
    settings |= {"lora_rank": config.r, "lora_alpha": config.lora_alpha}
    for before, after in itertools.pairwise(trainer.settings_history):
        for name in CARD_SETTINGS:
            if name in settings and before.settings.get(name) != after.settings.get(name):
                settings[f"{name} until step {after.step}"] = before.settings.get(name)
    return {name: value for name, value in settings.items() if value is not None}


def _save_gallery(trainer: "MarbleNFTTrainer", folder: Path) -> list[GalleryItem]:
    """The first image of each prompt that the latest evaluation kept."""
    if not trainer.evaluations:
        return []
    (folder / "images").mkdir(exist_ok=True)
    items = []
    for number, (prompt, images) in enumerate(trainer.evaluations[-1].gallery.items()):
        path = f"images/sample_{number}{sample_suffix(images[0])}"
        save_sample(images[0], folder / path, lossless=False)
        items.append(GalleryItem(path=path, prompt=prompt))
    return items
