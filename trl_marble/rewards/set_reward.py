# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The base class of rewards that compare many images by their features."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .errors import InfiniteRewardError
from .features import check_features, find_infinite
from .protocol import Scope


class SetReward(ABC):
    """
    Base class of rewards of a set of images that are computed from features of each image.

    Each process computes the features of its own images; only these are gathered, not the images. The credit of all
    images is then computed from the features of whole sets, the same on all processes.

    A subclass has the methods [`~SetReward.features`] and [`~SetReward.credit`], and a `scope`. The credit should be
    *centred on the value of the set*: its mean is the value, and an image that raises the value has more. Then
    `rewards/<name>/mean` shows the value of the set, and so do evaluations.

    Attributes:
        scope (`str`): What a set is: `"group"`, the images of a prompt, or `"batch"` (default), all images of the
            generation batch.

    Example:

    ```python
    import torch
    from trl_marble.rewards import SetReward


    class ColourSpread(SetReward):
        \"\"\"How far the mean colour of an image is from the mean colour of all images of its prompt.\"\"\"

        scope = "group"

        def features(self, images, prompts, **kwargs):
            return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]) / 255

        def credit(self, features, groups):
            means = torch.stack([features[groups == group].mean(dim=0) for group in groups])
            return (features - means).norm(dim=1)
    ```
    """

    scope: Scope = "batch"

    @abstractmethod
    def features(self, images: list[Image.Image], prompts: list[str], **columns: Any) -> Tensor:
        """
        Features of images, called as a reward is called.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of this process, RGB.
            prompts (`list[str]`):
                Their prompts.
            columns (`list`):
                The other columns of the dataset by name, one value per image; and `trainer_state`.

        Returns:
            `Tensor` of shape `[B, D]`: one row per image; NaN where the reward does not apply.
        """

    @abstractmethod
    def credit(self, features: Tensor, groups: Tensor) -> Tensor:
        """
        The reward of every image, from the features of all of them.

        Args:
            features (`Tensor` of shape `[N, D]`):
                Features of the images of all processes that the reward applies to, on the CPU.
            groups (`Tensor` of shape `[N]`, int64):
                The group of each image; images of one prompt share it.

        Returns:
            `Tensor` of shape `[N]`: NaN where the reward does not apply.
        """

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        groups: list[int],
        trainer_state: Any = None,
        **columns: list,
    ) -> list[float | InfiniteRewardError]:
        """
        Score whole sets.

        Args:
            images (`list[PIL.Image.Image]`):
                The images of whole sets.
            prompts (`list[str]`):
                Their prompts.
            groups (`list[int]`):
                The group of each image.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Passed on.
            columns (`list`):
                The other columns of the dataset.

        Returns:
            `list[float | InfiniteRewardError]`: one value per image; NaN where the reward does not apply, and the
            error of an image with infinite features.

        Raises:
            [`RewardError`]: If `features` did not return one row of numbers for each image.
        """
        name = type(self).__name__
        answer = self.features(images=images, prompts=prompts, trainer_state=trainer_state, **columns)
        features = check_features(answer, name, len(images))
        values = torch.full((len(images),), torch.nan)
        applies = features.isfinite().all(dim=1)
        if applies.any():
            # By keyword, as in a run.
            credit = self.credit(features=features[applies], groups=torch.tensor(groups)[applies])
            values[applies] = credit.float()
        infinite = find_infinite(features, name, prompts)
        return [infinite.get(place, value) for place, value in enumerate(values.tolist())]
