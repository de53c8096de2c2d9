# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Draw the pictures of ShapeWorld: its palette, three shapes and glyphs, at 64 x 64 pixels."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


SIZE = 64
SUPERSAMPLING = 4  # pictures are drawn this many times larger and averaged, which antialiases every edge
MARGIN = 1.5  # pixels between objects and the border of the picture
GAP = 3.0  # pixels between objects
LETTER_GAP = 2.5  # pixels between letters, so that each letter is a separate connected component

PALETTE = {
    "red": (222, 44, 44),
    "green": (44, 182, 64),
    "blue": (58, 92, 235),
    "yellow": (234, 212, 44),
    "purple": (164, 62, 196),
    "white": (240, 240, 240),
}
BACKGROUNDS = ((20, 20, 28), (46, 40, 36), (28, 44, 52))
SHAPES = ("circle", "square", "triangle")
COLOUR_JITTER = 10
SPECK_CONTRAST = 34  # of the dim background specks, far from any palette colour


@dataclass(frozen=True)
class Item:
    """A shape with its centre `(x, y)` and half width `radius`, in pixels of the finished picture."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@lru_cache(maxsize=256)
def glyph_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all glyphs: the scalable font of Pillow, so that no font file is needed."""
    return ImageFont.load_default(size=size)


def draw_shape(canvas: ImageDraw.ImageDraw, shape: str, box: tuple[float, float, float, float], fill) -> None:
    """Draw one of `SHAPES`, filled, into the bounding box `(left, top, right, bottom)`."""
    left, top, right, bottom = box
    if shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif shape == "square":
        canvas.rectangle(box, fill=fill)
    elif shape == "triangle":
        canvas.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")


def _jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(np.clip(c + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1), 0, 255)) for c in colour)


def draw_background(rng: np.random.Generator) -> Image.Image:
    """Draw a dark background with up to four dim specks, in the supersampled size."""
    ground = tuple(int(c + rng.integers(-5, 6)) for c in BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    image = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, ground)
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 5)):
        x, y = rng.uniform(3, SIZE - 3, 2) * SUPERSAMPLING
        radius = rng.uniform(1.5, 3.0) * SUPERSAMPLING
        tone = tuple(c + SPECK_CONTRAST for c in ground)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone)
    return image


def _finish(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_items(items: list[Item], rng: np.random.Generator) -> Image.Image:
    """Draw shapes on a random background.

    Args:
        items (`list[Item]`): The shapes with their places.
        rng (`np.random.Generator`): Generator for the background and the jitter of the colours.

    Returns:
        `PIL.Image.Image`: RGB, 64x64.
    """
    image = draw_background(rng)
    canvas = ImageDraw.Draw(image)
    for item in items:
        box = np.array([item.x - item.radius, item.y - item.radius, item.x + item.radius, item.y + item.radius])
        draw_shape(canvas, item.shape, tuple(box * SUPERSAMPLING), _jittered(PALETTE[item.colour], rng))
    return _finish(image)


def draw_text(text: str, colour: str, rng: np.random.Generator) -> Image.Image:
    """Write `text` in capitals in a random size, at a random place of a random background.

    Args:
        text (`str`): One to three characters.
        colour (`str`): A name in `PALETTE`.
        rng (`np.random.Generator`): Generator for background, size and place.

    Returns:
        `PIL.Image.Image`: RGB, 64x64.
    """
    smallest, largest = {1: (42, 60), 2: (30, 38), 3: (22, 26)}[len(text)]
    size = int(rng.integers(smallest, largest + 1))
    gap, stroke = LETTER_GAP * SUPERSAMPLING, SUPERSAMPLING  # the VAE loses thinner strokes
    image = draw_background(rng)
    canvas = ImageDraw.Draw(image)
    while True:
        font = glyph_font(size * SUPERSAMPLING)
        boxes = [canvas.textbbox((0, 0), glyph, font=font, stroke_width=stroke) for glyph in text.upper()]
        width = sum(right - left for left, _, right, _ in boxes) + gap * (len(boxes) - 1)
        top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
        room = SIZE * SUPERSAMPLING - 2 * MARGIN * SUPERSAMPLING - np.array([width, bottom - top])
        if room.min() >= 0:
            break
        size -= 1
    x, y = MARGIN * SUPERSAMPLING + rng.uniform(0, 1, 2) * room
    fill = _jittered(PALETTE[colour], rng)
    for glyph, (left, _, right, _) in zip(text.upper(), boxes, strict=True):
        canvas.text((x - left, y - top), glyph, fill=fill, font=font, stroke_width=stroke, stroke_fill=fill)
        x += right - left + gap
    return _finish(image)
