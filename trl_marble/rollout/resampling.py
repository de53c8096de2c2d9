# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Other prompts for groups of images that no reward tells apart."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..balance import mask_silent_groups
from ..metrics import MetricBuffer
from ..seeding import Draw, derive_seed
from .gathering import gather_rewards
from .layout import BatchLayout
from .rows import Places, RolloutTask, RowSampler, ScoredRows
from .sampler import Samples
from .settings import RolloutSettings


def find_silent_groups(advantages: Tensor, groups: Tensor) -> list[int]:
    """
    The groups without a signal: in which each advantage is 0 or missing.

    Args:
        advantages (`Tensor` of shape `[K, B]`):
            NaN where a reward does not apply.
        groups (`Tensor` of shape `[B]`, int64):
            The group of each image.
    """
    has_signal = ~mask_silent_groups(advantages, groups).isnan().all(dim=0)
    return [group for group in groups.unique().tolist() if not has_signal[groups == group].any()]


class OtherPrompts:
    """
    Draws other rows of the dataset for some groups of a generation batch. All processes draw the same.

    A row is drawn at most once in a generation batch, and not if it is in it already. If prompts have sources, it is
    of the same source as the row that it replaces, so that each source keeps its share. Where no row is left, a group
    keeps its own.

    Args:
        rows (`Sequence[int]`):
            The row of each image of the generation batch of all processes.
        num_generations (`int`):
            Images per group.
        sources (`Sequence[str]`, *optional*):
            The source of each row of the dataset.

    Attributes:
        rows (`list[int]`): The row of each image as it is now.
        number_drawn (`int`): How many rows were drawn.
    """

    def __init__(self, rows: Sequence[int], num_generations: int, sources: Sequence[str] | None = None) -> None:
        self.rows, self.number_drawn = list(rows), 0
        self._first, self._num_generations, self._sources = list(rows), num_generations, sources
        self._used = set(rows)

    @property
    def replaced(self) -> dict[int, int]:
        """Place of an image -> its row, where it is not the one of the beginning."""
        pairs = enumerate(zip(self.rows, self._first, strict=True))
        return {place: row for place, (row, first) in pairs if row != first}

    def draw(self, groups: Sequence[int], num_rows: int, seed: int) -> list[int]:
        """
        Give other rows to some groups.

        Args:
            groups (`Sequence[int]`):
                The groups.
            num_rows (`int`):
                Number of rows of the dataset.
            seed (`int`):
                The same on all processes.

        Returns:
            `list[int]`: the places in the generation batch that have another row now.
        """
        generator = torch.Generator().manual_seed(seed)
        unused = [row for row in torch.randperm(num_rows, generator=generator).tolist() if row not in self._used]
        changed: list[int] = []
        for group in groups:
            places = range(group * self._num_generations, (group + 1) * self._num_generations)
            row = next((row for row in unused if self._is_alike(row, self.rows[places.start])), None)
            if row is None:
                continue
            unused.remove(row)
            self._used.add(row)
            self.number_drawn += 1
            for place in places:
                self.rows[place] = row
            changed += places
        return changed

    def _is_alike(self, row: int, other: int) -> bool:
        return self._sources is None or self._sources[row] == self._sources[other]


class Resampler:
    """
    Samples other prompts for groups without a signal, some times.

    Args:
        rows ([`~trl_marble.rollout.rows.RowSampler`]):
            Samples rows of the dataset.
        layout ([`BatchLayout`]):
            Which places of a generation batch each process has.
        settings ([`RolloutSettings`]):
            Settings.
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over processes.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
    """

    def __init__(
        self,
        rows: RowSampler,
        layout: BatchLayout,
        settings: RolloutSettings,
        accelerator: Accelerator,
        metrics: MetricBuffer,
    ) -> None:
        self.rows, self.settings, self.accelerator, self.metrics = rows, settings, accelerator, metrics
        self.shares = [layout.own_samples(process) for process in range(accelerator.num_processes)]

    def resample(
        self, task: RolloutTask, scored: ScoredRows, find_silent: Callable[[Tensor], list[int]]
    ) -> ScoredRows:
        """
        Replace the rows of groups without a signal, which `find_silent` finds by the rewards of all processes. Each
        process samples those at its own places.
        """
        own, dataset = self.shares[self.accelerator.process_index], self.rows.dataset
        sources = dataset["source"][:] if "source" in dataset.column_names else None
        prompts = OtherPrompts(gather_object(list(task.row_numbers)), self.settings.num_generations, sources)
        samples, rewards = scored.samples, scored.rewards
        for attempt in range(self.settings.resample_rounds + 1):
            silent = find_silent(rewards)
            if attempt == self.settings.resample_rounds:
                break
            seed = derive_seed(self.settings.seed, Draw.OTHER_PROMPTS, task.generation, attempt)
            if not (places := prompts.draw(silent, len(dataset), seed)):
                break
            mine = [place for place in places if place in own]
            others = self._sample(task, prompts, self._fill(mine, places), attempt)
            order = list(range(len(own)))
            for number, place in enumerate(mine):
                order[place - own.start] = len(own) + number
            samples = Samples.concatenate([samples, others]).select(order)
            rewards = gather_rewards(self.accelerator, samples.scores)
        self.metrics.record("resampled/prompts", prompts.number_drawn)
        self.metrics.record("resampled/still_silent", len(silent))
        if not prompts.replaced:
            return scored
        rows = self.rows.read([prompts.rows[place] for place in own])
        return ScoredRows(rows, self.rows.encode(rows), samples, rewards, prompts.replaced)

    def _fill(self, mine: list[int], places: list[int]) -> list[int]:
        """Equal shares: an image is sampled again until they are, and only its first scores are used."""
        largest = max(sum(place in share for place in places) for share in self.shares)
        return mine + [(mine or places)[0]] * (largest - len(mine))

    def _sample(self, task: RolloutTask, prompts: OtherPrompts, places: list[int], attempt: int) -> Samples:
        """Sample the rows that some places have now."""
        rows = self.rows.read([prompts.rows[place] for place in places])
        own = Places.of(places, self.settings, Draw.RESAMPLED, task.generation, attempt)
        return self.rows.sample(rows, self.rows.encode(rows), own, task.trainer_state, task.sde)
