# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What rewards share that are computed from features by any model or function."""

from collections.abc import Callable
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from .feature_models import CLIPFeatures, FeatureModel


Extractor = Callable[[list[Image.Image]], Tensor]


class ExtractorReward:
    """
    Base class of rewards that are computed from features of a model or a function.

    Args:
        extractor (`Callable`, *optional*):
            From a list of N images to features, a tensor of shape `[N, D]`: a [`FeatureModel`] such as
            [`CLIPFeatures`] and [`DINOv2Features`], or a function. Defaults to `CLIPFeatures()`.

    Raises:
        `TypeError`: If `extractor` is not callable.
    """

    def __init__(self, extractor: Extractor | None = None) -> None:
        if extractor is not None and (not callable(extractor) or isinstance(extractor, type)):
            raise TypeError(
                f"`extractor` is {extractor!r}; pass an object such as `CLIPFeatures()`, or a function from a list of "
                "images to a tensor."
            )
        self.extractor: Extractor = CLIPFeatures() if extractor is None else extractor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Set the device of the extractor if it is a [`FeatureModel`], and its dtype unless it has its own."""
        if isinstance(self.extractor, FeatureModel):
            self.extractor.to(device, dtype)
        return self

    def release(self) -> None:
        """Move the extractor to the CPU if it is a [`FeatureModel`] with `offload`."""
        if isinstance(self.extractor, FeatureModel):
            self.extractor.release()
