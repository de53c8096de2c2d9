# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Generate captioned pictures from a seed."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from .drawing import GAP, MARGIN, PALETTE, SHAPES, SIZE, Item, draw_items, draw_text
from .prompts import Caption, all_captions


# Share of each kind: kinds that are hard to draw are more frequent.
KIND_WEIGHTS = {
    "colors": 0.15,
    "counting": 0.14,
    "two_object": 0.15,
    "position": 0.15,
    "digit": 0.16,
    "word": 0.16,
    "free": 0.09,
}
# Smallest and largest half width, in pixels, by the number of objects in the picture.
RADII = {1: (9.5, 20.0), 2: (8.0, 13.5), 3: (7.5, 11.0), 4: (7.0, 9.5)}
CROWDED = (5.5, 7.5)
TRIES = 30


def _satisfies(relation: str | None, x: np.ndarray, y: np.ndarray) -> bool:
    if relation is None:
        return True
    across, down = x[1] - x[0], y[1] - y[0]
    return {
        "above": down > abs(across),
        "below": -down > abs(across),
        "left of": across > abs(down),
        "right of": -across > abs(down),
    }[relation]


def place(count: int, relation: str | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random places for objects, by rejection, so that they neither overlap nor leave the picture.

    Args:
        count (`int`): Number of objects.
        relation (`str` or `None`): The position of the first of two objects relative to the second.
        rng (`np.random.Generator`): The source of all randomness.

    Returns:
        `tuple`: centres `x` and `y` and half widths, each `[count]`, in pixels.
    """
    least, most = RADII.get(count, CROWDED)
    shrink = 1.0
    while True:
        for _ in range(TRIES):
            radius = np.maximum(rng.uniform(least, most) * rng.uniform(0.9, 1.1, count) * shrink, 4.0)
            room = radius + MARGIN
            x, y = rng.uniform(room, SIZE - room), rng.uniform(room, SIZE - room)
            apart = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y)) - radius[:, None] - radius
            np.fill_diagonal(apart, np.inf)
            if apart.min() >= GAP and _satisfies(relation, x, y):
                return x, y, radius
        shrink *= 0.93  # smaller objects always fit in the end


def draw_picture(caption: Caption, rng: np.random.Generator) -> Image.Image:
    """Draw one random picture of a caption.

    Args:
        caption (`Caption`): From `all_captions` or `split_captions`.
        rng (`np.random.Generator`): The source of all randomness: the same state gives the same picture.

    Returns:
        `PIL.Image.Image`: RGB, 64x64.
    """
    if caption.text is not None and caption.colour is not None:
        return draw_text(caption.text, caption.colour, rng)
    kinds = []
    for group in caption.groups:
        for _ in range(rng.integers(group.count[0], group.count[1] + 1)):
            colour, shape = group.colour or str(rng.choice(list(PALETTE))), group.shape or str(rng.choice(SHAPES))
            kinds.append((shape, colour))
    x, y, radius = place(len(kinds), caption.relation, rng)
    items = [Item(s, c, x[i], y[i], radius[i]) for i, (s, c) in enumerate(kinds)]
    return draw_items(items, rng)


def generate(count: int, seed: int) -> Iterator[tuple[Caption, Image.Image]]:
    """Captioned pictures of all kinds, with the shares of `KIND_WEIGHTS`.

    Args:
        count (`int`): Number of pictures.
        seed (`int`): The same seed gives the same pictures.

    Yields:
        `tuple[Caption, PIL.Image.Image]`
    """
    rng = np.random.default_rng(seed)
    captions = {tag: all_captions(tag) for tag in KIND_WEIGHTS}
    for _ in range(count):
        tag = str(rng.choice(list(KIND_WEIGHTS), p=list(KIND_WEIGHTS.values())))
        caption = captions[tag][rng.integers(len(captions[tag]))]
        yield caption, draw_picture(caption, rng)
