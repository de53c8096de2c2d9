# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Make pictures worse by a known strength: what the quality networks learn from.

Each function takes a picture and another one (`[64, 64, 3]`, float32, 0 to 255), a strength in [0, 1] and a generator,
and returns the picture with that much damage: 0 changes nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage


Degradation = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]
CLEAN = 0.15  # share of pictures that stay as they are


def blur(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return ndimage.gaussian_filter(picture, (3 * strength, 3 * strength, 0))


def noise(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    return picture + 70 * strength * rng.standard_normal(picture.shape, dtype=np.float32)


def blotches(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Five soft spots of random colours."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    for _ in range(5):
        y, x = rng.uniform(0, picture.shape[0], 2)
        opacity = strength * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * rng.uniform(3, 7) ** 2))
        picture = picture + opacity[..., None].astype(np.float32) * (rng.uniform(0, 255, 3) - picture)
    return picture


def ghost(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Another picture shines through."""
    return picture + 0.6 * strength * (other - picture)


def palette(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Red, green and blue change places."""
    return picture + strength * (np.roll(picture, int(rng.integers(1, 3)), axis=2) - picture)


def fade(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Everything turns into the mean colour: without this, an empty picture would be one without damage."""
    return picture + strength * (picture.mean(axis=(0, 1)) - picture)


def smear(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The blur of a movement, across or down."""
    moved = ndimage.uniform_filter1d(picture, 11, axis=int(rng.integers(2)))
    return picture + strength * (moved - picture)


def grain(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Single pixels of random colours."""
    hit = rng.random(picture.shape[:2]) < 0.3 * strength
    return np.where(hit[..., None], rng.uniform(0, 255, picture.shape).astype(np.float32), picture)


def blocks(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Squares of 8 x 8 pixels show."""
    height, width, _ = picture.shape
    coarse = picture.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))
    return picture + strength * (coarse.repeat(8, axis=0).repeat(8, axis=1) - picture)


def waves(picture: np.ndarray, other: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Rows and columns are displaced by up to six pixels."""
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    phases, length = rng.uniform(0, 2 * np.pi, 2), rng.uniform(8, 20)
    y = rows + 6 * strength * np.sin(2 * np.pi * columns / length + phases[0])
    x = columns + 6 * strength * np.sin(2 * np.pi * rows / length + phases[1])
    return np.stack(
        [ndimage.map_coordinates(picture[..., c], (y, x), order=1, mode="nearest") for c in range(3)], axis=2
    )


LEARNED: tuple[Degradation, ...] = (blur, noise, blotches, ghost, palette, fade)
HELD_OUT: tuple[Degradation, ...] = (smear, grain, blocks, ghost, waves, fade)


def degrade(
    pictures: np.ndarray, kinds: Sequence[Degradation], strongest: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Damage every picture of a batch, except for a share of `CLEAN`, in one or two ways.

    Args:
        pictures (`np.ndarray`): `[count, 64, 64, 3]`, uint8. Ghosts are other pictures of the batch.
        kinds (`Sequence[Degradation]`): `LEARNED` or `HELD_OUT`.
        strongest (`float`): Strengths are uniform between 0 and this.
        rng (`np.random.Generator`): The source of all randomness.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the damaged pictures, as `pictures`, and the strengths `[count]`, float32.
    """
    strengths = np.where(rng.random(len(pictures)) < CLEAN, 0, rng.uniform(0, strongest, len(pictures)))
    damaged = []
    for index, strength in enumerate(strengths.tolist()):
        picture = pictures[index].astype(np.float32)
        other = pictures[rng.integers(len(pictures))].astype(np.float32)
        if strength > 0:
            for kind in rng.choice(len(kinds), rng.integers(1, 3), replace=False):
                picture = kinds[kind](picture, other, strength, rng)
        damaged.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(damaged), strengths.astype(np.float32)
