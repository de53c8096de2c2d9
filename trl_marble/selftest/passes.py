# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How often a transformer runs, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def count_passes(transformer: nn.Module) -> Iterator[dict[str, int]]:
    """
    Count a transformer's passes inside the context.

    Args:
        transformer (`nn.Module`):
            A diffusers model.

    Yields:
        `dict[str, int]`: `"forwards"`, and `"backwards"`, the backward passes from its output.
    """
    counts = {"forwards": 0, "backwards": 0}

    def count_backward(_: torch.Tensor) -> None:
        counts["backwards"] += 1

    def count_forward(module, inputs, output) -> None:
        counts["forwards"] += 1
        if output[0].requires_grad:
            output[0].register_hook(count_backward)

    handle = transformer.register_forward_hook(count_forward)
    try:
        yield counts
    finally:
        handle.remove()
