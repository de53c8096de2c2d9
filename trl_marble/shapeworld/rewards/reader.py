# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The specialist for glyphs: can the text of the prompt be read on the picture?"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from ..drawing import glyph_font
from ..prompts import DIGITS, WORDS
from .foreground import soft_foreground


ALPHABET = tuple(dict.fromkeys((*DIGITS, *"".join(WORDS).upper())))
TEMPLATE = 16  # pixels, height and width of a normalised glyph
FONT_SIZES = (22, 32, 50)  # of the templates: small glyphs have relatively thicker strokes
SMALLEST = 10  # pixels; smaller components are not glyphs
SHARPNESS = 0.035  # difference in correlation that makes one character e times as probable as another
POOR_MATCH, GOOD_MATCH = 0.4, 0.85  # correlation with the template for the score 0, and for the score 1


def _normalise(ink: np.ndarray) -> np.ndarray:
    """Centre a glyph in a square, keeping its proportions, and scale it to a unit vector with mean zero."""
    height, width = ink.shape
    side = max(height, width)
    square = np.zeros((side, side), dtype=np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = ink
    image = Image.fromarray(square).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    vector = np.asarray(image).ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """Normalised glyphs `[characters, font sizes, TEMPLATE * TEMPLATE]`."""
    templates = np.zeros((len(ALPHABET), len(FONT_SIZES), TEMPLATE * TEMPLATE), dtype=np.float32)
    for i, character in enumerate(ALPHABET):
        for j, size in enumerate(FONT_SIZES):
            image = Image.new("L", (2 * size, 2 * size))
            position = (size // 2, size // 4)
            ImageDraw.Draw(image).text(position, character, fill=255, font=glyph_font(size), stroke_width=1)
            templates[i, j] = _normalise(np.asarray(image.crop(image.getbbox()), dtype=np.float32) / 255)
    return templates


def find_glyphs(image: Image.Image) -> list[np.ndarray]:
    """Find the connected components of the foreground, from left to right; one above another are one glyph.

    Args:
        image (`PIL.Image.Image`): RGB.

    Returns:
        `list[np.ndarray]`: the ink `[height, width]` of each glyph, from 0 to 1.
    """
    ink = soft_foreground(image)
    labels, _ = ndimage.label(ink > 0.5)
    columns: list[tuple[int, int, list[int]]] = []
    boxes = ndimage.find_objects(labels)
    for label, box in sorted(enumerate(boxes, start=1), key=lambda entry: entry[1][1].start):
        if (labels[box] == label).sum() < SMALLEST:
            continue
        left, right = box[1].start, box[1].stop
        if columns:
            before_left, before_right, before = columns[-1]
            overlap = before_right - left
            if overlap > 0.5 * min(right - left, before_right - before_left):
                columns[-1] = (before_left, max(right, before_right), [*before, label])
                continue
        columns.append((left, right, [label]))
    glyphs = []
    for left, right, members in columns:
        own = np.isin(labels, members)
        rows = np.flatnonzero(own.any(axis=1))
        near = ndimage.binary_dilation(own)  # with the antialiased edge
        glyphs.append((ink * near)[rows[0] : rows[-1] + 1, left:right])
    return glyphs


def read_glyph(ink: np.ndarray) -> np.ndarray:
    """Score a glyph as each character of `ALPHABET`.

    Args:
        ink (`np.ndarray`): `[height, width]`, from 0 to 1.

    Returns:
        `np.ndarray`: one value in [0, 1] per character: its probability (softmax of the correlations with the
        templates) times the quality of the match.
    """
    correlation = (_templates() @ _normalise(ink)).max(axis=1)
    probability = np.exp((correlation - correlation.max()) / SHARPNESS)
    quality = np.clip((correlation - POOR_MATCH) / (GOOD_MATCH - POOR_MATCH), 0, 1)
    return probability / probability.sum() * quality


def score_text(text: str, glyphs: list[np.ndarray]) -> float:
    """Score the best alignment, in reading order, of the detected glyphs with the characters of a text.

    Args:
        text (`str`): The target, of characters of `ALPHABET`.
        glyphs (`list[np.ndarray]`): From `find_glyphs`.

    Returns:
        `float`: sum of the aligned glyphs' scores, divided by the number of characters or of detected glyphs,
        whichever is larger; in [0, 1].
    """
    best = np.zeros((len(glyphs) + 1, len(text) + 1))
    for i, glyph in enumerate(glyphs, start=1):
        values = read_glyph(glyph)
        for j, character in enumerate(text, start=1):
            aligned = best[i - 1, j - 1] + values[ALPHABET.index(character)]
            best[i, j] = max(aligned, best[i - 1, j], best[i, j - 1])
    return float(best[-1, -1]) / max(len(glyphs), len(text))


def reader(images: list[Image.Image], text: list[str | None], **kwargs) -> list[float | None]:
    """How well the text of the prompt can be read, in any case.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.
        text (`list[str | None]`): The text asked for.

    Returns:
        `list[float | None]`: one value in [0, 1] per picture; `None` where `text` is `None`.

    Raises:
        `ValueError`: for a character that ShapeWorld does not have.
    """
    for target in text:
        unknown = set(target.upper()) - set(ALPHABET) if target is not None else set()
        if unknown:
            raise ValueError(f"cannot read {sorted(unknown)} in {target!r}; use only {''.join(ALPHABET)}")
    return [
        None if target is None else score_text(target.upper(), find_glyphs(image))
        for image, target in zip(images, text, strict=True)
    ]
