# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The decay of the two moving averages: the old policy, and the weights that are evaluated and saved."""

# (flat, rate, max) of `old_policy_decay`. DiffusionNFT's own preset 1 ends at 0.5; 0.95 is MARBLE's; 3 is AWM's. 4 is
# CRD's, which begins at 0.25.
OLD_POLICY_PRESETS: dict[int, tuple[int, float, float]] = {
    0: (0, 0.0, 0.0),
    1: (0, 0.001, 0.95),
    2: (75, 0.0075, 0.999),
    3: (0, 0.001, 0.3),
    4: (-50, 0.005, 0.999),
}


def old_policy_decay(step: int, flat: int, rate: float, max: float) -> float:
    """
    Decay `eta` of the old policy, `old <- eta * old + (1 - eta) * current` after each generation batch
    ([DiffusionNFT](https://huggingface.co/papers/2509.16117)): 0 (fully on-policy) for the first `flat` steps, then
    rising linearly.

    Args:
        step (`int`):
            Optimizer steps taken so far.
        flat (`int`):
            Number of steps before the decay rises.
        rate (`float`):
            Rise per step.
        max (`float`):
            The largest decay, in `[0, 1)`.

    Returns:
        `float` in `[0, max]`.
    """
    return min((step - flat) * rate, max) if step > flat else 0.0


def weight_ema_decay(step: int, max: float = 0.9) -> float:
    """
    Decay of the weights' moving average, `min((1 + step) / (10 + step), max)`: lower in the first steps, so that the
    initial weights are soon forgotten.

    Args:
        step (`int`):
            Optimizer steps taken so far.
        max (`float`, *optional*, defaults to `0.9`):
            The largest decay, in `[0, 1)`.

    Returns:
        `float` in `[0, max]`.
    """
    return min((1 + step) / (10 + step), max)
