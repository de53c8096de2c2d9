# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Five rewards of EmojiWorld: two learned networks and three programs; and a held-out network for each learned one.

`vivid` and `simple` conflict: local differences of colour are what costs bytes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from trl_marble.media import to_rgb

from .captions import BACKGROUNDS
from .drawing import SIZE
from .networks import Regressor, Scorer, load_network


RewardFunction = Callable[..., Sequence[float | None]]

BORDER = 3  # pixels
WRONG_COLOUR = 0.4  # RGB distance from which a pixel has not the asked colour; between two of them there is more
PATCH = 16  # side of the patches of `vivid`, in pixels
# The scales, from 600 drawn pictures. Mean deviation of colour in patches: 5% to 95% have 14 to 68, and noise has 140.
MOST_VIVID = 80.0
# Kilobytes: 5% to 95% of the drawn pictures have 1.6 to 2.7, all have 1.3 to 3.2; one colour has 0.77, noise has 10.
SMALLEST, LARGEST = 0.77, 3.2
JPEG_PADDING = 4  # pixels; half a block of JPEG, so that a picture of blocks of the same size is not small


def as_input(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures as the networks take them: `[batch, 3, 64, 64]` in [-1, 1]; other sizes are resized."""
    sized = [image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE)) for image in map(to_rgb, images)]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in sized])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).div(127.5).sub(1.0)


@cache
def _network(name: str) -> Scorer | Regressor:
    return load_network(name)


@torch.no_grad()
def _match(name: str, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    cosines = _network(name)(as_input(images), prompts)
    return ((1 + cosines) / 2).clamp(0, 1).tolist()


@torch.no_grad()
def _rate(name: str, images: Sequence[Image.Image]) -> list[float]:
    return _network(name)(as_input(images)).tolist()


def matching(images: list[Image.Image], prompts: list[str], **kwargs: Any) -> list[float]:
    """How well a picture matches its prompt, for a small CLIP: the cosine of both, from 0 (-1) to 1 (1).

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.
        prompts (`list[str]`): Prompts of EmojiWorld; other words are refused.

    Returns:
        `list[float]`: one value in [0, 1] per picture.
    """
    return _match("matching", images, prompts)


def matching_heldout(images: list[Image.Image], prompts: list[str], **kwargs: Any) -> list[float]:
    """Like `matching`, by the held-out network."""
    return _match("matching_heldout", images, prompts)


def quality(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """How little a picture is damaged (blur, noise, blotches, ghosts, wrong colours), for a small network.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.

    Returns:
        `list[float]`: one value in [0, 1] per picture; 1 is a picture without damage.
    """
    return _rate("quality", images)


def quality_heldout(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """Like `quality`, by the held-out network, which has learned partly other kinds of damage."""
    return _rate("quality_heldout", images)


def _border_score(image: Image.Image, colour: str) -> float:
    pixels = np.asarray(to_rgb(image), dtype=np.float32) / 255
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    distances = np.linalg.norm(pixels[frame] - np.array(BACKGROUNDS[colour], dtype=np.float32) / 255, axis=1)
    return float(np.clip(1 - distances / WRONG_COLOUR, 0, 1).mean())


def background(images: list[Image.Image], background: list[str | None], **kwargs: Any) -> list[float | None]:
    """How near the pixels at the border are to the colour that the prompt asks for.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.
        background (`list[str | None]`): The asked colours, keys of `BACKGROUNDS`.

    Returns:
        `list[float | None]`: one value in [0, 1] per picture; `None` where no colour is asked for.
    """
    return [
        None if colour is None else _border_score(image, colour)
        for image, colour in zip(images, background, strict=True)
    ]


def colourfulness(image: Image.Image) -> float:
    """
    The colourfulness of Hasler and Süsstrunk (2003), of patches instead of the picture, and without the mean colour.

    Both changes are so that a picture of one or two flat colours is not colourful.

    Args:
        image (`PIL.Image.Image`): RGB; its sides are multiples of 16 pixels.

    Returns:
        `float`: the mean over patches of 16x16 pixels of the standard deviation of colour; 0 for a flat colour.
    """
    red, green, blue = np.asarray(to_rgb(image), dtype=np.float32).transpose(2, 0, 1)
    height, width = red.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"an image has {width}x{height} pixels; its sides have to be multiples of {PATCH}")
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    variances = opponents.reshape(2, height // PATCH, PATCH, width // PATCH, PATCH).var(axis=(2, 4))
    return float(np.sqrt(variances.sum(axis=0)).mean())


def vivid(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """How colourful a picture is, see `colourfulness`.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures, with sides that are multiples of 16 pixels.

    Returns:
        `list[float]`: one value in [0, 1] per picture; 0 is a flat colour.
    """
    return [min(colourfulness(image) / MOST_VIVID, 1.0) for image in images]


def jpeg_kilobytes(image: Image.Image) -> float:
    """The size as a JPEG file in kilobytes (1000 bytes), with colours as fine as brightness, and with a margin."""
    margin = ((JPEG_PADDING, JPEG_PADDING), (JPEG_PADDING, JPEG_PADDING), (0, 0))
    buffer = BytesIO()
    padded = Image.fromarray(np.pad(np.asarray(to_rgb(image)), margin, mode="edge"))
    padded.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.tell() / 1000


def simple(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """How small a picture is as a JPEG file.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures, 64x64: the scale is for their size.

    Returns:
        `list[float]`: one value in [0, 1] per picture; 1 is a flat colour.
    """
    return [float(np.clip((LARGEST - jpeg_kilobytes(image)) / (LARGEST - SMALLEST), 0, 1)) for image in images]


def reward_funcs() -> list[RewardFunction]:
    """The five rewards, for the trainer's `reward_funcs`.

    `background` applies to prompts that ask for a colour only, the others to every picture. All are in [0, 1], higher
    is better, and are called with keywords only: `images`, `prompts` and the columns of `load_prompts`.

    Returns:
        `list[Callable]`

    Raises:
        `FileNotFoundError`: If the networks are not there.
    """
    _network("matching"), _network("quality")  # a missing file is noticed before training
    return [matching, quality, background, vivid, simple]


def heldout_funcs() -> list[RewardFunction]:
    """The held-out networks, to see whether `matching` and `quality` are hacked; not for training.

    Returns:
        `list[Callable]`

    Raises:
        `FileNotFoundError`: If the networks are not there.
    """
    _network("matching_heldout"), _network("quality_heldout")
    return [matching_heldout, quality_heldout]
