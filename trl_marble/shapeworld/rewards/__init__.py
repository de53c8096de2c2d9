# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Five rewards of ShapeWorld pictures, computed without a model: two specialists and three general ones."""

from collections.abc import Callable, Sequence

from .composition import composition
from .general import calm, centring, coverage
from .reader import reader


def reward_funcs() -> list[Callable[..., Sequence[float | None]]]:
    """The five rewards, for the trainer's `reward_funcs`.

    `composition` and `reader` apply to compositional and to glyph prompts only; `coverage`, `centring` and `calm`
    apply to every picture. All are in [0, 1], higher is better, and are called with keywords only: `images` and the
    columns of `load_prompts`.

    Returns:
        `list[Callable]`
    """
    return [composition, reader, coverage, centring, calm]


__all__ = ["calm", "centring", "composition", "coverage", "reader", "reward_funcs"]
