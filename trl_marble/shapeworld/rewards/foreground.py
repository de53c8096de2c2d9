# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find the foreground of a ShapeWorld picture: all pixels that differ from the colour of the border."""

import numpy as np
from PIL import Image
from scipy import ndimage

from ...media import to_rgb


BORDER = 2  # pixels; the colour of the background is the median over this frame
# Contrast to the background, between 0 and 1, from which a pixel is partly and completely foreground. The dim specks
# of the background have .13, the darkest colour of the palette has .5.
FAINT, FULL = 0.2, 0.36


def contrast(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's difference to the background.

    Args:
        image (`PIL.Image.Image`): RGB, any size.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the signed difference `[height, width, 3]` and the background's colour `[3]`,
        where 1 is the full range of a channel.
    """
    pixels = np.asarray(to_rgb(image), dtype=np.float32) / 255
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(pixels[frame], axis=0)
    return pixels - ground, ground


def as_foreground(difference: np.ndarray) -> np.ndarray:
    """Convert signed differences `[height, width, 3]` to degrees of foreground `[height, width]` in [0, 1]."""
    return np.clip((np.abs(difference).max(axis=2) - FAINT) / (FULL - FAINT), 0, 1)


def soft_foreground(image: Image.Image) -> np.ndarray:
    """How much each pixel belongs to the foreground.

    Args:
        image (`PIL.Image.Image`): RGB, any size.

    Returns:
        `np.ndarray`: `[height, width]`, from 0 (background) to 1 (foreground).
    """
    return as_foreground(contrast(image)[0])


def solid_foreground(image: Image.Image) -> np.ndarray:
    """Like `soft_foreground`, but of a 3x3 average and after a 3x3 opening, which remove noise and thin lines.

    Args:
        image (`PIL.Image.Image`): RGB, any size.

    Returns:
        `np.ndarray`: `[height, width]`, from 0 (background) to 1 (foreground).
    """
    smooth = ndimage.uniform_filter(contrast(image)[0], size=(3, 3, 1))
    return ndimage.grey_opening(as_foreground(smooth), size=3)
