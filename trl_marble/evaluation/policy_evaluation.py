# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation measures: rewards on the same prompts and seeds every time, diversity, and drift."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..data import read_rows
from ..evaluation import Evaluation
from ..evaluation.diversity import group_diversity, thumbnails
from ..evaluation.evaluator import image_seed
from ..evaluation.statistics import number_prompts
from ..media import Sample
from ..pipelines import Conditioning, adapters_disabled, edits_images, encode_distinct, with_rgb_images
from ..rewards import Scores
from ..rewards.call_log import LogKey, column_names
from .metrics import average_logged
from .reward_failures import count_failures
from .sampling import sample_and_score


if TYPE_CHECKING:
    from .marble_nft_trainer import MarbleNFTTrainer


@dataclass(frozen=True)
class PolicyEvaluation:
    """
    An evaluation and what else was measured on the way. The same on all processes.

    Args:
        evaluation ([`~trl_marble.evaluation.Evaluation`]):
            Rewards, those that are trained on first, and the images of some prompts.
        gallery_rewards (`dict[str, Tensor]`):
            Prompt of the gallery -> rewards of its images, of shape `[K, number of images]`.
        gallery_extras (`dict[str, dict[str, list]]`):
            Prompt of the gallery -> what rewards logged with `log_extra`: column -> one value for each of its images.
        logged (`dict[str, float]`):
            Means of what rewards logged with `log_metric`.
        failed (`dict[str, int]`):
            How many images each reward failed for; empty where a failure raises.
        nonfinite_latents (`int` or `None`):
            How many images have latents that are not finite; `None` where that raises.
        diversity (`float`):
            Mean over prompts of [`~trl_marble.evaluation.diversity.group_diversity`], in [0, 1]; NaN with one image a
            prompt.
        velocity_norm (`float`):
            Norm of the policy's velocity relative to the base model's, on the first batch of images.
    """

    evaluation: Evaluation
    gallery_rewards: dict[str, Tensor]
    gallery_extras: dict[str, dict[str, list[Any]]]
    logged: dict[str, float]
    failed: dict[str, int]
    nonfinite_latents: int | None
    diversity: float
    velocity_norm: float

    def metrics(self, prefix: str, count_failures: bool) -> dict[str, float]:
        """What is logged of it, by `<prefix>_...` names; without a diversity where none was measured."""
        metrics = {f"{prefix}_drift/velocity_norm": self.velocity_norm}
        if not math.isnan(self.diversity):
            metrics[f"{prefix}_drift/diversity"] = self.diversity
        if self.nonfinite_latents is not None:
            metrics[f"{prefix}_nonfinite/latents"] = self.nonfinite_latents
        metrics |= {f"{prefix}_{name}": value for name, value in self.logged.items()}
        for row, (name, (mean, error)) in zip(self.evaluation.rewards, self.evaluation.summary().items(), strict=True):
            key = f"{prefix}_rewards/{name}"
            valid = 1 - row.isnan().float().mean().item()
            metrics |= {f"{key}/mean": mean, f"{key}/standard_error": error, f"{key}/valid": valid}
            if count_failures:
                metrics[f"{key}/failed"] = self.failed[name]
        return metrics


