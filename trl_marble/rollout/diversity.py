# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How much the images of one prompt differ from each other, which shows a collapse of the policy."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..media import Sample, evenly_spaced_frames, to_rgb


THUMBNAIL_SIZE = 16
THUMBNAIL_FRAMES = 4


def thumbnails(images: Sequence[Sample]) -> Tensor:
    """
    Features of images for their diversity: layout and colour, without fine detail.

    Args:
        images (`Sequence[PIL.Image.Image]` or `Sequence[list[PIL.Image.Image]]`):
            The images, or videos with the same number of frames.

    Returns:
        `Tensor` of shape `[N, 768]`, float32: their pixels at 16 x 16, RGB in [0, 1]. For a video those of four evenly
        spaced frames (of all, if it has fewer), one after the other: `[N, 3072]`.
    """
    small = [
        [_small(frame) for frame in evenly_spaced_frames(image, THUMBNAIL_FRAMES)]
        if isinstance(image, list)
        else _small(image)
        for image in images
    ]
    return torch.from_numpy(np.array(small)).flatten(1).float() / 255


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(to_rgb(image).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX))


def group_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """
    Mean distance between the images of each group.

    Args:
        features (`Tensor` of shape `[N, D]`):
            Features of the images, such as [`thumbnails`]. Images whose features are NaN are left out.
        groups (`Tensor` of shape `[N]`, int64):
            The group of each image, such as the number of its prompt, from 0 on.

    Returns:
        `Tensor` of shape `[number of groups]`, float64: the root mean square difference between the features of two
        images, averaged over all pairs of the group; for features in [0, 1] it is in [0, 1]. 0 where all images of the
        group are the same, NaN where it has fewer than two.
    """
    values = []
    for group in range(int(groups.max()) + 1):
        members = features[(groups == group) & ~features.isnan().any(dim=1)].double()
        distances = torch.pdist(members) / members.shape[1] ** 0.5
        values.append(distances.mean())  # NaN without distances
    return torch.stack(values)
