# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Count a transformer's passes as they happen: what a step costs whatever else the machine does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass
class Passes:
    """
    Passes of a transformer, each counted as 1 as in docs/step_cost.md.

    Args:
        forwards (`int`, *optional*, defaults to `0`):
            Calls.
        backwards (`int`, *optional*, defaults to `0`):
            Backward passes from the output of such a call.
        images (`int`, *optional*, defaults to `0`):
            Images of all of these passes together: a pass counts once for each image of its batch.
    """

    forwards: int = 0
    backwards: int = 0
    images: int = 0

    def since(self, earlier: "Passes") -> "Passes":
        """What was added since an earlier state."""
        return Passes(
            self.forwards - earlier.forwards, self.backwards - earlier.backwards, self.images - earlier.images
        )

    def now(self) -> "Passes":
        """A copy of the present state."""
        return replace(self)


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
        passes.forwards += 1
        passes.images += len(velocity)

        def count_backward(_: torch.Tensor) -> None:
            passes.backwards += 1
            passes.images += len(velocity)

        if velocity.requires_grad:
            velocity.register_hook(count_backward)

    handle = transformer.register_forward_hook(count_forward)
    try:
        yield passes
    finally:
        handle.remove()