def evaluate_policy(trainer: "MarbleNFTTrainer", dataset: Dataset, name: str | None = None) -> PolicyEvaluation:
    """
    Sample and score `num_generations_eval` images for each prompt with the weights that are in place now.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run.
        dataset ([`~datasets.Dataset`]):
            The prompts. Each process takes its share of the images.
        name (`str`, *optional*):
            The name of the prompt set, where there are several.
    """
    args = trainer.args
    repeats = args.num_generations_eval
    names = [name for scorer in trainer.scorers for name in scorer.names]
    found, scores, nonfinite_latents = _own_images(trainer, dataset)
    with trainer.together.phase():
        failed = count_failures(scores, names, trainer.accelerator) if args.masks_rewards else {}
        logged = average_logged(scores.metrics)

    images = sorted(gather_object(found), key=lambda image: image.number)
    prompts = dataset["prompt"][:]
    gallery: dict[str, list[Sample]] = {}
    gallery_rewards: dict[str, list[Tensor]] = {}
    gallery_extras: dict[str, dict[str, list[Any]]] = {}
    keys = list(dict.fromkeys(key for image in images for key in image.extras))  # not every process may have them all
    for image in images:
        if image.shown is not None:
            prompt = prompts[image.number // repeats]
            gallery.setdefault(prompt, []).append(image.shown)
            gallery_rewards.setdefault(prompt, []).append(torch.tensor(image.rewards))
            columns = gallery_extras.setdefault(prompt, {column: [] for column in column_names(keys)})
            for key, values in zip(keys, columns.values(), strict=True):
                values.append(image.extras.get(key))
    rewards = torch.tensor([image.rewards for image in images]).T
    features = torch.stack([torch.from_numpy(image.thumbnail) for image in images])
    rows = [image.number // repeats for image in images]
    edits = edits_images(trainer.flow, dataset, "eval_dataset")
    groups = torch.from_numpy(number_prompts([prompts[row] for row in rows], rows, edits))
    diversity = group_diversity(features, groups).nanmean().item()
    policy, base = torch.tensor([image.velocity for image in images if image.velocity], dtype=torch.float64).sum(dim=0)
    return PolicyEvaluation(
        evaluation=Evaluation(trainer.state.global_step, names, rewards, groups, gallery, name),
        gallery_rewards={prompt: torch.stack(values, dim=1) for prompt, values in gallery_rewards.items()},
        gallery_extras=gallery_extras,
        logged=logged,
        failed=failed,
        nonfinite_latents=nonfinite_latents if args.on_nonfinite == "mask" else None,
        diversity=diversity,
        velocity_norm=(policy / base).sqrt().item(),
    )


class _EvaluatedImage(NamedTuple):
    """What processes tell each other of an image: all but its pixels, unless it is shown in the gallery."""

    number: int
    rewards: list[float]
    thumbnail: np.ndarray
    shown: Sample | None
    extras: dict[LogKey, Any]  # of an image that is shown
    velocity: tuple[float, float] | None  # squared norms of the policy's and the base model's, where they are measured


def _own_images(trainer: "MarbleNFTTrainer", dataset: Dataset) -> tuple[list[_EvaluatedImage], Scores, int]:
    """Sample, score and measure the images of this process; how many of all processes are not finite."""
    args = trainer.args
    num_images = len(dataset) * args.num_generations_eval
    # All processes sample equally many, so that they call the transformer equally often: the last image fills up.
    places_of_all = range(args.process_index, -(-num_images // args.world_size) * args.world_size, args.world_size)
    indices = [min(i, num_images - 1) for i in places_of_all]
    num_own = sum(i < num_images for i in places_of_all)
    with trainer.together.phase():
        edits = edits_images(trainer.flow, dataset, "eval_dataset")
        dataset = with_rgb_images(dataset) if edits else dataset
        columns = read_rows(dataset, [i // args.num_generations_eval for i in indices])
        prompts = columns.pop("prompt")
        # The seeds of `evaluate_pipeline`, so that both give the same images.
        seeds = [image_seed(args.seed, *divmod(i, args.num_generations_eval)) for i in indices]
        to_edit = columns["image"] if edits else None
        conditioning, prompt_index = encode_distinct(trainer.flow, prompts, to_edit)
    batch_size = args.per_device_eval_batch_size
    samples = sample_and_score(
        trainer, trainer.scorers, conditioning, prompt_index, prompts, columns, seeds, batch_size
    )
    with trainer.together.phase():
        nonfinite_latents = trainer.nonfinite.settle_latents(samples.finite[:num_own], prompts[:num_own])
    # Velocities of the first batch of all images, whichever processes they are on.
    num_measured = -(-batch_size // args.world_size)
    with trainer.together.phase(exchanges=args.base_is_sharded):
        velocities = _squared_velocity_norms(
            trainer, samples.latents[:num_measured], conditioning.select(prompt_index[:num_measured]), seeds
        )
    # Images of the gallery: those of prompts spread over the dataset.
    shown = {(k * len(dataset)) // args.num_images_to_log for k in range(args.num_images_to_log)}
    features = thumbnails(samples.images).masked_fill(~samples.finite[:, None], torch.nan).numpy()
    found = [
        _EvaluatedImage(
            number=i,
            rewards=samples.scores.rewards[:, place].tolist(),
            thumbnail=thumbnail,
            shown=samples.images[place] if i // args.num_generations_eval in shown else None,
            extras={
                key: values[place]
                for key, values in samples.scores.extras.items()
                if i // args.num_generations_eval in shown
            },
            velocity=velocities[place] if i < batch_size else None,
        )
        for place, (i, thumbnail) in enumerate(zip(indices, features, strict=True))
    ]
    scores = samples.scores
    own_scores = Scores(scores.rewards[:, :num_own], scores.failed[:, :num_own], scores.errors, scores.metrics)
    return found[:num_own], own_scores, nonfinite_latents


@torch.no_grad()
def _squared_velocity_norms(
    trainer: "MarbleNFTTrainer", x0: Tensor, conditioning: Conditioning, seeds: Sequence[int]
) -> list[tuple[float, float]]:
    """Squared norms of the policy's and the base model's velocities of each image, half way between it and noise."""
    x0 = x0.float()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[: len(x0)]]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
    x_t, t = (x0 + noise) / 2, torch.full((len(x0),), 0.5, device=x0.device)
    policy = trainer.model(x_t, t, conditioning)
    with adapters_disabled(trainer.flow.transformer):
        base = trainer.model(x_t, t, conditioning)
    norms = [velocity.float().square().flatten(1).sum(dim=1).tolist() for velocity in (policy, base)]
    return list(zip(*norms, strict=True))
