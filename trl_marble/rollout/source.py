# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Where generation batches come from: sampled now, or read from a checkpoint."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..balance import ProgressWeights, mask_silent_groups
from ..media import Sample
from ..metrics import MetricBuffer
from ..nonfinite import CAUSES
from ..pipelines import encode_distinct
from ..rewards import RewardScorer, Scores
from ..sde import SDEWindow
from ..seeding import Draw
from .arranging import BatchArranger
from .batch import RolloutBatch, StoredBatch
from .gathering import gather_rewards, gather_rows
from .layout import BatchLayout
from .progress_meter import ProgressMeter
from .resampling import Resampler, find_silent_groups
from .reward_learning import RewardLearning
from .reward_logs import average_logged
from .rollout_metrics import RolloutMetrics
from .rows import Places, RolloutTask, Rows, RowSampler, ScoredRows, set_images
from .sampler import RolloutSampler
from .settings import RolloutSettings


@dataclass(frozen=True)
class RolloutRecord:
    """
    What a rollout leaves to be shown. Rewards are those of the images of this process unless it says otherwise.

    Args:
        prompts (`list[str]`):
            The prompt of each image.
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            The images, or videos.
        scores ([`~trl_marble.rewards.Scores`]):
            Their rewards, and what rewards logged of them.
        all_rewards (`Tensor` of shape `[K, B]`, float32):
            The rewards of the images of all processes.
        all_sources (`list[str]`, *optional*):
            The column `source` of the images of all processes, where the prompt set has it.
    """

    prompts: list[str]
    images: list[Sample]
    scores: Scores
    all_rewards: Tensor
    all_sources: list[str] | None


