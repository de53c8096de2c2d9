# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Where generation batches come from: sampled now, or read from a checkpoint."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..balance import ProgressWeights, mask_silent_groups, zero_std_fractions
from ..data import read_rows
from ..media import Sample
from ..memory_advice import rollout_advice
from ..metrics import MetricBuffer, mean_rms
from ..nonfinite import CAUSES
from ..pipelines import Conditioning, encode_distinct
from ..rewards import RewardScorer, Scores
from ..sde import SDEWindow
from ..seeding import Draw, derive_seed
from .batch import RolloutBatch, StoredBatch, digest_of, steps_of_samples, training_order
from .diversity import group_diversity, thumbnails
from .halves import split_prompts
from .layout import BatchLayout
from .progress_meter import ProgressMeter
from .resampling import OtherPrompts, find_silent_groups
from .reward_failures import count_failures
from .reward_learning import RewardLearning
from .reward_logs import average_logged
from .sampler import RolloutSampler, Samples
from .set_scores import SetImages
from .shares import ShareDraws


@dataclass(frozen=True)
class RolloutSettings:
    """
    Settings of rollouts.

    Args:
        seed (`int`):
            Seed of the run.
        num_generations (`int`):
            Images per prompt.
        batch_size (`int`):
            Images that one call of the pipeline samples.
        edits (`bool`):
            Whether the pipeline edits the images of the column `image`.
        resample_rounds (`int`, *optional*, defaults to `0`):
            How often other prompts are drawn for groups on which no reward tells images apart.
        shares ([`ShareDraws`], *optional*):
            Draws what share each reward has of each prompt: in what samples its images, and in its advantage. By
            default rewards have no shares.
    """

    seed: int
    num_generations: int
    batch_size: int
    edits: bool
    resample_rounds: int = 0
    shares: ShareDraws | None = None


