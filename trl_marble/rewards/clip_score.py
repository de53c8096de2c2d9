# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""CLIPScore: how well an image fits its prompt."""

from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .clip_features import crop_square, image_features, text_cleaner, text_features
from .model_reward import ModelReward


class CLIPScore(ModelReward):
    """
    CLIPScore (https://huggingface.co/papers/2104.08718, equation in section 3): `2.5 * max(cos(image, caption), 0)`.

    The caption is the prompt after a prefix, `"A photo depicts"` in the original and here. Text-to-image papers often
    use no prefix, and neither the factor nor the maximum; to compare with them use `prefix=""`. The published numbers
    are those of `model="openai/clip-vit-base-patch32"`; the default here, ViT-L/14, is more accurate. Prompts are
    cleaned as by OpenAI's tokenizer, and captions are cut at 77 tokens, prefix included.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or local folder of a [`~transformers.CLIPModel`] with its tokenizer and image processor.
        prefix (`str`, *optional*, defaults to `"A photo depicts"`):
            The text before every prompt, with a space in between. Empty for the prompt alone.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32, that of the original scores,
            without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights move to the CPU between generation batches.

    Raises:
        [`~trl_marble.extras.MissingExtraError`]: If `ftfy` is not installed.
    """

    value_range = "0 to 2.5, in practice about 0.4 to 0.9"
    weight = 2.5

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        prefix: str = "A photo depicts",
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, dtype, offload)
        self.clean = text_cleaner()
        self.model_id = model
        self.prefix = prefix

    def load(self) -> CLIPModel:
        self.tokenizer = CLIPTokenizer.from_pretrained(self.model_id)
        # With Pillow, like the original: torchvision, where it is installed, resizes differently.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.model_id)
        model: Any = CLIPModel.from_pretrained(self.model_id)
        self.image_size = model.config.vision_config.image_size
        return model

    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        squares = [crop_square(image, self.image_size) for image in images]
        image = image_features(self.model, self.image_processor(squares, return_tensors="pt").pixel_values)
        captions = [self.clean(f"{self.prefix} {prompt}") for prompt in prompts]
        text = text_features(self.model, self.tokenizer, captions)
        return (self.weight * (image * text).sum(dim=-1).clamp(min=0)).tolist()
