# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Rewards of sets of images: diversity within a prompt, and distances to a reference set.

As in DRAGON (https://huggingface.co/papers/2504.15217) what is rewarded is a property of the distribution of images.
Each image gets the value of its set plus its influence on it, see `set_values.py`, so the mean of the reward is the
value of the set.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .extractor_reward import Extractor, ExtractorReward
from .feature_models import FeatureModel
from .protocol import Scope
from .set_reward import SetReward
from .set_values import frechet_distance, mean_kernel, median_distance, principal_directions, squared_mmd, vendi_score


class ExtractedSetReward(ExtractorReward, SetReward):
    """Base class of set rewards with features of a model or a function, see [`ExtractorReward`]."""

    def features(self, images: list[Image.Image], prompts: list[str], **columns: Any) -> Tensor:
        return self.extractor(images)


class VendiDiversity(ExtractedSetReward):
    """
    Diversity within a prompt: the Vendi score of its images (https://huggingface.co/papers/2210.02410), the effective
    number of different images, from 1 to the number of images.

    As one reward among others it works against the collapse of a prompt's images to one; alone it is easily maximized
    by bad images. For the equation see `vendi_score` in `trl_marble/rewards/set_values.py`.

    Args:
        extractor (`Callable`, *optional*):
            From a list of N images to features, a tensor of shape `[N, D]`: a [`FeatureModel`] such as
            [`CLIPFeatures`] and [`DINOv2Features`], or a function. Only the directions of features count. Defaults to
            `CLIPFeatures()`.

    Example:

    ```python
    from trl_marble.rewards import DINOv2Features, VendiDiversity

    reward_funcs = ["pickscore", VendiDiversity(DINOv2Features())]
    ```
    """

    scope: Scope = "group"

    def credit(self, features: Tensor, groups: Tensor) -> Tensor:
        credit = torch.empty(len(features), dtype=torch.float64)
        for group in groups.unique():
            members = groups == group
            credit[members] = vendi_score(features[members]).credit
        return credit


class ReferenceSetReward(ExtractedSetReward):
    """
    Base class of set rewards with a reference set.

    Args:
        reference (`list[PIL.Image.Image]`, `list[str]` or `Tensor` of shape `[M, D]`):
            At least two images, or texts (with an extractor that has features of texts, such as [`CLIPFeatures`]), or
            their features.
        extractor (`Callable`, *optional*):
            See [`ExtractorReward`]. Defaults to `CLIPFeatures()`.

    Raises:
        `TypeError`: If `reference` is none of these.
        `ValueError`: If it has fewer than two members, or is of texts and the extractor has no features of texts.
    """

    scope: Scope = "batch"

    def __init__(
        self, reference: Sequence[Image.Image] | Sequence[str] | Tensor, extractor: Extractor | None = None
    ) -> None:
        super().__init__(extractor)
        if isinstance(reference, Tensor):
            if reference.ndim != 2 or not reference.isfinite().all():
                raise ValueError(
                    f"`reference` is a tensor of shape {tuple(reference.shape)}; features are of shape "
                    "(number of images, number of features), and finite."
                )
        else:
            kinds = {Image.Image if isinstance(each, Image.Image) else type(each) for each in reference}
            if isinstance(reference, str) or len(kinds) != 1 or not kinds <= {Image.Image, str}:
                raise TypeError(
                    "`reference` must be a list of images (PIL), a list of texts, or a tensor of features; got "
                    f"{type(reference).__name__} of {', '.join(sorted(kind.__name__ for kind in kinds)) or 'nothing'}."
                )
            if kinds == {str} and not isinstance(self.extractor, FeatureModel):
                raise ValueError("`reference` has texts, and `extractor` takes images only. Use `CLIPFeatures()`.")
        if len(reference) < 2:
            raise ValueError(f"`reference` has {len(reference)} members; a set to compare with has at least two.")
        self._given: Any = reference
        self._reference: Tensor | None = reference.detach().cpu().double() if isinstance(reference, Tensor) else None

    @property
    def reference(self) -> Tensor:
        """Features of the reference set, of shape `[M, D]`, float64 on the CPU; computed on first use."""
        if self._reference is None:
            given = list(self._given)
            if isinstance(given[0], str):
                assert isinstance(self.extractor, FeatureModel)
                features = self.extractor.of_texts(given)
            else:
                features = self.extractor(given)
            self._reference, self._given = features.detach().cpu().double(), None
        return self._reference


class MMDReward(ReferenceSetReward):
    """
    Minus the squared maximum mean discrepancy between the images of a generation batch and a reference set, with a
    Gaussian kernel (as CMMD, https://huggingface.co/papers/2401.09603): 0 if they have the same distribution. It needs
    no covariance, so it is the one for small batches. The bandwidth of the kernel is the median distance between two
    members of the reference (of 2,000 of them, where there are more). For the equation see `squared_mmd` in
    `trl_marble/rewards/set_values.py`.

    Args:
        reference (`list[PIL.Image.Image]`, `list[str]` or `Tensor` of shape `[M, D]`):
            At least two images, or texts (with an extractor that has features of texts, such as [`CLIPFeatures`]), or
            their features.
        extractor (`Callable`, *optional*):
            See [`VendiDiversity`]. Defaults to `CLIPFeatures()`.
    """

    @cached_property
    def _kernel(self) -> tuple[float, float]:
        """The bandwidth, and the mean of the kernel between members of the reference: no batch changes them."""
        bandwidth = median_distance(self.reference)
        return bandwidth, mean_kernel(self.reference, bandwidth)

    def credit(self, features: Tensor, groups: Tensor) -> Tensor:
        return -squared_mmd(features, self.reference, *self._kernel).credit


class FrechetReward(ReferenceSetReward):
    """
    Minus the squared Fréchet distance between the images of a generation batch and a reference set, both as normal
    distributions (as FID). For the equation see `frechet_distance` in `trl_marble/rewards/set_values.py`.

    Features are projected to the reference's first principal components, and noise is added to both sets: a covariance
    of more numbers than there are images says nothing.

    Args:
        reference (`list[PIL.Image.Image]`, `list[str]` or `Tensor` of shape `[M, D]`):
            See [`MMDReward`].
        extractor (`Callable`, *optional*):
            See [`VendiDiversity`]. Defaults to `CLIPFeatures()`.
        num_components (`int`, *optional*, defaults to `64`):
            Number of principal components, at most; fewer than images in a generation batch. Fewer are used where the
            reference has no more: two members differ in one direction.
        smoothing (`float`, *optional*, defaults to `0.01`):
            Variance of the noise, as a fraction of the mean variance of the reference's components.

    Raises:
        `ValueError`: If `num_components` or `smoothing` is not positive, for a reference that is none, and on first
            use for one whose members are all alike.
    """

    def __init__(
        self,
        reference: Sequence[Image.Image] | Sequence[str] | Tensor,
        extractor: Extractor | None = None,
        num_components: int = 64,
        smoothing: float = 0.01,
    ) -> None:
        super().__init__(reference, extractor)
        if num_components < 1:
            raise ValueError(f"`num_components` must be at least 1, got {num_components}.")
        if not smoothing > 0:
            raise ValueError(f"`smoothing` must be greater than 0, got {smoothing}.")
        self.num_components, self.smoothing = num_components, smoothing

    @cached_property
    def _normal(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Mean, directions, covariance and smoothing: no batch changes them."""
        mean = self.reference.mean(dim=0)
        centred = self.reference - mean
        directions = principal_directions(centred, self.num_components)
        if len(directions) == 0:
            raise ValueError(
                f"All {len(centred)} members of `reference` have the same features, so they have no distribution to "
                "compare with. Give different ones, or an `extractor` that tells them apart."
            )
        projected = centred @ directions.T
        covariance = projected.T @ projected / len(projected)
        return mean, directions, covariance, self.smoothing * covariance.diagonal().mean().item()

    def credit(self, features: Tensor, groups: Tensor) -> Tensor:
        mean, directions, covariance, smoothing = self._normal
        own = (features.double() - mean) @ directions.T
        return -frechet_distance(own, torch.zeros(len(directions)), covariance, smoothing).credit