class _Rows(NamedTuple):
    """Rows of the dataset: prompts, the other columns, and the images to be edited, where the pipeline does that."""

    prompts: list[str]
    columns: dict[str, list]
    images: list | None


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
        self.sampler, self.scorer, self.dataset = sampler, scorer, dataset
        self.layout, self.settings = layout, settings
        self.compute_advantages, self.compare_with_sum = compute_advantages, compare_with_sum
        self.accelerator, self.metrics, self.progress_meter = accelerator, metrics, progress_meter
        self.choose_window, self.assign_teachers = choose_window, assign_teachers
        self.learning = learning
        self.together = sampler.together
        self._silent_rewards: set[str] = set()

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
        rows = gather_object(list(row_numbers))  # of all processes, in the order of the generation batch
        with self.together.phase():
            columns = read_rows(self.dataset, [stored.replaced.get(place, rows[place]) for place in stored.covered])
            encode = functools.partial(encode_distinct, self.sampler.flow)
            return stored.with_rows(columns["prompt"], self._images_to_edit(columns), encode)

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
        own = self.layout.own_samples(self.accelerator.process_index)
        meter = self.progress_meter
        sde = None if self.choose_window is None else self.choose_window(generation)
        if self.learning is not None:
            with self.together.phase():
                self.learning.roll_back()
        rows = self._read(row_numbers)
        prompt_ids = (
            None if meter is None else meter.prepare(row_numbers, rows.prompts, rows.images, trainer_state, sde)
        )
        conditioning, prompt_index = self._encode(rows)
        seeds = [derive_seed(self.settings.seed, Draw.ROLLOUT, generation, i) for i in own]
        samples = self._sample_rows(rows, conditioning, prompt_index, own, seeds, trainer_state, sde, generation)
        rewards = self._gather(samples.scores.rewards.T).T
        groups = torch.arange(rewards.shape[1]) // self.settings.num_generations
        replaced: dict[int, int] = {}
        if self.settings.resample_rounds > 0:
            samples, replaced = self._resample(row_numbers, samples, groups, generation, trainer_state, sde)
            if replaced:
                rewards = self._gather(samples.scores.rewards.T).T
                rows = self._read([replaced.get(i, row) for i, row in zip(own, row_numbers, strict=True)])
                conditioning, prompt_index = self._encode(rows)
        finite = self._gather(samples.finite)
        self._record(samples, finite, rewards, groups, trainer_state.global_step)
        if meter is not None and prompt_ids is not None:
            meter.observe(prompt_ids, rewards)
        sources = (
            gather_object([str(source) for source in rows.columns["source"]]) if "source" in rows.columns else None
        )
        taught = rewards.new_empty(0, rewards.shape[1])
        if self.assign_teachers is not None:
            taught = self.assign_teachers(sources, finite)
        digest = digest_of(rows.prompts, rows.images)
        batch = self._arrange(
            rows.prompts, conditioning, digest, prompt_index, own, samples, rewards, taught, groups, generation
        )
        batch.replaced = {place: row for place, row in replaced.items() if place in own}
        if self.learning is not None:
            images = SetImages(
                samples.images,
                rows.prompts,
                rows.columns,
                list(own),
                groups[own.start : own.stop].tolist(),
                samples.finite,
            )
            logged = self.learning.update(images, samples.scores.rewards, trainer_state)
            for name, mean in average_logged(logged).items():
                self.metrics.record(name, mean)
        return batch, RolloutRecord(rows.prompts, samples.images, samples.scores, rewards, sources)

    def _read(self, row_numbers: Sequence[int]) -> "_Rows":
        with self.together.phase():  # it may fail in one process, where a dataset reads files
            columns = read_rows(self.dataset, row_numbers)
        return _Rows(columns.pop("prompt"), columns, self._images_to_edit(columns))

    def _encode(self, rows: "_Rows") -> tuple[Conditioning, Tensor]:
        with self.together.phase(), rollout_advice("rollout_batch_size", self.settings.batch_size):
            return encode_distinct(self.sampler.flow, rows.prompts, rows.images)

    def _sample_rows(
        self,
        rows: "_Rows",
        conditioning: Conditioning,
        prompt_index: Tensor,
        places: Sequence[int],
        seeds: list[int],
        trainer_state: Any,
        sde: SDEWindow | None,
        generation: int,
    ) -> Samples:
        """Sample and score rows that have these places in the generation batch."""
        shares = None if self.settings.shares is None else self.settings.shares.of(generation, places)
        with rollout_advice("rollout_batch_size", self.settings.batch_size):
            return self.sampler.sample_rows(
                self.scorer,
                rows.prompts,
                rows.columns,
                seeds,
                conditioning,
                prompt_index,
                self.settings.batch_size,
                trainer_state,
                places,
                [place // self.settings.num_generations for place in places],
                sde,
                shares,
            )

    def _advantages(self, rewards: Tensor, groups: Tensor, generation: int) -> Tensor:
        """The advantages of the samples of all processes."""
        if self.settings.shares is None:
            return self.compute_advantages(rewards, groups)
        shares = self.settings.shares.of(generation, range(rewards.shape[1]))
        return self.compute_advantages(rewards, groups, shares)

    def _resample(
        self,
        row_numbers: Sequence[int],
        samples: Samples,
        groups: Tensor,
        generation: int,
        trainer_state: Any,
        sde: SDEWindow | None,
    ) -> tuple[Samples, dict[int, int]]:
        """
        Sample other prompts for groups without a signal, some times. Each process samples those at its own places.

        Returns:
            `tuple[Samples, dict[int, int]]`: this process's samples, and for each place on any process that has
            another row of the dataset than at first, that row.
        """
        own = self.layout.own_samples(self.accelerator.process_index)
        sources = self.dataset["source"][:] if "source" in self.dataset.column_names else None
        prompts = OtherPrompts(gather_object(list(row_numbers)), self.settings.num_generations, sources)
        for attempt in range(self.settings.resample_rounds + 1):
            rewards = self._gather(samples.scores.rewards.T).T
            silent = find_silent_groups(self._advantages(rewards, groups, generation), groups)
            if attempt == self.settings.resample_rounds:
                break
            seed = derive_seed(self.settings.seed, Draw.OTHER_PROMPTS, generation, attempt)
            if not (places := prompts.draw(silent, len(self.dataset), seed)):
                break
            shares = [self._share(places, process) for process in range(self.accelerator.num_processes)]
            mine = shares[self.accelerator.process_index]
            # Equal shares: an image is sampled again until they are, and only its first scores are used.
            filled = mine + [(mine or places)[0]] * (max(map(len, shares)) - len(mine))
            rows = self._read([prompts.rows[place] for place in filled])
            conditioning, prompt_index = self._encode(rows)
            seeds = [derive_seed(self.settings.seed, Draw.RESAMPLED, generation, attempt, i) for i in filled]
            others = self._sample_rows(rows, conditioning, prompt_index, filled, seeds, trainer_state, sde, generation)
            order = list(range(len(own)))
            for number, place in enumerate(mine):
                order[place - own.start] = len(own) + number
            samples = Samples.concatenate([samples, others]).select(order)
        self.metrics.record("resampled/prompts", prompts.number_drawn)
        self.metrics.record("resampled/still_silent", len(silent))
        return samples, prompts.replaced

    def _share(self, places: Sequence[int], process: int) -> list[int]:
        own = self.layout.own_samples(process)
        return [place for place in places if place in own]

    def _images_to_edit(self, columns: dict[str, list]) -> list | None:
        return columns["image"] if self.settings.edits else None

    def _record(self, samples: Samples, finite: Tensor, rewards: Tensor, groups: Tensor, step: int) -> None:
        """Record metrics of a rollout; refuse one of which nothing is left."""
        with self.together.phase():
            if not finite.any():
                raise FloatingPointError(
                    f"The latents of all {len(finite)} sampled images are not finite: nothing is left to train on. "
                    f"{CAUSES}"
                )
        failures = self.sampler.failures
        if not failures.raises_nonfinite:
            self.metrics.record("nonfinite/latents", int((~finite).sum()))
        failed: dict[str, int] = {}
        if failures.leaves_out:
            with self.together.phase():
                failed = count_failures(samples.scores, self.scorer.names, self.accelerator)
        silent = zero_std_fractions(rewards, groups).tolist()
        for name, row, fraction in zip(self.scorer.names, rewards, silent, strict=True):
            valid = row[~row.isnan()]
            if failures.leaves_out:
                self.metrics.record(f"rewards/{name}/failed", failed[name])
            self.metrics.record(f"rewards/{name}/valid", len(valid) / len(row))
            self.metrics.record(f"rewards/{name}/mean", valid.mean().item() if len(valid) else float("nan"))
            std = valid.std(correction=0).item() if len(valid) else float("nan")
            self.metrics.record(f"rewards/{name}/std", std)
            self.metrics.record(f"rewards/{name}/zero_std_fraction", fraction)
            if len(valid) == 0 and name not in self._silent_rewards:
                self._silent_rewards.add(name)
                if self.accelerator.is_main_process:
                    warnings.warn(
                        f"Reward `{name}` applied to none of the {len(row)} images of step {step + 1}; it takes no "
                        "part in it. (This is said once for each reward.)",
                        stacklevel=2,
                    )
        for name, mean in average_logged(samples.scores.metrics).items():
            self.metrics.record(name, mean)
        features = self._gather(thumbnails(samples.images).masked_fill(~samples.finite[:, None], torch.nan))
        self.metrics.record("drift/diversity", group_diversity(features, groups).nanmean().item())
        own_finite = samples.finite.to(samples.latents.device)
        self.metrics.record("drift/latent_rms", mean_rms(samples.latents[own_finite]))

    def _arrange(
        self,
        prompts: list[str],
        conditioning: Conditioning,
        rows_digest: str,
        prompt_index: Tensor,
        own: range,
        samples: Samples,
        rewards: Tensor,
        taught: Tensor,
        groups: Tensor,
        generation: int,
    ) -> RolloutBatch:
        """
        The batch in the order in which it is trained on: micro-batches hold samples of many prompts, in an order that
        resuming finds again.
        """
        num_updates, device = self.layout.updates_per_pass, samples.latents.device
        order_seed = derive_seed(self.settings.seed, Draw.ORDER, generation)
        order = training_order(rewards.shape[1], own, num_updates, order_seed)
        of_rewards = mask_silent_groups(self._advantages(rewards, groups, generation), groups)
        all_advantages = torch.cat([of_rewards, taught])
        steps = steps_of_samples(rewards.shape[1], num_updates, order_seed)
        halves_seed = derive_seed(self.settings.seed, Draw.HALVES, generation)
        in_first = split_prompts(groups, ~all_advantages.isnan(), steps, halves_seed)
        advantages, first_half = (part[..., own.start : own.stop][..., order] for part in (all_advantages, in_first))
        updates = advantages.chunk(num_updates, dim=1)
        halves = torch.stack([first_half, ~first_half]).chunk(num_updates, dim=1)
        counts = torch.stack([_count(~part.isnan(), half) for part, half in zip(updates, halves, strict=True)])
        signals = torch.stack(
            [_count(part.nan_to_num() != 0, half) for part, half in zip(updates, halves, strict=True)]
        )
        scored = torch.stack([(~part[: len(of_rewards)].isnan()).any(dim=0).sum() for part in updates])
        return RolloutBatch(
            prompts=prompts,
            conditioning=conditioning,
            rows_digest=rows_digest,
            prompt_index=prompt_index[order],
            sample_ids=torch.tensor(own)[order],
            latents=samples.latents[order.to(device)],
            advantages=advantages.to(device),
            first_half=first_half.to(device),
            counts=self.accelerator.reduce(counts.to(device), reduction="sum"),
            active=(self.accelerator.reduce(signals.to(device), reduction="sum") > 0).cpu(),
            scored=self.accelerator.reduce(scored.to(device), reduction="sum"),
            weighted_sum=self.compare_with_sum(rewards, taught),
            transitions=None if samples.transitions is None else samples.transitions.select(order.to(device)),
        )

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all processes, in the order of the generation batch, on the CPU."""
        return self.accelerator.gather(values.contiguous().to(self.accelerator.device)).cpu()


def _count(samples: Tensor, halves: Tensor) -> Tensor:
    """Count samples `[K, B]` that are true, in each of the halves `[2, B]`: `[2, K]`."""
    return (samples & halves[:, None]).sum(dim=2)
