# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The base class of rewards that are computed by a model."""

import threading
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from PIL import Image
from torch import nn

from ..media import to_rgb


# One model is loaded at a time, although rewards run on several threads. While `transformers` loads, it replaces
# functions and settings of the process, such as the tying of weights and the default dtype. After two loads at once
# the replacements can stay, and every later model would have no tied weights.
LOADING = threading.Lock()


class ModelReward(ABC):
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

    def __init__(self, batch_size: int = 16, dtype: torch.dtype | None = None, offload: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.offload = offload
        self.device = torch.device("cpu")
        self.dtype = dtype or torch.float32
        self._keeps_dtype = dtype is not None
        self._model: nn.Module | None = None

    @abstractmethod
    def load(self) -> nn.Module:
        """
        Load everything that scoring needs, also processors.

        Returns:
            `nn.Module`: the module with all weights. It becomes `self.model`, frozen, on `self.device`, in
            `self.dtype`.
        """

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

    @property
    def model(self) -> nn.Module:
        """The model, loaded on first use."""
        if self._model is None:
            with LOADING:
                self._model = self.load().requires_grad_(False).eval()
        return self._model

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """
        Set the device and the dtype for scoring.

        Args:
            device (`torch.device` or `str`):
                The device.
            dtype (`torch.dtype`, *optional*):
                The dtype of the weights, unless one was chosen when the reward was made.
        """
        self.device = torch.device(device)
        if dtype is not None and not self._keeps_dtype:
            self.dtype = dtype
        return self

    def release(self) -> None:
        """Move the weights to the CPU until the next images are scored, if `offload` is set."""
        if self.offload and self._model is not None:
            self._model.to("cpu")

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
