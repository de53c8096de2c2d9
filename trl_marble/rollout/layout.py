# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How a generation batch is cut into optimizer steps and micro-batches, and where in it a run is."""

from dataclasses import dataclass
from typing import NamedTuple


class Position(NamedTuple):
    """
    Where in a run a micro-batch is.

    Args:
        generation (`int`):
            Number of the generation batch, from 0 on.
        iteration (`int`):
            Number of the pass over it.
        micro_batch (`int`):
            Number of the micro-batch within the pass.
        update (`int`):
            Number of the optimizer step within the pass.
        micro_batch_of_update (`int`):
            Number of the micro-batch within the optimizer step.
        starts_generation (`bool`):
            Whether this is the generation batch's first micro-batch of all, so that it is to be sampled.
    """

    generation: int
    iteration: int
    micro_batch: int
    update: int
    micro_batch_of_update: int
    starts_generation: bool


@dataclass(frozen=True)
class BatchLayout:
    """
    The layout of a generation batch on one process.

    Each row below is one pass over the batch (`num_iterations=2`), each letter a micro-batch of
    `per_device_train_batch_size` samples, each pair of brackets an optimizer step
    (`gradient_accumulation_steps=2`, `steps_per_generation=6`):

    ```
                     optimizer step 0   optimizer step 1   optimizer step 2
    iteration 0      [  a      b  ]     [  c      d  ]     [  e      f  ]      sampled before `a`
    iteration 1      [  a      b  ]     [  c      d  ]     [  e      f  ]      the same samples, fresh noise
                     next generation batch ...
    ```

    Args:
        micro_batch_size (`int`):
            Samples of a micro-batch (`per_device_train_batch_size`).
        micro_batches_per_update (`int`):
            Micro-batches of an optimizer step (`gradient_accumulation_steps`).
        micro_batches_per_pass (`int`):
            Micro-batches of a pass (`steps_per_generation`), a multiple of the one above.
        num_iterations (`int`):
            Passes over each generation batch.
    """

    micro_batch_size: int
    micro_batches_per_update: int
    micro_batches_per_pass: int
    num_iterations: int

    @property
    def updates_per_pass(self) -> int:
        """Optimizer steps of a pass."""
        return self.micro_batches_per_pass // self.micro_batches_per_update

    def locate(self, micro_step: int) -> Position:
        """
        Where a micro-batch is.

        Args:
            micro_step (`int`):
                Its number in the run, from 0 on.
        """
        passes, micro_batch = divmod(micro_step, self.micro_batches_per_pass)
        generation, iteration = divmod(passes, self.num_iterations)
        update, micro_batch_of_update = divmod(micro_batch, self.micro_batches_per_update)
        starts_generation = iteration == 0 and micro_batch == 0
        return Position(generation, iteration, micro_batch, update, micro_batch_of_update, starts_generation)

    def starts_generation_after(self, step: int) -> bool:
        """Whether a generation batch is used up after some optimizer steps, so that the next one is to be sampled."""
        return self.locate(step * self.micro_batches_per_update).starts_generation

    def own_samples(self, process: int) -> range:
        """The places of a process's samples in the generation batch of all processes."""
        number = self.micro_batch_size * self.micro_batches_per_pass
        return range(process * number, (process + 1) * number)

    def samples_of(self, micro_batch: int) -> slice:
        """The samples of a micro-batch, by their place in the process's part of the generation batch."""
        return slice(micro_batch * self.micro_batch_size, (micro_batch + 1) * self.micro_batch_size)
