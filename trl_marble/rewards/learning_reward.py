# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The base class of rewards that learn from features of images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from .errors import InfiniteRewardError
from .features import check_features, find_infinite
from .parameters import accepts_log_function


class LearningReward(ABC):
    """
    Base class of rewards that learn from features, such as those of a frozen model.

    Each process computes the features of its own images, and only these are sent to the first one, which learns from
    them. A reward that needs the images themselves has the methods of [`~trl_marble.rewards.Learner`]
    instead.

    A subclass has the five methods below.

    Example:

    ```python
    import torch
    from trl_marble.rewards import LearningReward


    class Novelty(LearningReward):
        \"\"\"How far the mean colour of an image is from the mean colour of all images so far.\"\"\"

        def __init__(self):
            self.mean = torch.zeros(3)

        def features(self, images, prompts, **kwargs):
            return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]) / 255

        def score(self, features):
            return (features - self.mean).norm(dim=1)

        def update(self, features, rewards, trainer_state):
            self.mean = 0.9 * self.mean + 0.1 * features.mean(dim=0)

        def state_dict(self):
            return {"mean": self.mean}

        def load_state_dict(self, state_dict):
            self.mean = state_dict["mean"]
    ```
    """

    @abstractmethod
    def features(self, images: list[Image.Image], prompts: list[str], **columns: Any) -> Tensor:
        """
        Features of images, called as a reward is called, once for each image: [`~LearningReward.update`] gets the same
        features as [`~LearningReward.score`].

        Args:
            images (`list[PIL.Image.Image]`):
                Images of this process, RGB.
            prompts (`list[str]`):
                Their prompts.
            columns (`list`):
                The other columns of the dataset by name, one value per image; `trainer_state`; and `log_metric` and
                `log_extra`, if the method accepts them.

        Returns:
            `Tensor` of shape `[B, D]`: one row per image; NaN where the reward does not apply.
        """

    @abstractmethod
    def score(self, features: Tensor) -> Tensor:
        """
        The reward of images, by what was learned so far.

        Args:
            features (`Tensor` of shape `[B, D]`):
                What [`~LearningReward.features`] returned, without the images that the reward does not apply to.

        Returns:
            `Tensor` of shape `[B]`.
        """

    @abstractmethod
    def update(
        self, *, features: Tensor, rewards: dict[str, list[float | None]], trainer_state: Any, **more: Any
    ) -> None:
        """
        Learn from a generation batch, which was scored before. Called on the first process only.

        Args:
            features (`Tensor` of shape `[N, D]`):
                Features of the images of all processes that the reward applies to and has not failed on, on the CPU.
            rewards (`dict[str, list[float | None]]`):
                Name of each reward that is trained on -> one score for each of these images; `None` where it does not
                apply.
            trainer_state ([`~transformers.TrainerState`]):
                The state of the run.
            more:
                `prompts`, the other columns of the dataset, and `log_metric`, of these what the method accepts.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that was learned, and all that decides what will be: tensors, numbers, strings, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what [`~LearningReward.state_dict`] returned, here or on another process."""

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, Any], None] | None = None,
        log_features: Callable[[list[Tensor | None]], None] | None = None,
        **columns: Any,
    ) -> list[float | InfiniteRewardError | None]:
        """
        Score images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images, RGB.
            prompts (`list[str]`):
                Their prompts.
            log_metric, log_extra (`Callable`, *optional*):
                Passed on to [`~LearningReward.features`], if it accepts them.
            log_features (`Callable[[list[Tensor | None]], None]`, *optional*):
                Called with the features of each image, which are learned from later: of shape `[D]`, and `None` where
                the reward does not apply.
            columns:
                The other columns of the dataset by name, one value per image; and `trainer_state`.

        Returns:
            `list[float | InfiniteRewardError | None]`: one value per image, `None` where the reward does not apply,
            and the error of an image with infinite features.

        Raises:
            [`RewardError`]: If `features` did not return one row of numbers for each image.
        """
        name = type(self).__name__
        logs = {"log_metric": log_metric, "log_extra": log_extra}
        accepted = {key: log for key, log in logs.items() if log and accepts_log_function(self.features, key)}
        answer = self.features(images=images, prompts=prompts, **accepted, **columns)
        features = check_features(answer, name, len(images))
        applies = features.isfinite().all(dim=1)
        values: list[float | InfiniteRewardError | None] = [None] * len(images)
        if applies.any():
            scores = self.score(features[applies]).tolist()
            for place, score in zip(applies.nonzero().flatten().tolist(), scores, strict=True):
                values[place] = score
        for place, error in find_infinite(features, name, prompts).items():
            values[place] = error
        if log_features is not None:
            # Copies: what is sent to another process takes all of the memory that it is a part of with it.
            rows = zip(features, applies.tolist(), strict=True)
            log_features([row.clone() if is_used else None for row, is_used in rows])
        return values
