# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The order in which prompts are rolled out."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RepeatPromptSampler(Sampler[int]):
    """
    Yields dataset indices so that each generation batch holds whole groups of one prompt.

    Within an epoch prompts come in a random order that depends only on the seed and the epoch. Each generation batch
    takes the next `prompts_per_batch` of them, each `num_generations` times in a row, and is yielded `num_repeats`
    times, once for every micro-batch that trains on it. The last batch of an epoch is filled up with prompts from the
    epoch's beginning, so that no prompt is left out.

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

    Raises:
        `ValueError`: If the dataset has fewer prompts than one generation batch needs.

    Example:

    ```python
    >>> list(RepeatPromptSampler(num_prompts=3, num_generations=2, prompts_per_batch=2))
    [2, 2, 0, 0, 1, 1, 2, 2]
    ```
    """

    def __init__(
        self, num_prompts: int, num_generations: int, prompts_per_batch: int, num_repeats: int = 1, seed: int = 0
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

    @property
    def num_batches(self) -> int:
        """Number of generation batches in an epoch."""
        return -(-self.num_prompts // self.prompts_per_batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_prompts, generator=generator).tolist()
        order += order[: self.num_batches * self.prompts_per_batch - self.num_prompts]
        for start in range(0, len(order), self.prompts_per_batch):
            for _ in range(self.num_repeats):
                for index in order[start : start + self.prompts_per_batch]:
                    yield from [index] * self.num_generations

    def __len__(self) -> int:
        return self.num_batches * self.prompts_per_batch * self.num_generations * self.num_repeats
