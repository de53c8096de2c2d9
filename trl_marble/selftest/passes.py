# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How often a transformer runs, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Passes:
    """
    Passes of a transformer.

    Args:
        forwards (`int`, *optional*, defaults to `0`):
            Calls.
        backwards (`int`, *optional*, defaults to `0`):
            Backward passes from the output of such a call.
        images_forward (`int`, *optional*, defaults to `0`):
            Images of all calls together: a call counts once for each image of its batch.
        images_backward (`int`, *optional*, defaults to `0`):
            Images of all backward passes together.
    """

    forwards: int = 0
    backwards: int = 0
    images_forward: int = 0
    images_backward: int = 0


@contextmanager
def count_passes(transformer: nn.Module) -> Iterator[Passes]:
    """
    Count the passes of a transformer while the context lasts. Nothing that it computes is changed.

    Args:
        transformer (`nn.Module`):
            Of a pipeline: the first of its outputs has one row for each image.
    """
    passes = Passes()

    def count_forward(module: nn.Module, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
        velocity = output[0]
        size = len(velocity)
        passes.forwards += 1
        passes.images_forward += size

        def count_backward(_: torch.Tensor) -> None:
            passes.backwards += 1
            passes.images_backward += size

        if velocity.requires_grad:
            velocity.register_hook(count_backward)

    handle = transformer.register_forward_hook(count_forward)
    try:
        yield passes
    finally:
        handle.remove()
