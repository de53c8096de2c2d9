# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How far the rewards of generation batches are from those of the base model, on the same prompts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers.utils import logging

from ..balance import ProgressWeights
from ..metrics import MetricBuffer
from ..pipelines import adapters_disabled, row_digests
from ..rewards import RewardScorer
from ..sde import SDEWindow
from ..seeding import Draw, derive_seed
from .gathering import gather_rewards, gather_rows
from .rows import Places, RowSampler
from .sampler import RolloutSampler, Samples


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BaseImageSettings:
    """
    Settings of the base model's images.

    Args:
        seed (`int`):
            Seed of the run.
        images_per_prompt (`int`):
            Images of the base model per prompt.
        batch_size (`int`):
            Images that one call of the pipeline samples.
        edits (`bool`):
            Whether the pipeline edits the images of the column `image`.
    """

    seed: int
    images_per_prompt: int
    batch_size: int
    edits: bool


class ProgressMeter:
    """
    Feeds [`~trl_marble.balance.ProgressWeights`]. When a prompt is drawn for the first time in a run, images of the
    base model are sampled and scored for it, with seeds that depend on the row of the dataset alone.

    Args:
        weights ([`~trl_marble.balance.ProgressWeights`]):
            What is fed.
        sampler ([`RolloutSampler`]):
            Samples and scores.
        scorer ([`~trl_marble.rewards.RewardScorer`]):
            The rewards that are trained on.
        dataset ([`~datasets.Dataset`]):
            The prompts.
        settings ([`BaseImageSettings`]):
            Settings.
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over processes.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
    """

    def __init__(
        self,
        weights: ProgressWeights,
        sampler: RolloutSampler,
        scorer: RewardScorer,
        dataset: Dataset,
        settings: BaseImageSettings,
        accelerator: Accelerator,
        metrics: MetricBuffer,
    ) -> None:
        self.weights, self.sampler, self.scorer = weights, sampler, scorer
        self.settings, self.accelerator, self.metrics = settings, accelerator, metrics
        self._rows = RowSampler(sampler, scorer, dataset, settings.batch_size, settings.edits)
        self._said_that_all_are_reached = False

    def prepare(
        self,
        row_numbers: Sequence[int],
        prompts: Sequence[str],
        images: Sequence[Any] | None,
        trainer_state: Any,
        sde: SDEWindow | None = None,
    ) -> Tensor:
        """
        Begin a generation batch: sample the base model's images of prompts that are new. All processes call it.

        Args:
            row_numbers (`Sequence[int]`):
                The row of the dataset of each of this process's images.
            prompts (`Sequence[str]`):
                Their prompts.
            images (`Sequence[PIL.Image.Image]`, *optional*):
                The images to be edited.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.
            sde ([`~trl_marble.sde.SDEWindow`], *optional*):
                Solver steps that add noise, as in the rollouts that are compared with these images.

        Returns:
            `Tensor` of shape `[B]`, int64: the id of the prompt of each image of all processes.

        Raises:
            `ValueError`: If a bound is not above the base model's mean of its reward.
        """
        self.weights.roll_back()  # what a generation batch has left that no optimizer step has used
        ids = _prompt_ids(row_numbers, row_digests(prompts, images))
        gathered = gather_rows(self.accelerator, torch.stack([ids, torch.tensor(row_numbers)], dim=1))
        rows = dict(gathered.tolist())
        if missing := self.weights.missing(gathered[:, 0]):
            base_ids = torch.tensor(missing).repeat_interleave(self.settings.images_per_prompt)
            rewards = self._sample_base([rows[prompt] for prompt in missing], trainer_state, sde)
            with self.sampler.together.phase():
                self.weights.add_base(base_ids, rewards)
        return gathered[:, 0]

    def observe(self, prompt_ids: Tensor, rewards: Tensor) -> None:
        """
        Take in the rewards of a generation batch, and record how far they have come and what they weigh.

        Args:
            prompt_ids (`Tensor` of shape `[B]`, int64):
                What [`~ProgressMeter.prepare`] returned.
            rewards (`Tensor` of shape `[K, B]`):
                The rewards of the images of all processes.
        """
        self.weights.observe(prompt_ids, rewards)
        progress, weights = self.weights.progress.tolist(), self.weights.weights.tolist()
        for name, value, weight in zip(self.scorer.names, progress, weights, strict=True):
            self.metrics.record(f"progress/{name}", value)
            self.metrics.record(f"progress/weight/{name}", weight)
        if self.weights.reached.all() and not self._said_that_all_are_reached:
            self._said_that_all_are_reached = True
            if self.accelerator.is_main_process:
                levels = ", ".join(
                    f"{name} {level:g}" for name, level in zip(self.scorer.names, self.weights.levels, strict=True)
                )
                logger.warning(
                    f"All rewards have reached their targets ({levels}): none of them weighs anything until one falls "
                    "below its target. Until then only the trust region and the KL penalty act."
                )

    def _sample_base(self, rows: Sequence[int], trainer_state: Any, sde: SDEWindow | None) -> Tensor:
        """The rewards `[K, rows x images per prompt]` of the base model's images, on all processes."""
        images_per_prompt, number = self.settings.images_per_prompt, len(rows) * self.settings.images_per_prompt
        # Equal shares: the last image is sampled again until they are, and only its first scores are used.
        share = -(-number // self.accelerator.num_processes)
        first = share * self.accelerator.process_index
        numbers = [min(i, number - 1) for i in range(first, first + share)]
        places = [divmod(place, images_per_prompt) for place in numbers]
        seeds = [derive_seed(self.settings.seed, Draw.BASE, rows[place], image) for place, image in places]
        own_rows = self._rows.read([rows[place] for place, _ in places])
        embeddings = self._rows.encode(own_rows)
        with adapters_disabled(self.sampler.flow.transformer):
            own = Places(numbers, [place for place, _ in places], seeds)
            samples = self._rows.sample(own_rows, embeddings, own, trainer_state, sde)
        self._warn_of_missing_scores(samples)
        return gather_rewards(self.accelerator, samples.scores)[:, :number]

    def _warn_of_missing_scores(self, samples: Samples) -> None:
        own = (samples.scores.failed.any(dim=0) | ~samples.finite).sum()
        left_out = int(gather_rows(self.accelerator, own[None]).sum())
        if left_out and self.accelerator.is_main_process:
            causes = "".join(f" {error}" for error in samples.scores.errors[:1])
            logger.warning(
                f"{left_out} images of the base model lack a score, because a reward failed or they are not finite; "
                f"they are left out.{causes}"
            )


def _prompt_ids(row_numbers: Sequence[int], digests: Sequence[str]) -> Tensor:
    """
    Ids `[B]`, int64, that are the same for the same row of the same content: in a run that resumes with another
    dataset no prompt is taken for another one.
    """
    texts = [f"{row} {digest}" for row, digest in zip(row_numbers, digests, strict=True)]
    hashes = {text: hashlib.sha256(text.encode()).digest() for text in dict.fromkeys(texts)}
    return torch.tensor([int.from_bytes(hashes[text][:8], "big", signed=True) for text in texts])
