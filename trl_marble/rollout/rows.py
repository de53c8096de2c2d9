# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rows of the dataset on their way to scored images: read, encoded, sampled."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from datasets import Dataset
from torch import Tensor

from ..data import read_rows
from ..memory_advice import rollout_advice
from ..pipelines import Conditioning, encode_distinct
from ..rewards import RewardScorer, Scores
from ..sde import SDEWindow
from ..seeding import Draw, derive_seed
from .sampler import RolloutSampler, SampleBatch, Samples
from .set_scores import SetImages
from .settings import RolloutSettings


class Rows(NamedTuple):
    """Rows of the dataset: prompts, the other columns, and the images to be edited, where the pipeline does that."""

    prompts: list[str]
    columns: dict[str, list]
    images: list | None


class Embeddings(NamedTuple):
    """Embeddings of the different prompts of some rows, and which of them each row has."""

    conditioning: Conditioning
    prompt_index: Tensor


class Places(NamedTuple):
    """
    The number of each image among those of all processes, its group, its seed, and where rewards have shares of each
    prompt, those of the image, `[B, K]`.
    """

    numbers: Sequence[int]
    groups: list[int]
    seeds: list[int]
    shares: Tensor | None = None

    @classmethod
    def of(cls, numbers: Sequence[int], settings: RolloutSettings, draw: Draw, generation: int, *more: int) -> Self:
        """Places in a generation batch. Seeds follow from the last arguments and the number of an image."""
        groups = [number // settings.num_generations for number in numbers]
        seeds = [derive_seed(settings.seed, draw, generation, *more, number) for number in numbers]
        shares = None if settings.shares is None else settings.shares.of(generation, numbers)
        return cls(numbers, groups, seeds, shares)


class RolloutTask(NamedTuple):
    """
    A generation batch that is to be sampled: its number, the numbers of this process's rows of the dataset, what is
    passed on to the rewards, and solver steps that add noise.
    """

    generation: int
    row_numbers: Sequence[int]
    trainer_state: Any
    sde: SDEWindow | None


class ScoredRows(NamedTuple):
    """
    This process's part of a generation batch, sampled and scored; the rewards `[K, B]` of the images of all processes;
    and place of an image of any process -> its row, where it is not the one that was drawn first.
    """

    rows: Rows
    embeddings: Embeddings
    samples: Samples
    rewards: Tensor
    replaced: Mapping[int, int] = MappingProxyType({})


class RowSampler:
    """
    Samples rows of the dataset. All processes call its methods, each for its own rows.

    Args:
        sampler ([`RolloutSampler`]):
            Samples and scores.
        scorer ([`~trl_marble.rewards.RewardScorer`]):
            The rewards to ask.
        dataset ([`~datasets.Dataset`]):
            The prompts.
        batch_size (`int`):
            Images that one call of the pipeline samples.
        edits (`bool`):
            Whether the pipeline edits the images of the column `image`.
    """

    def __init__(
        self, sampler: RolloutSampler, scorer: RewardScorer, dataset: Dataset, batch_size: int, edits: bool
    ) -> None:
        self.sampler, self.scorer, self.dataset = sampler, scorer, dataset
        self.batch_size, self.edits = batch_size, edits

    def read(self, row_numbers: Sequence[int]) -> Rows:
        """Read rows of these numbers."""
        with self.sampler.together.phase():  # it may fail in one process, where a dataset reads files
            columns = read_rows(self.dataset, row_numbers)
        return Rows(columns.pop("prompt"), columns, columns["image"] if self.edits else None)

    def encode(self, rows: Rows) -> Embeddings:
        """Encode the prompts of rows, and the images to be edited."""
        with self.sampler.together.phase(), rollout_advice("rollout_batch_size", self.batch_size):
            return Embeddings(*encode_distinct(self.sampler.flow, rows.prompts, rows.images))

    def sample(
        self, rows: Rows, embeddings: Embeddings, places: Places, trainer_state: Any, sde: SDEWindow | None
    ) -> Samples:
        """
        Sample and score rows, as many as on every other process, and keep them all. Rewards that compare images are
        asked when all are sampled.
        """
        starts = range(0, len(rows.prompts), self.batch_size)

        def cut(start: int) -> SampleBatch:
            part = slice(start, start + self.batch_size)
            columns = {name: values[part] for name, values in rows.columns.items()}
            conditioning = embeddings.conditioning.select(embeddings.prompt_index[part])
            shares = None if places.shares is None else places.shares[part]
            return SampleBatch(rows.prompts[part], columns, places.seeds[part], conditioning, shares)

        parts: list[Samples] = []
        with rollout_advice("rollout_batch_size", self.batch_size):
            size = len(starts), len(rows.prompts)
            self.sampler.sample_and_score([self.scorer], map(cut, starts), *size, trainer_state, parts.append, sde=sde)
            samples = Samples.concatenate(parts)
            if self.scorer.of_sets.any():
                own = set_images(rows, places, samples)
                scores = [samples.scores, self.sampler.score_sets(self.scorer, own, trainer_state)]
                samples = samples._replace(scores=Scores.join(scores))
        if self.sampler.times is not None:
            for name, seconds in samples.scores.seconds.items():
                self.sampler.times.add_reward(name, seconds)
        return samples


def set_images(rows: Rows, places: Places, samples: Samples) -> SetImages:
    """The samples of rows as what rewards that compare images, or learn from them, are shown."""
    return SetImages(samples.images, rows.prompts, rows.columns, list(places.numbers), places.groups, samples.finite)
