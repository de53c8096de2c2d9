# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Images or videos of a policy and what the rewards say of them, for rollouts and evaluations alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..media import Sample
from ..pipelines import Conditioning
from ..rewards import PendingScores, RewardScorer, Scores
from .out_of_memory import reward_advice
from .reward_failures import raise_failures


if TYPE_CHECKING:
    from .marble_nft_trainer import MarbleNFTTrainer


class Samples(NamedTuple):
    """
    This process's samples.

    Args:
        latents (`Tensor` of shape `[B, ...]`):
            Clean latents x0.
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            What they look like: images, or videos.
        scores ([`~trl_marble.rewards.Scores`]):
            What the rewards said of them: one row a reward, those of the first scorer first.
    """

    latents: Tensor
    images: list[Sample]
    scores: Scores


@torch.no_grad()
def sample_and_score(
    trainer: "MarbleNFTTrainer",
    scorers: Sequence[RewardScorer],
    conditioning: Conditioning,
    prompt_index: Tensor,
    prompts: list[str],
    columns: dict[str, list],
    seeds: list[int],
    batch_size: int,
) -> Samples:
    """
    Sample with the weights that are in place now, and score. A batch is scored while the next one is sampled.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run.
        scorers (`Sequence[RewardScorer]`):
            The rewards to ask.
        conditioning ([`~trl_marble.pipelines.Conditioning`]):
            Embeddings of the different prompts.
        prompt_index (`Tensor` of shape `[B]`, int64):
            Which of them each image is sampled from.
        prompts (`list[str]`):
            The prompt of each image.
        columns (`dict[str, list]`):
            The other columns of the dataset, one value an image.
        seeds (`list[int]`):
            The seed of each image.
        batch_size (`int`):
            Number of images that one call of the pipeline samples.

    Raises:
        [`~trl_marble.rewards.RewardError`]: If a reward answered nonsense, or failed and `MarbleConfig.reward_failure`
            is `"raise"`.
    """
    trainer.model.eval()
    latents: list[Tensor] = []
    images: list[Sample] = []
    pending: list[list[PendingScores]] = []
    together, sharded = trainer.together, trainer.args.base_is_sharded
    with together.phase(exchanges=sharded), trainer.progress("rollout", len(prompts)) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            with trainer.compute_loss_context_manager():
                rollout = trainer.flow.rollout(
                    conditioning.select(prompt_index[part]), seeds[part], trainer.args.num_inference_steps
                )
            sampled = list(rollout.images)
            latents.append(rollout.latents)
            images.extend(sampled)
            part_columns = {name: values[part] for name, values in columns.items()}
            pending.append([scorer.submit(sampled, prompts[part], part_columns, trainer.state) for scorer in scorers])
            bar.update(len(sampled))
    scores: list[Scores] = []
    with together.phase(), reward_advice(), trainer.progress("rewards", len(prompts)) as bar:
        for waiting in pending:
            answers = [scorer.collect(part) for scorer, part in zip(scorers, waiting, strict=True)]
            scores.append(_stack(answers))
            bar.update(len(waiting[0].prompts))
        for scorer in scorers:
            scorer.release()
        scored = Scores.concatenate(scores)
        if trainer.args.reward_failure == "raise":
            raise_failures(scored)
    return Samples(torch.cat(latents), images, scored)


def _stack(parts: Sequence[Scores]) -> Scores:
    """What several scorers said of the same images, as one."""
    return Scores(
        torch.cat([part.rewards for part in parts]),
        torch.cat([part.failed for part in parts]),
        [error for part in parts for error in part.errors],
    )
