# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Three rewards that apply to every picture: how much foreground it has, how well it is centred, how calm it is.

They conflict with the specialists and with each other: several objects are hard to centre together, larger objects
merge, and even colours lose thin strokes. Each is 0 for empty pictures, for pictures of foreground only and for noise.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from ...media import to_rgb
from .foreground import soft_foreground, solid_foreground


# Coverage and centring are 1 for well-drawn pictures: a reward that could always be increased would merge all objects
# of a prompt into one in the middle.
ENOUGH, MUCH = 0.14, 0.22  # shares of the picture between which coverage is 1
OFF_CENTRE = 0.1  # distance from the middle, in half pictures, up to which centring is 1
RESTLESS = 0.014  # mean difference of neighbouring pixels away from outlines at which calm is 0
VISIBLE = 0.04  # share of foreground from which a picture counts as not empty
CROWDED, FLOODED = 0.6, 0.9  # shares between which every general reward falls to 0


def _scale_of_crowded(share: float) -> float:
    return float(np.clip((FLOODED - share) / (FLOODED - CROWDED), 0, 1))


def _presence(share: float) -> float:
    return min(share / VISIBLE, 1.0) * _scale_of_crowded(share)


def coverage(images: list[Image.Image], **kwargs) -> list[float]:
    """Share of the picture that is solid foreground: 1 between 14% and 22%, 0 at 0% and from 60% on.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture.
    """
    shares = [float(solid_foreground(image).mean()) for image in images]
    return [float(np.clip(min(share / ENOUGH, (CROWDED - share) / (CROWDED - MUCH)), 0, 1)) for share in shares]


def centring(images: list[Image.Image], **kwargs) -> list[float]:
    """How near the foreground's centre of mass is to the middle: 1 within a tenth of the way to an edge, 0 at it.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture; lower if less than 4% or more than 60% is foreground.
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
        off_centre = float(np.hypot(x, y))
        rewards.append(float(np.clip((1 - off_centre) / (1 - OFF_CENTRE), 0, 1)) * _presence(share))
    return rewards


def restlessness(image: Image.Image) -> float:
    """How much the picture changes from pixel to pixel, away from the outlines of its objects.

    Args:
        image (`PIL.Image.Image`): RGB.

    Returns:
        `float`: mean absolute difference of neighbouring pixels, all channels from 0 to 1, over the background and
        the inside of objects.
    """
    objects = soft_foreground(image) > 0.5
    near_outline = ndimage.binary_dilation(objects, iterations=2) & ~ndimage.binary_erosion(objects, iterations=2)
    pixels = np.asarray(to_rgb(image), dtype=np.float32) / 255
    down, across = np.abs(np.diff(pixels, axis=0)).mean(axis=2), np.abs(np.diff(pixels, axis=1)).mean(axis=2)
    quiet = ~near_outline
    return float((down[:, :-1] + across[:-1])[quiet[:-1, :-1]].mean()) if quiet[:-1, :-1].any() else 1.0


def calm(images: list[Image.Image], **kwargs) -> list[float]:
    """How even the background and the inside of objects are: specks and spots lower it, outlines do not.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture; lower if less than 4% or more than 60% is foreground.
    """
    return [
        float(np.clip((RESTLESS - restlessness(image)) / RESTLESS, 0, 1))
        * _presence(float(solid_foreground(image).mean()))
        for image in images
    ]
