# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation measures: rewards on the same prompts and seeds every time, diversity, and drift."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..evaluation import Evaluation
from ..evaluation.diversity import group_diversity, thumbnails
from ..media import Sample
from ..pipelines import Conditioning, adapters_disabled, edits_images, encode_distinct
from .sampling import sample_and_score
from .seeding import Draw, derive_seed


if TYPE_CHECKING:
    from .marble_nft_trainer import MarbleNFTTrainer


@dataclass(frozen=True)
class PolicyEvaluation:
    """
    An evaluation and what else was measured on the way. The same on all processes, but for the velocity norm.

    Args:
        evaluation ([`~trl_marble.evaluation.Evaluation`]):
            Rewards, those that are trained on first, and the images of some prompts.
        gallery_rewards (`dict[str, Tensor]`):
            Prompt of the gallery -> rewards of its images, of shape `[K, number of images]`.
        failed (`dict[str, int]`):
            How many images each reward failed for.
        diversity (`float`):
            Mean over prompts of [`~trl_marble.evaluation.diversity.group_diversity`], in [0, 1]; NaN with one image a
            prompt.
        velocity_norm (`float`):
            Norm of the policy's velocity relative to the base model's, on a batch of this process's images.
    """

    evaluation: Evaluation
    gallery_rewards: dict[str, Tensor]
    failed: dict[str, int]
    diversity: float
    velocity_norm: float

    def metrics(self, prefix: str, count_failures: bool) -> dict[str, float]:
        """What is logged of it, by `<prefix>_...` names; without a diversity where none was measured."""
        metrics = {f"{prefix}_drift/velocity_norm": self.velocity_norm}
        if not math.isnan(self.diversity):
            metrics[f"{prefix}_drift/diversity"] = self.diversity
        for row, (name, (mean, error)) in zip(self.evaluation.rewards, self.evaluation.summary().items(), strict=True):
            key = f"{prefix}_rewards/{name}"
            valid = 1 - row.isnan().float().mean().item()
            metrics |= {f"{key}/mean": mean, f"{key}/standard_error": error, f"{key}/valid": valid}
            if count_failures:
                metrics[f"{key}/failed"] = self.failed[name]
        return metrics


def evaluate_policy(trainer: "MarbleNFTTrainer", dataset: Dataset) -> PolicyEvaluation:
    """
    Sample and score `num_generations_eval` images for each prompt with the weights that are in place now.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run.
        dataset ([`~datasets.Dataset`]):
            The prompts. Each process takes its share of the images.
    """
    args = trainer.args
    repeats = args.num_generations_eval
    indices = range(len(dataset) * repeats)[args.process_index :: args.world_size]
    rows = [dataset[i // repeats] for i in indices]
    prompts = [row["prompt"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in dataset.column_names if name != "prompt"}
    seeds = [derive_seed(args.seed, Draw.EVALUATION, i) for i in indices]
    to_edit = columns["image"] if edits_images(trainer.flow, dataset, "eval_dataset") else None
    conditioning, prompt_index = encode_distinct(trainer.flow, prompts, to_edit)
    batch_size = args.per_device_eval_batch_size
    samples = sample_and_score(
        trainer, trainer.scorers, conditioning, prompt_index, prompts, columns, seeds, batch_size
    )
    norm = _relative_velocity_norm(
        trainer, samples.latents[:batch_size], conditioning.select(prompt_index[:batch_size]), seeds
    )

    # Images of the gallery: those of prompts spread over the dataset.
    shown = {(k * len(dataset)) // args.num_images_to_log for k in range(args.num_images_to_log)}
    features = thumbnails(samples.images).numpy()
    found = [
        (
            i,
            samples.rewards[:, place].tolist(),
            features[place],
            samples.images[place] if i // repeats in shown else None,
        )
        for place, i in enumerate(indices)
    ]
    found = sorted(gather_object(found), key=lambda entry: entry[0])
    gallery: dict[str, list[Sample]] = {}
    gallery_rewards: dict[str, list[Tensor]] = {}
    for i, values, _, image in found:
        if image is not None:
            prompt = dataset[i // repeats]["prompt"]
            gallery.setdefault(prompt, []).append(image)
            gallery_rewards.setdefault(prompt, []).append(torch.tensor(values))
    rewards = torch.tensor([values for _, values, _, _ in found]).T
    all_features = torch.stack([torch.from_numpy(thumbnail) for _, _, thumbnail, _ in found])
    diversity = group_diversity(all_features, torch.arange(len(found)) // repeats).mean().item()
    names = [name for scorer in trainer.scorers for name in scorer.names]
    return PolicyEvaluation(
        evaluation=Evaluation(trainer.state.global_step, names, rewards, gallery),
        gallery_rewards={prompt: torch.stack(values, dim=1) for prompt, values in gallery_rewards.items()},
        failed=samples.failed,
        diversity=diversity,
        velocity_norm=norm,
    )


@torch.no_grad()
def _relative_velocity_norm(
    trainer: "MarbleNFTTrainer", x0: Tensor, conditioning: Conditioning, seeds: Sequence[int]
) -> float:
    """Norm of the policy's velocity divided by the base model's, half way between image and noise."""
    x0 = x0.float()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[: len(x0)]]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators]).to(x0)
    x_t, t = (x0 + noise) / 2, torch.full((len(x0),), 0.5, device=x0.device)
    with trainer.compute_loss_context_manager():
        policy = trainer.model(x_t, t, conditioning)
        with adapters_disabled(trainer.flow.transformer):
            base = trainer.model(x_t, t, conditioning)
    return (policy.float().norm() / base.float().norm()).item()
