# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How much the images of one prompt differ from each other, so that a collapse shows."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


THUMBNAIL_SIZE = 16


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """
    What of an image counts for its diversity: layout and colour, without fine detail.

    Args:
        images (`Sequence[PIL.Image.Image]`):
            The images.

    Returns:
        `Tensor` of shape `[N, 768]`, float32: their pixels at 16 x 16, RGB in [0, 1].
    """
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    small = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small)).flatten(1).float() / 255


def group_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """
    Mean distance between the images of each group.

    Args:
        features (`Tensor` of shape `[N, D]`):
            What of the images counts, such as [`thumbnails`].
        groups (`Tensor` of shape `[N]`, int64):
            The group of each image, such as the number of its prompt, from 0 on.

    Returns:
        `Tensor` of shape `[number of groups]`, float64: the root mean square difference between the features of two
        images, averaged over all pairs of the group; for features in [0, 1] it is in [0, 1]. 0 where all images of the
        group are the same, NaN where it has fewer than two.
    """
    values = []
    for group in range(int(groups.max()) + 1):
        members = features[groups == group].double()
        distances = torch.pdist(members) / members.shape[1] ** 0.5
        values.append(distances.mean())  # of nothing: NaN
    return torch.stack(values)
