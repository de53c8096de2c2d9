# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Seeds that depend on what is drawn, not on when: neither batch split nor world size nor resuming changes a run."""

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a seed is for."""

    ROLLOUT = 0
    TRAINING_NOISE = 1
    ORDER = 2
    MEASURED = 4
    SOLVER = 5
    BASE = 6
    HALVES = 7
    EVALUATION_NOISE = 8
    REGULARIZED = 9
    WINDOW = 11
    GROUP_NOISE = 12
    OTHER_PROMPTS = 13
    RESAMPLED = 14
    SHARES = 15


def derive_seed(seed: int, draw: Draw, *place: int) -> int:
    """
    A 64-bit seed for one draw.

    Args:
        seed (`int`):
            Seed of the run, not negative.
        draw ([`Draw`]):
            What is drawn.
        *place (`int`):
            Where in the run, for example the number of the generation batch and of the sample in it. One kind of draw
            always has places of one length.

    Returns:
        `int`: The seed; different places give unrelated seeds.
    """
    low, high = np.random.SeedSequence([seed, int(draw), *place]).generate_state(2).tolist()
    return low | (high << 32)
