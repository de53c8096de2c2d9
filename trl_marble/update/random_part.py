# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A random part of an optimizer step: of its micro-steps, or of the timesteps of each image."""

import torch


def draw_fraction(fraction: float, total: int, seed: int) -> frozenset[int]:
    """
    Draw places without replacement, each with the same probability.

    Args:
        fraction (`float`):
            Of all places, in (0, 1]: their number is rounded to the nearest integer, and is at least 1.
        total (`int`):
            How many there are, on each process.
        seed (`int`):
            The same on all processes, which so draw the same places.

    Returns:
        `frozenset[int]`: Those drawn, from 0 on.
    """
    generator = torch.Generator().manual_seed(seed)
    return frozenset(torch.randperm(total, generator=generator)[: max(1, round(fraction * total))].tolist())
