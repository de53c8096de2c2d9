# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The base class of rewards that are computed by a model."""

from abc import abstractmethod
from typing import Any

import torch
from PIL import Image

from ..media import to_rgb
from .loaded_model import LoadedModel


class ModelReward(LoadedModel):
    """
    Base class of rewards that a neural network computes.

    The model is loaded when the first image is scored, so that making the object costs nothing. Images are scored in
    batches, without gradients, and only those that the reward applies to: the others get `None`. The trainer calls
    [`~ModelReward.to`] with its own device and dtype, and [`~ModelReward.release`] when the images of a generation
    batch are scored.

    A subclass has the methods [`~ModelReward.load`] and [`~ModelReward.score`], and [`~ModelReward.applies`] if the
    reward does not apply to every image.

    Args:
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32 without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights stay on the CPU but for the time of scoring: slower, but the update can use
            their memory on the device.

    Attributes:
        applies_to (`str`): In words, the images that the reward applies to and what in the data decides it.
        value_range (`str`): In words, the scale of the reward.

    Raises:
        `ValueError`: If `batch_size` is not positive.
    """

    applies_to = "every image"
    value_range: str

    @abstractmethod
    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        """
        Score one batch of images that the reward applies to. Called under `torch.inference_mode`.

        Args:
            images (`list[PIL.Image.Image]`):
                At most `batch_size` images, RGB, of any size.
            prompts (`list[str]`):
                Their prompts.
            columns (`list`):
                The other columns of the dataset by name, one value per image.

        Returns:
            `list[float | None]`: one value per image.
        """

    def applies(self, prompts: list[str], **columns: list) -> list[bool]:
        """
        For each image, whether the reward applies to it.

        Args:
            prompts (`list[str]`):
                The prompts.
            columns (`list`):
                The other columns of the dataset by name, one value per image.
        """
        return [True] * len(prompts)

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: list,
    ) -> list[float | None]:
        """
        Score images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any mode, bit depth and size, see [`~trl_marble.media.to_rgb`].
            prompts (`list[str]`):
                Their prompts.
            trainer_state, log_metric, log_extra (*optional*):
                Not used.
            columns (`list`):
                The other columns of the dataset by name, one value per image.

        Returns:
            `list[float | None]`: one value per image, `None` where the reward does not apply.
        """
        places = [i for i, applies in enumerate(self.applies(prompts, **columns)) if applies]
        values: list[float | None] = [None] * len(images)
        if not places:
            return values
        self.model.to(self.device, self.dtype)
        for start in range(0, len(places), self.batch_size):
            chosen = places[start : start + self.batch_size]
            with torch.inference_mode():
                scores = self.score(
                    [to_rgb(images[i]) for i in chosen],
                    [prompts[i] for i in chosen],
                    **{name: [column[i] for i in chosen] for name, column in columns.items()},
                )
            for i, score in zip(chosen, scores, strict=True):
                values[i] = score
        return values