class RolloutSource:
    """
    Makes generation batches: samples prompts, scores the images and compares them with their group.

    Args:
        sampler ([`RolloutSampler`]):
            Samples and scores.
        scorer ([`~trl_marble.rewards.RewardScorer`]):
            The rewards that are trained on.
        dataset ([`~datasets.Dataset`]):
            The prompts.
        layout ([`BatchLayout`]):
            How a generation batch is cut into optimizer steps.
        settings ([`RolloutSettings`]):
            Settings.
        compute_advantages (`Callable[[Tensor, Tensor], Tensor]`):
            From rewards `[K, B]` and groups `[B]` of all processes to advantages; with shares also from those of the
            samples, `[B, K]`.
        compare_with_sum (`Callable[[Tensor, Tensor], Tensor]`):
            From rewards `[K, B]`, and what `assign_teachers` returned, to how their weighted sum would mix the
            gradients of rewards and teachers, `[K + T]`.
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over processes.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
        progress_meter ([`ProgressMeter`], *optional*):
            Takes in the rewards of each generation batch before its advantages are computed.
        choose_window (`Callable[[int], SDEWindow | None]`, *optional*):
            From the number of a generation batch to the solver steps that add noise. By default none do.
        assign_teachers (`Callable[[Sequence[str] | None, Tensor], Tensor]`, *optional*):
            From the column `source` of the samples of all processes, where there is one, and which of them can be
            trained on `[B]`, to a row for each teacher `[T, B]`: 1 where it applies, and NaN elsewhere. The rows
            follow those of the advantages. By default there are no teachers.
        learning ([`RewardLearning`], *optional*):
            Lets rewards learn from each generation batch once its advantages are computed.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        scorer: RewardScorer,
        dataset: Dataset,
        layout: BatchLayout,
        settings: RolloutSettings,
        compute_advantages: Callable[..., Tensor],
        compare_with_sum: Callable[[Tensor, Tensor], Tensor],
        accelerator: Accelerator,
        metrics: MetricBuffer,
        progress_meter: ProgressMeter | None = None,
        choose_window: Callable[[int], SDEWindow | None] | None = None,
        assign_teachers: Callable[[Sequence[str] | None, Tensor], Tensor] | None = None,
        learning: RewardLearning | None = None,
    ) -> None:
        self.layout, self.settings, self.accelerator, self.metrics = layout, settings, accelerator, metrics
        self.compute_advantages, self.compare_with_sum = compute_advantages, compare_with_sum
        self.choose_window, self.assign_teachers = choose_window, assign_teachers
        self.progress_meter, self.learning, self.together = progress_meter, learning, sampler.together
        self._own = layout.own_samples(accelerator.process_index)
        self._rows = RowSampler(sampler, scorer, dataset, settings.batch_size, settings.edits)
        self._resampler = Resampler(self._rows, layout, settings, accelerator, metrics)
        self._arranger = BatchArranger(layout, settings.seed, accelerator)
        self._rollout_metrics = RolloutMetrics(sampler, scorer.names, accelerator, metrics)

    # ---- From a checkpoint ----

    def restore(self, stored: StoredBatch, row_numbers: Sequence[int]) -> RolloutBatch:
        """
        A generation batch of a checkpoint, with the embeddings of its prompts. All processes call it.

        Args:
            stored ([`StoredBatch`]):
                The batch.
            row_numbers (`Sequence[int]`):
                The row of the dataset of each of this process's images.

        Raises:
            `ValueError`: If it was sampled from others.
        """
        numbers = gather_object(list(row_numbers))  # of all processes, in the order of the generation batch
        rows = self._rows.read([stored.replaced.get(place, numbers[place]) for place in stored.covered])
        with self.together.phase():
            encode = functools.partial(encode_distinct, self._rows.sampler.flow)
            return stored.with_rows(rows.prompts, rows.images, encode)

    @property
    def progress(self) -> ProgressWeights | None:
        """Weights from the progress of the rewards, where the run has them."""
        return None if self.progress_meter is None else self.progress_meter.weights

    def commit(self) -> None:
        """
        Keep what the latest generation batch has found out of the progress, and what rewards have learned from it,
        once an optimizer step has used it.
        """
        if self.progress is not None:
            self.progress.commit()
        if self.learning is not None:
            self.learning.commit()

    # ---- Sampled now ----

    def sample(
        self, row_numbers: Sequence[int], generation: int, trainer_state: Any
    ) -> tuple[RolloutBatch, RolloutRecord]:
        """
        Sample and score with the weights that are in place.

        Args:
            row_numbers (`Sequence[int]`):
                The row of the dataset of each of this process's images.
            generation (`int`):
                Number of the generation batch.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.

        Returns:
            `tuple[RolloutBatch, RolloutRecord]`: What is trained on, and what can be shown.
        """
        sde = None if self.choose_window is None else self.choose_window(generation)
        task = RolloutTask(generation, row_numbers, trainer_state, sde)
        self._roll_back_learning()
        rows = self._rows.read(row_numbers)
        prompt_ids = self._prepare_progress(task, rows)
        scored = self._sample_and_score(task, rows)
        if self.settings.resample_rounds > 0:
            scored = self._resampler.resample(task, scored, functools.partial(self._find_silent, task))
        finite = gather_rows(self.accelerator, scored.samples.finite)
        self._check_any_is_finite(finite)
        groups = self._groups(scored.rewards)
        self._rollout_metrics.record(scored.samples, finite, scored.rewards, groups, trainer_state.global_step)
        self._observe_progress(prompt_ids, scored.rewards)
        sources = self._gather_sources(scored.rows)
        taught = self._teach(sources, finite, scored.rewards)
        advantages = mask_silent_groups(self._advantages(task, scored.rewards), groups)
        weighted_sum = self.compare_with_sum(scored.rewards, taught)
        batch = self._arranger.arrange(generation, scored, groups, advantages, taught, weighted_sum)
        self._learn(task, scored)
        samples = scored.samples
        return batch, RolloutRecord(scored.rows.prompts, samples.images, samples.scores, scored.rewards, sources)

    def _roll_back_learning(self) -> None:
        if self.learning is not None:
            with self.together.phase():
                self.learning.roll_back()

    def _prepare_progress(self, task: RolloutTask, rows: Rows) -> Tensor | None:
        """The ids of the prompts of all processes, where progress is measured on them."""
        if self.progress_meter is None:
            return None
        return self.progress_meter.prepare(task.row_numbers, rows.prompts, rows.images, task.trainer_state, task.sde)

    def _observe_progress(self, prompt_ids: Tensor | None, rewards: Tensor) -> None:
        if self.progress_meter is not None and prompt_ids is not None:
            self.progress_meter.observe(prompt_ids, rewards)

    def _sample_and_score(self, task: RolloutTask, rows: Rows) -> ScoredRows:
        embeddings = self._rows.encode(rows)
        samples = self._rows.sample(rows, embeddings, self._places(task), task.trainer_state, task.sde)
        return ScoredRows(rows, embeddings, samples, gather_rewards(self.accelerator, samples.scores))

    def _places(self, task: RolloutTask) -> Places:
        return Places.of(self._own, self.settings, Draw.ROLLOUT, task.generation)

    def _groups(self, rewards: Tensor) -> Tensor:
        return torch.arange(rewards.shape[1]) // self.settings.num_generations

    def _advantages(self, task: RolloutTask, rewards: Tensor) -> Tensor:
        """The advantages of the samples of all processes."""
        groups, shares = self._groups(rewards), self.settings.shares
        if shares is None:
            return self.compute_advantages(rewards, groups)
        return self.compute_advantages(rewards, groups, shares.of(task.generation, range(rewards.shape[1])))

    def _find_silent(self, task: RolloutTask, rewards: Tensor) -> list[int]:
        return find_silent_groups(self._advantages(task, rewards), self._groups(rewards))

    def _check_any_is_finite(self, finite: Tensor) -> None:
        with self.together.phase():
            if not finite.any():
                raise FloatingPointError(
                    f"The latents of all {len(finite)} sampled images are not finite: nothing is left to train on. "
                    f"{CAUSES}"
                )

    def _gather_sources(self, rows: Rows) -> list[str] | None:
        """The column `source` of all processes, where there is one."""
        if "source" not in rows.columns:
            return None
        return gather_object([str(source) for source in rows.columns["source"]])

    def _teach(self, sources: list[str] | None, finite: Tensor, rewards: Tensor) -> Tensor:
        """The rows of the teachers."""
        if self.assign_teachers is None:
            return rewards.new_empty(0, rewards.shape[1])
        return self.assign_teachers(sources, finite)

    def _learn(self, task: RolloutTask, scored: ScoredRows) -> None:
        """Let rewards learn, and record what they logged."""
        if self.learning is None:
            return
        images = set_images(scored.rows, self._places(task), scored.samples)
        logged = self.learning.update(images, scored.samples.scores, task.trainer_state)
        for name, mean in average_logged(logged).items():
            self.metrics.record(name, mean)
