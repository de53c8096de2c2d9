# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The size of an image as a JPEG file: rewards without a model."""

from io import BytesIO
from typing import Any

from PIL import Image

from ..media import to_rgb


def jpeg_incompressibility(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """
    The size of the image as a JPEG file, as in DDPO (https://huggingface.co/papers/2305.13301).

    Applies to every image. It grows with the number of pixels, so only images of one size can be compared.

    Args:
        images (`list[PIL.Image.Image]`):
            Images of any mode, bit depth and size, see [`~trl_marble.media.to_rgb`].

    Returns:
        `list[float]`: kilobytes (1000 bytes) at quality 95, one value per image; positive, without an upper bound.
    """
    return [_kilobytes(image) for image in images]


def jpeg_compressibility(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """
    Minus the size of the image as a JPEG file, as in DDPO (https://huggingface.co/papers/2305.13301).

    (Flow-GRPO and DiffusionNFT divide the size, without the minus, by 500.)

    Applies to every image. It falls with the number of pixels, so only images of one size can be compared.

    Args:
        images (`list[PIL.Image.Image]`):
            Images of any mode, bit depth and size, see [`~trl_marble.media.to_rgb`].

    Returns:
        `list[float]`: minus the kilobytes (1000 bytes) at quality 95, one value per image; negative, without a lower
        bound.
    """
    return [-_kilobytes(image) for image in images]


def _kilobytes(image: Image.Image) -> float:
    buffer = BytesIO()
    to_rgb(image).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
