# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Three rewards that apply to every picture: how much is on it, how well it is centred, how calm it is.

They pull against the specialists and each other: several objects are hard to centre together, and less calm than one;
crisp glyphs have long outlines. Each vanishes for pictures of nothing, of nothing but foreground, or of noise only.
"""

import numpy as np
from PIL import Image

from .foreground import solid_foreground


ENOUGH = 0.18  # share of the picture that earns full coverage
VISIBLE = 0.04  # share from which on the picture counts as showing something
CROWDED, FLOODED = 0.6, 0.9  # shares between which every general reward falls to 0
RESTLESS = 0.16  # total variation for the foreground's size at which calm has fallen to 0; a disc has about .03


def _room_left(share: float) -> float:
    return float(np.clip((FLOODED - share) / (FLOODED - CROWDED), 0, 1))


def _presence(share: float) -> float:
    return min(share / VISIBLE, 1.0) * _room_left(share)


def coverage(images: list[Image.Image], **kwargs) -> list[float]:
    """Share of the picture that is solid foreground: 1 from 18% on, falling from 60% to nothing at 90%.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture.
    """
    shares = [float(solid_foreground(image).mean()) for image in images]
    return [min(share / ENOUGH, 1.0) * _room_left(share) for share in shares]


def centring(images: list[Image.Image], **kwargs) -> list[float]:
    """How near the foreground's centre of mass is to the middle: 1 there, 0 at the middle of an edge.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture; scaled down where less than 4% or more than 60% is foreground.
    """
    rewards = []
    for image in images:
        solid = solid_foreground(image)
        share = float(solid.mean())
        if share == 0:
            rewards.append(0.0)
            continue
        rows, columns = (np.linspace(-1, 1, n) for n in solid.shape)
        y, x = solid.sum(axis=1) @ rows / solid.sum(), solid.sum(axis=0) @ columns / solid.sum()
        rewards.append(max(0.0, 1 - float(np.hypot(x, y))) * _presence(share))
    return rewards


def calm(images: list[Image.Image], **kwargs) -> list[float]:
    """How little the picture changes from pixel to pixel, for the size of what it shows.

    Total variation, `mean|dx| + mean|dy|`, grows with the length of outlines, and outlines with the square root of the
    area: their ratio does not depend on an object's size. Specks in the ground, ragged outlines, thin strokes and many
    small objects instead of one raise it.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture; scaled down where less than 4% or more than 60% is foreground.
    """
    rewards = []
    for image in images:
        share = float(solid_foreground(image).mean())
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        variation = sum(float(np.abs(np.diff(pixels, axis=axis)).mean()) for axis in (0, 1))
        restlessness = variation / max(share, VISIBLE) ** 0.5
        rewards.append(max(0.0, 1 - restlessness / RESTLESS) * _presence(share))
    return rewards
