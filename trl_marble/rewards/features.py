# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The check of the features that rewards compute of images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InfiniteRewardError, WrongFeaturesError


def check_features(features: Any, name: str, num_images: int) -> Tensor:
    """
    Check what the method `features` of a reward returned, and make floating point numbers of it.

    Args:
        features (`Tensor` of shape `[B, D]`):
            What it returned, of any dtype of real numbers.
        name (`str`):
            Name of the reward, for the error.
        num_images (`int`):
            B.

    Returns:
        `Tensor` of shape `[B, D]`: The features on the CPU, without a gradient.

    Raises:
        [`WrongFeaturesError`]: If it is something else.
    """
    if not isinstance(features, Tensor):
        shown = f"type {type(features).__name__}"
    elif features.ndim != 2 or len(features) != num_images:
        shown = f"shape {tuple(features.shape)}"
    elif features.is_complex():
        shown = f"type {features.dtype}"
    else:
        plain = features.detach().cpu()
        return plain if plain.is_floating_point() else plain.float()
    raise WrongFeaturesError(
        f"`{name}.features` returned something of {shown} for {num_images} images; return a tensor of shape "
        f"({num_images}, number of features), of real numbers."
    )


def find_infinite(features: Tensor, name: str, prompts: Sequence[str]) -> dict[int, InfiniteRewardError]:
    """
    The images with an infinite feature.

    Args:
        features (`Tensor` of shape `[B, D]`):
            Features of images.
        name (`str`):
            Name of the reward, for the errors.
        prompts (`Sequence[str]`):
            The prompts of the images, for the errors.

    Returns:
        `dict[int, InfiniteRewardError]`: The place of each such image -> its error.
    """
    places = torch.isinf(features).any(dim=1).nonzero().flatten().tolist()
    return {
        place: InfiniteRewardError(
            f"Reward `{name}` has infinite features for the prompt {prompts[place]!r}; bound them."
        )
        for place in places
    }
