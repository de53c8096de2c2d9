# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that need no model: they tell any images apart, and one of them does not apply to every prompt."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..rewards import RewardFunc


PROMPTS = ["a red circle", "two blue squares", "a red star", "three yellow triangles"]


def brightness(images: Sequence[Image.Image], **kwargs: Any) -> list[float]:
    """Mean of all channels, in [0, 1]."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def blueness(images: Sequence[Image.Image], **kwargs: Any) -> list[float]:
    """Mean of the blue channel, in [0, 1]."""
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


def redness(images: Sequence[Image.Image], prompts: Sequence[str], **kwargs: Any) -> list[float | None]:
    """Mean of the red channel, in [0, 1], for prompts that ask for it."""
    return [
        float(np.asarray(image)[..., 0].mean()) / 255 if "red" in prompt else None
        for image, prompt in zip(images, prompts, strict=True)
    ]


REWARDS: list[str | RewardFunc] = [brightness, blueness, redness]
