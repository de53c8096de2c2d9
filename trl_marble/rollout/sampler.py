# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Images or videos of a policy and what the rewards say of them, for rollouts and evaluations alike."""

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from ..media import Sample
from ..pipelines import Conditioning
from ..rewards import PendingScores, RewardScorer, Scores
from ..rewards.call_log import LogKey
from ..rewards.threads import wait_until
from .out_of_memory import reward_advice
from .reward_failures import raise_failures


if TYPE_CHECKING:
    from .live_table import ProgressBar
    from .marble_config import MarbleConfig
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
    Sample with the weights that are in place now, and score. A batch is scored while the next one is sampled, and a
    failure that ends training does so before one more is.

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
    together, sharded = trainer.together, trainer.args.base_is_sharded
    with _AskedRewards(scorers, trainer.args) as asked:
        with trainer.progress("rollout", len(prompts)) as bar:
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                with together.phase(exchanges=sharded, ask=False):
                    rollout = trainer.flow.rollout(
                        conditioning.select(prompt_index[part]), seeds[part], trainer.args.num_inference_steps
                    )
                    sampled = list(rollout.images)
                    is_finite = rollout.latents.flatten(1).isfinite().all(dim=1)
                    keep = is_finite.view(-1, *[1] * (rollout.latents.ndim - 1))
                    latents.append(torch.where(keep, rollout.latents, 0.0))
                    finite.append(is_finite.cpu())
                    images.extend(sampled)
                    part_columns = {name: values[part] for name, values in columns.items()}
                    asked.ask(sampled, prompts[part], part_columns, finite[-1], trainer.state)
                # Here processes tell each other, so that none of them samples on when one has failed.
                with together.phase(), reward_advice():
                    asked.raise_failures()
                bar.update(len(sampled))
        with together.phase(), reward_advice(), trainer.progress("rewards", len(prompts)) as bar:
            scores = asked.collect(bar)
            for scorer in scorers:
                scorer.release()
    return Samples(torch.cat(latents), images, torch.cat(finite), scores)


class _AskedRewards:
    """The answers of several scorers about batch after batch, on their way. An exception in its context drops them."""

    def __init__(self, scorers: Sequence[RewardScorer], args: "MarbleConfig") -> None:
        self.scorers = scorers
        self.args = args
        self._batches: list[tuple[list[PendingScores], Tensor]] = []
        self._unchecked: list[tuple[RewardScorer, PendingScores]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for waiting, _shown in self._batches:
                for pending in waiting:
                    pending.cancel()

    def ask(
        self, sampled: list[Sample], prompts: list[str], columns: dict[str, list], shown: Tensor, trainer_state: Any
    ) -> None:
        """Let all rewards score those images of a batch that are to be shown to them."""
        places = shown.nonzero().flatten().tolist()
        chosen = {name: [values[i] for i in places] for name, values in columns.items()}
        waiting = [
            scorer.submit([sampled[i] for i in places], [prompts[i] for i in places], chosen, trainer_state)
            for scorer in (self.scorers if places else [])
        ]
        self._batches.append((waiting, shown))
        self._unchecked += zip(self.scorers, waiting, strict=False)

    def raise_failures(self) -> None:
        """Raise the first failure that ends training, among the calls that have ended by now."""
        unchecked = self._unchecked
        self._unchecked = [(scorer, pending) for scorer, pending in unchecked if not pending.done]
        for scorer, pending in unchecked:
            raise_failures(scorer.failures(pending), self.args)

    def collect(self, bar: "ProgressBar") -> Scores:
        """All scores, for which it waits `reward_timeout` seconds at most."""
        timeout = self.args.reward_timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        scores = []
        for waiting, shown in self._batches:
            while not all(pending.done for pending in waiting) and (deadline is None or time.monotonic() < deadline):
                calls = [call for _, pending in self._unchecked for call in pending.futures if not call.done()]
                wait_until(calls, deadline, FIRST_COMPLETED)
                self.raise_failures()
            answers = [
                scorer.collect(pending, deadline) for scorer, pending in zip(self.scorers, waiting, strict=False)
            ]
            for part in answers:
                raise_failures(part.errors, self.args)
            scores.append(_stack(answers, shown, sum(len(scorer) for scorer in self.scorers)))
            bar.update(len(shown))
        return Scores.concatenate(scores)


def _stack(parts: Sequence[Scores], was_shown: Tensor, num_rewards: int) -> Scores:
    """What several scorers said of the images that they were shown, as one, and nothing of the other images."""
    rewards = torch.full((num_rewards, len(was_shown)), torch.nan)
    failed = torch.zeros(rewards.shape, dtype=torch.bool)
    if parts:
        rewards[:, was_shown] = torch.cat([part.rewards for part in parts])
        failed[:, was_shown] = torch.cat([part.failed for part in parts])
    metrics: dict[LogKey, list[float]] = {}
    extras: dict[LogKey, list[Any]] = {}
    for part in parts:
        metrics |= part.metrics
        for key, values in part.extras.items():
            each = iter(values)
            extras[key] = [next(each) if is_shown else None for is_shown in was_shown.tolist()]
    return Scores(rewards, failed, [error for part in parts for error in part.errors], metrics, extras)
