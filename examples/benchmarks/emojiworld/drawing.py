# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Draw the pictures of EmojiWorld: one emoji or two on a background of one colour, at 64 x 64 pixels."""

from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image, ImageOps

from .captions import BACKGROUNDS, Caption, random_caption


SIZE = 64
ALONE = (0.55, 0.95)  # longer side of a single emoji, in pictures
BESIDE = (0.36, 0.48)  # and of one of two
COLOUR_JITTER = 8


def _place(
    canvas: Image.Image, emoji: Image.Image, size: float, left: float, width: float, rng: np.random.Generator
) -> None:
    """Put an emoji at a random place of a column of the picture; sizes and places are shares of the picture."""
    scale = size * SIZE / max(emoji.size)
    shape = max(round(emoji.width * scale), 1), max(round(emoji.height * scale), 1)
    # PIL multiplies with the opacity before it resizes, so that no colour of transparent pixels leaks in.
    small = emoji.resize(shape, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        small = ImageOps.mirror(small)
    x = left * SIZE + rng.uniform(0, 1) * (width * SIZE - small.width)
    y = rng.uniform(0, 1) * (SIZE - small.height)
    canvas.paste(small, (round(x), round(y)), small)


def draw_picture(caption: Caption, emoji: Mapping[str, Image.Image], rng: np.random.Generator) -> Image.Image:
    """Draw one random picture of a caption.

    Args:
        caption (`Caption`): What to draw.
        emoji (`Mapping[str, PIL.Image.Image]`): From `read_emoji`.
        rng (`np.random.Generator`): The source of all randomness: the same state gives the same picture.

    Returns:
        `PIL.Image.Image`: RGB, 64x64.
    """
    colour = caption.background or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3)
    ground = tuple(np.clip(np.array(BACKGROUNDS[colour]) + jitter, 0, 255).tolist())
    canvas = Image.new("RGB", (SIZE, SIZE), ground)
    width = 1 / len(caption.names)
    for column, name in enumerate(caption.names):
        size = rng.uniform(*(ALONE if len(caption.names) == 1 else BESIDE))
        _place(canvas, emoji[name], size, column * width, width, rng)
    return canvas


def generate(count: int, seed: int, emoji: Mapping[str, Image.Image]) -> Iterator[tuple[Caption, Image.Image]]:
    """Captioned pictures of all sources, with equal shares.

    Args:
        count (`int`): Number of pictures.
        seed (`int`): The same seed gives the same pictures.
        emoji (`Mapping[str, PIL.Image.Image]`): From `read_emoji`.

    Yields:
        `tuple[Caption, PIL.Image.Image]`
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        caption = random_caption(rng)
        yield caption, draw_picture(caption, emoji, rng)
