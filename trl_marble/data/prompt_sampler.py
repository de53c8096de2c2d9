# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The order in which prompts are rolled out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice

import torch
from torch.utils.data import Sampler

from .mixing import check_source_weights


class RepeatPromptSampler(Sampler[int]):
    """
    Yields dataset indices so that each generation batch holds whole groups of one prompt.

    Each generation batch takes `prompts_per_batch` different prompts, each `num_generations` times in a row, and is
    yielded `num_repeats` times, once for every micro-batch that trains on it. The order depends on the arguments and
    the epoch alone. It is the order of all processes together, so that it is the same for any number of them. An
    epoch is the number of generation batches that it takes to roll out as many prompts as the dataset has.

    **One source.** Prompts come in another random order each epoch. The last batch of an epoch is filled up with
    prompts from the epoch's beginning, so that no prompt is left out.

    **Several sources.** Each generation batch takes its share of every source, rounded up or down; what rounding
    takes from a source is owed to it and given in a later batch, so that over many batches the shares are exact
    however small a batch is. A source's prompts come in random order, each once before one comes again, and then in
    another random order. Such passes have the length of the source and run on from one epoch into the next: a source
    that is small for its share is passed through several times in an epoch, a large one in part. Within a batch the
    sources are spread evenly, so that each process rolls out about the same mix.

    Args:
        num_prompts (`int`):
            Size of the dataset.
        num_generations (`int`):
            Number of images of each prompt.
        prompts_per_batch (`int`):
            Number of different prompts in a generation batch, on all processes together.
        num_repeats (`int`, *optional*, defaults to `1`):
            How often each generation batch is yielded.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.
        sources (`Sequence[str]`, *optional*):
            The source of each prompt. Defaults to one source.
        source_weights (`Mapping[str, float]`, *optional*):
            Weight of each source, finite and greater than 0; a source's share is its weight divided by their sum.
            Defaults to equal shares. See [`~trl_marble.data.source_weights`].

    Raises:
        `ValueError`: If the dataset or one of its sources has fewer prompts than one generation batch takes of it, or
            if `sources` and `source_weights` do not fit the dataset or each other.

    Example:

    ```python
    >>> list(RepeatPromptSampler(num_prompts=3, num_generations=2, prompts_per_batch=2))
    [2, 2, 0, 0, 1, 1, 2, 2]
    >>> list(RepeatPromptSampler(4, num_generations=1, prompts_per_batch=2, sources=["a", "a", "a", "b"]))
    [2, 3, 1, 3]
    ```
    """

    def __init__(
        self,
        num_prompts: int,
        num_generations: int,
        prompts_per_batch: int,
        num_repeats: int = 1,
        seed: int = 0,
        sources: Sequence[str] | None = None,
        source_weights: Mapping[str, float] | None = None,
    ) -> None:
        if num_prompts < prompts_per_batch:
            raise ValueError(
                f"The dataset has {num_prompts} prompts, but one generation batch takes {prompts_per_batch}. Add "
                "prompts, raise `num_generations`, or lower `per_device_train_batch_size` or `steps_per_generation`."
            )
        self.num_prompts = num_prompts
        self.num_generations = num_generations
        self.prompts_per_batch = prompts_per_batch
        self.num_repeats = num_repeats
        self.seed = seed
        self.epoch = 0
        self._rows = _rows_by_source(num_prompts, sources)
        if source_weights is not None and sources is None:
            raise ValueError("`source_weights` needs `sources`, the source of each prompt.")
        self._weights = _whole_weights(check_source_weights(self._rows, source_weights))
        for source, rows in self._rows.items():
            share = Fraction(self._weights[source] * prompts_per_batch, sum(self._weights.values()))
            if len(rows) < math.ceil(share):
                raise ValueError(
                    f"The source {source!r} has {len(rows)} prompts, but its share of a generation batch is "
                    f"{float(share):g} of {prompts_per_batch}, and no prompt comes twice in one. Add prompts to it, "
                    "lower its weight, or make the generation batch smaller."
                )

    @property
    def num_batches(self) -> int:
        """Number of generation batches in an epoch."""
        return -(-self.num_prompts // self.prompts_per_batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if len(self._rows) == 1:
            batches = self._batches_of_one_source()
        else:
            # From the beginning of training, for what is owed and where a pass stands follow from all batches before.
            start = self.epoch * self.num_batches
            batches = islice(self._batches_of_all_epochs(), start, start + self.num_batches)
        for batch in batches:
            for _ in range(self.num_repeats):
                for index in batch:
                    yield from [index] * self.num_generations

    def __len__(self) -> int:
        return self.num_batches * self.prompts_per_batch * self.num_generations * self.num_repeats

    def _batches_of_one_source(self) -> Iterator[list[int]]:
        """The batches of this epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_prompts, generator=generator).tolist()
        order += order[: self.num_batches * self.prompts_per_batch - self.num_prompts]
        for start in range(0, len(order), self.prompts_per_batch):
            yield order[start : start + self.prompts_per_batch]

    def _batches_of_all_epochs(self) -> Iterator[list[int]]:
        """The batches of several sources, one epoch after the other, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        owed = dict.fromkeys(self._rows, 0)
        unused: dict[str, list[int]] = {source: [] for source in self._rows}
        while True:
            placed: list[tuple[float, int]] = []
            offsets = torch.rand(len(self._rows), generator=generator).tolist()
            for (source, count), offset in zip(self._share_out(owed).items(), offsets, strict=True):
                drawn = _draw(self._rows[source], unused[source], count, generator)
                placed += [((i + offset) / count, index) for i, index in enumerate(drawn)]
            yield [index for _, index in sorted(placed)]

    def _share_out(self, owed: dict[str, int]) -> dict[str, int]:
        """
        The number of prompts that the next batch takes from each source.

        A share is rounded down; the places that are left go to those that are owed most, one each. `owed`, in units of
        one prompt divided by the sum of the weights, is brought up to date. In whole numbers nothing drifts.
        """
        unit = sum(self._weights.values())
        counts = {source: weight * self.prompts_per_batch // unit for source, weight in self._weights.items()}
        rounded = []
        for source, weight in self._weights.items():
            if rest := weight * self.prompts_per_batch % unit:
                owed[source] += rest
                rounded.append(source)
        rounded.sort(key=lambda source: -owed[source])
        for source in rounded[: self.prompts_per_batch - sum(counts.values())]:
            counts[source] += 1
            owed[source] -= unit
        return counts


def _rows_by_source(num_prompts: int, sources: Sequence[str] | None) -> dict[str, list[int]]:
    if sources is None:
        return {"": list(range(num_prompts))}
    if len(sources) != num_prompts:
        raise ValueError(f"`sources` names the source of {len(sources)} prompts; the dataset has {num_prompts}.")
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    return rows


def _whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest whole numbers in the ratios of the weights as they are written: 0.1 is a tenth."""
    fractions = {source: Fraction(str(weight)) for source, weight in weights.items()}
    unit = math.lcm(*(fraction.denominator for fraction in fractions.values()))
    whole = {source: int(fraction * unit) for source, fraction in fractions.items()}
    divisor = math.gcd(*whole.values())
    return {source: weight // divisor for source, weight in whole.items()}


def _draw(rows: list[int], unused: list[int], count: int, generator: torch.Generator) -> list[int]:
    """The next `count` prompts of a source, all different. `unused` is what is left of its pass, in order."""
    drawn = unused[:count]
    del unused[:count]
    if missing := count - len(drawn):
        order = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
        # A batch that ends one pass and begins the next takes from the new one what it does not have already.
        seen = set(drawn)
        fresh = [row for row in order if row not in seen][:missing]
        drawn += fresh
        seen = set(fresh)
        unused += [row for row in order if row not in seen]
    return drawn
