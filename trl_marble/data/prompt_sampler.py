# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The order in which prompts are used for rollouts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice

import torch
from torch.utils.data import Sampler

from .mixing import check_source_weights


class RepeatPromptSampler(Sampler[int]):
    """
    Yields dataset indices so that each generation batch has complete groups of images of one prompt.

    Each generation batch has `prompts_per_batch` different prompts, each `num_generations` consecutive times, and is
    yielded `num_repeats` times, once for every micro-batch that trains on it. The order depends only on the arguments
    and the epoch. It is the order over all processes, so that it is the same for any number of processes. An epoch has
    as many generation batches as are needed for the number of prompts in the dataset.

    **One source.** Prompts are in another random order each epoch. The last batch of an epoch is filled with prompts
    from the beginning of the epoch, so that no prompt is left out.

    **Several sources.** Each generation batch has a share of every source, rounded up or down. The rounding errors are
    summed up and corrected in later batches, so that over many batches the shares are exact however small a batch is.
    The prompts of a source are in random order, each once before the first one comes again, and then in another random
    order. Such a pass has the length of the source and may continue in the next epoch: a source that is small for its
    share has several passes in an epoch, a large one a part of a pass. Within a batch the sources are spread evenly,
    so that each process has about the same mix.

    Args:
        num_prompts (`int`):
            Number of prompts in the dataset.
        num_generations (`int`):
            Number of images per prompt.
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
        `ValueError`: If the dataset or a source has fewer prompts than one generation batch needs of it, or if
            `sources` and `source_weights` do not fit the dataset or each other.

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
        self._weights = _integer_weights(check_source_weights(self._rows, source_weights))
        for source, rows in self._rows.items():
            share = Fraction(self._weights[source] * prompts_per_batch, sum(self._weights.values()))
            if len(rows) < math.ceil(share):
                raise ValueError(
                    f"The source {source!r} has {len(rows)} prompts, but its share of a generation batch is "
                    f"{float(share):g} of {prompts_per_batch} different prompts. Add prompts to it, "
                    "lower its weight, or make the generation batch smaller."
                )

    @property
    def num_batches(self) -> int:
        """Number of generation batches in an epoch."""
        return -(-self.num_prompts // self.prompts_per_batch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if len(self._rows) == 1:
            batches = self._batches_of_one_source()
        else:
            # From the first epoch on, since rounding errors and passes continue from batch to batch.
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
        """The batches of several sources, of one epoch after the other, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        missing = dict.fromkeys(self._rows, 0)
        unused: dict[str, list[int]] = {source: [] for source in self._rows}
        while True:
            placed: list[tuple[float, int]] = []
            offsets = torch.rand(len(self._rows), generator=generator).tolist()
            for (source, count), offset in zip(self._count_prompts(missing).items(), offsets, strict=True):
                drawn = _draw(self._rows[source], unused[source], count, generator)
                placed += [((i + offset) / count, index) for i, index in enumerate(drawn)]
            yield [index for _, index in sorted(placed)]

    def _count_prompts(self, missing: dict[str, int]) -> dict[str, int]:
        """
        The number of prompts of each source in the next batch.

        Shares are rounded down. `missing` is how much each source got too little so far, in units of one prompt
        divided by the sum of the weights; it is updated here. The remaining places go to the sources that miss most,
        one each. With integers there are no rounding errors.
        """
        unit = sum(self._weights.values())
        counts = {source: weight * self.prompts_per_batch // unit for source, weight in self._weights.items()}
        rounded = []
        for source, weight in self._weights.items():
            if rest := weight * self.prompts_per_batch % unit:
                missing[source] += rest
                rounded.append(source)
        rounded.sort(key=lambda source: -missing[source])
        for source in rounded[: self.prompts_per_batch - sum(counts.values())]:
            counts[source] += 1
            missing[source] -= unit
        return counts


def _rows_by_source(num_prompts: int, sources: Sequence[str] | None) -> dict[str, list[int]]:
    if sources is None:
        return {"": list(range(num_prompts))}
    if len(sources) != num_prompts:
        raise ValueError(
            f"`sources` has {len(sources)} entries, and the dataset has {num_prompts} prompts. Pass one per prompt."
        )
    rows: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        rows.setdefault(source, []).append(row)
    return rows


def _integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The smallest integers with the ratios of the weights in decimal notation: 0.1 is exactly one tenth."""
    fractions = {source: Fraction(str(weight)) for source, weight in weights.items()}
    unit = math.lcm(*(fraction.denominator for fraction in fractions.values()))
    integers = {source: int(fraction * unit) for source, fraction in fractions.items()}
    divisor = math.gcd(*integers.values())
    return {source: weight // divisor for source, weight in integers.items()}


def _draw(rows: list[int], unused: list[int], count: int, generator: torch.Generator) -> list[int]:
    """The next `count` prompts of a source, all different. `unused` is the rest of its pass, in order."""
    drawn = unused[:count]
    del unused[:count]
    if missing := count - len(drawn):
        order = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
        # A batch that ends one pass and begins the next has no prompt twice.
        seen = set(drawn)
        fresh = [row for row in order if row not in seen][:missing]
        drawn += fresh
        seen = set(fresh)
        unused += [row for row in order if row not in seen]
    return drawn
