# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What processes have of a generation batch, put together on each of them."""

from accelerate import Accelerator
from torch import Tensor

from ..rewards import Scores


def gather_rows(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Rows of all processes, in the order of the processes, on the CPU."""
    return accelerator.gather(values.contiguous().to(accelerator.device)).cpu()


def gather_rewards(accelerator: Accelerator, scores: Scores) -> Tensor:
    """The rewards `[K, B]` of the images of all processes."""
    return gather_rows(accelerator, scores.rewards.T).T
