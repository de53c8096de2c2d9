# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Models that turn images into features, for rewards that compare sets of images."""

from abc import abstractmethod
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, BitImageProcessorPil, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ..media import to_rgb
from .clip_features import crop_square, image_features, text_features
from .loaded_model import LoadedModel


class FeatureModel(LoadedModel):
    """
    Base class of models of features of images. Loaded on first use; called with a list of images.

    A subclass has the methods [`~FeatureModel.load`] and [`~FeatureModel.embed`].

    Args:
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32 without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights move to the CPU between generation batches.

    Raises:
        `ValueError`: If `batch_size` is not positive.
    """

    @abstractmethod
    def embed(self, images: list[Image.Image]) -> Tensor:
        """
        Features of one batch. Called under `torch.inference_mode`.

        Args:
            images (`list[PIL.Image.Image]`):
                At most `batch_size` images, RGB, of any size.

        Returns:
            `Tensor` of shape `[B, D]`.
        """

    def embed_texts(self, texts: list[str]) -> Tensor:
        """
        Features of texts in the space of the images.

        Args:
            texts (`list[str]`):
                At most `batch_size` texts.

        Raises:
            `ValueError`: If the model does not know texts.
        """
        raise ValueError(f"`{type(self).__name__}` has no features of texts; use `CLIPFeatures`.")

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """
        Features of images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any mode and size.

        Returns:
            `Tensor` of shape `[B, D]`, float32, on the CPU.
        """
        return self._in_batches(lambda batch: self.embed([to_rgb(image) for image in batch]), images)

    def of_texts(self, texts: list[str]) -> Tensor:
        """The same of texts, see [`~FeatureModel.embed_texts`]."""
        return self._in_batches(self.embed_texts, texts)

    def _in_batches(self, embed: Any, items: list) -> Tensor:
        self.model.to(self.device, self.dtype)
        parts = []
        for start in range(0, len(items), self.batch_size):
            with torch.inference_mode():
                parts.append(embed(items[start : start + self.batch_size]).float().cpu())
        return torch.cat(parts)  # outside: what is computed under inference mode could not be used with gradients


class CLIPFeatures(FeatureModel):
    """
    Projected CLIP features, of length 1, of images and of texts.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or local folder of a [`~transformers.CLIPModel`] with its tokenizer and image processor.
        settings:
            See [`FeatureModel`].
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14", **settings: Any) -> None:
        super().__init__(**settings)
        self.model_id = model

    def load(self) -> nn.Module:
        self.tokenizer = CLIPTokenizer.from_pretrained(self.model_id)
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.model_id)
        model: Any = CLIPModel.from_pretrained(self.model_id)
        self.image_size = model.config.vision_config.image_size
        return model

    def embed(self, images: list[Image.Image]) -> Tensor:
        squares = [crop_square(image, self.image_size) for image in images]
        return image_features(self.model, self.image_processor(squares, return_tensors="pt").pixel_values)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return text_features(self.model, self.tokenizer, texts)


class DINOv2Features(FeatureModel):
    """
    Features of DINOv2 (https://huggingface.co/papers/2304.07193): those of the class token after the last layer norm.
    They tell layout and objects apart that CLIP's, which follow captions, do not.

    Args:
        model (`str`, *optional*, defaults to `"facebook/dinov2-base"`):
            Hub id or local folder of a [`~transformers.Dinov2Model`] with its image processor.
        settings:
            See [`FeatureModel`].
    """

    def __init__(self, model: str = "facebook/dinov2-base", **settings: Any) -> None:
        super().__init__(**settings)
        self.model_id = model

    def load(self) -> nn.Module:
        self.image_processor = BitImageProcessorPil.from_pretrained(self.model_id)
        return AutoModel.from_pretrained(self.model_id)

    def embed(self, images: list[Image.Image]) -> Tensor:
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        return self.model(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
