# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A random part of an optimizer step's micro-steps, each of which is one timestep of one micro-batch."""

import torch


def draw_micro_steps(fraction: float, total: int, seed: int) -> frozenset[int]:
    """
    Draw micro-steps without replacement, each with the same probability.

    Args:
        fraction (`float`):
            Of the micro-steps, in (0, 1]: their number is rounded to the nearest integer, and is at least 1.
        total (`int`):
            Micro-steps of the step on each process.
        seed (`int`):
            The same on all processes, which so draw the same micro-steps.

    Returns:
        `frozenset[int]`: Their places in the step.
    """
    generator = torch.Generator().manual_seed(seed)
    return frozenset(torch.randperm(total, generator=generator)[: max(1, round(fraction * total))].tolist())
