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
            Clean latents x0, all 0 where they are not finite.
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            What they look like: images, or videos.
        finite (`Tensor` of shape `[B]`, bool, on the CPU):
            Which samples have finite latents. No reward is asked about the others.
        scores ([`~trl_marble.rewards.Scores`]):
            What the rewards said of them: one row a reward, those of the first scorer first.
    """

    latents: Tensor
    images: list[Sample]
    finite: Tensor
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
    finite: list[Tensor] = []
    pending: list[list[PendingScores]] = []
    together, sharded = trainer.together, trainer.args.base_is_sharded
    with together.phase(exchanges=sharded), trainer.progress("rollout", len(prompts)) as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            rollout = trainer.flow.rollout(
                conditioning.select(prompt_index[part]), seeds[part], trainer.args.num_inference_steps
            )
            sampled = list(rollout.images)
            is_finite = rollout.latents.flatten(1).isfinite().all(dim=1)
            latents.append(torch.where(is_finite.view(-1, *[1] * (rollout.latents.ndim - 1)), rollout.latents, 0.0))
            finite.append(is_finite.cpu())
            images.extend(sampled)
            shown = finite[-1].nonzero().flatten().tolist()
            shown_columns = {name: [values[start + i] for i in shown] for name, values in columns.items()}
            shown_prompts = [prompts[start + i] for i in shown]
            pending.append(
                [
                    scorer.submit([sampled[i] for i in shown], shown_prompts, shown_columns, trainer.state)
                    for scorer in (scorers if shown else [])
                ]
            )
            bar.update(len(sampled))
    scores: list[Scores] = []
    with together.phase(), reward_advice(), trainer.progress("rewards", len(prompts)) as bar:
        for waiting, was_shown in zip(pending, finite, strict=True):
            answers = [scorer.collect(part) for scorer, part in zip(scorers, waiting, strict=False)]
            scores.append(_stack(answers, was_shown, sum(len(scorer) for scorer in scorers)))
            bar.update(len(was_shown))
        for scorer in scorers:
            scorer.release()
        scored = Scores.concatenate(scores)
        raise_failures(scored, trainer.args)
    return Samples(torch.cat(latents), images, torch.cat(finite), scored)


def _stack(parts: Sequence[Scores], was_shown: Tensor, num_rewards: int) -> Scores:
    """What several scorers said of the images that they were shown, as one, and nothing of the other images."""
    rewards = torch.full((num_rewards, len(was_shown)), torch.nan)
    failed = torch.zeros(rewards.shape, dtype=torch.bool)
    if parts:
        rewards[:, was_shown] = torch.cat([part.rewards for part in parts])
        failed[:, was_shown] = torch.cat([part.failed for part in parts])
    return Scores(rewards, failed, [error for part in parts for error in part.errors])
