# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Aesthetic score: how people would rate the appearance of an image."""

from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPModel

from .clip_features import crop_square, image_features, weights_file
from .model_reward import ModelReward


class AestheticScore(ModelReward):
    """
    LAION's improved aesthetic predictor (https://github.com/christophschuhmann/improved-aesthetic-predictor, weights
    `sac+logos+ava1-l14-linearMSE`), the reward of DDPO (https://huggingface.co/papers/2305.13301).

    Linear layers, without activations in between, on the normalized image embedding of CLIP ViT-L/14. They were fitted
    to ratings from 1 to 10, but the score has no bounds.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or local folder of a [`~transformers.CLIPModel`] with 768-dimensional embeddings and its image
            processor. Only the image encoder is kept.
        predictor (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            Hub id or local folder of the linear layers, a file `aesthetic-model.pth`.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of CLIP's weights. Defaults to the trainer's dtype, and to float32, that of the original scores,
            without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether CLIP's weights move to the CPU between generation batches.

    Raises:
        `ValueError`: At the first image, if the embeddings of `model` have another size.
    """

    applies_to = "every image, whatever its prompt"
    value_range = "about 1 to 10, in practice about 4 to 7"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        predictor: str = "trl-lib/ddpo-aesthetic-predictor",
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, dtype, offload)
        self.model_id = model
        self.predictor_id = predictor

    def load(self) -> CLIPModel:
        # With Pillow, like the original: torchvision, where it is installed, resizes differently.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.model_id)
        path = weights_file(self.predictor_id, "aesthetic-model.pth")
        # Not part of `self.model`, which is cast: between 4 and 8, bfloat16 has only multiples of 1/32.
        self.head = _head(torch.load(path, map_location="cpu", weights_only=True))
        model: Any = CLIPModel.from_pretrained(self.model_id)
        if model.config.projection_dim != 768:
            raise ValueError(
                f"The aesthetic predictor reads 768 numbers per image, and {self.model_id} has "
                f"{model.config.projection_dim}; use a CLIP ViT-L/14."
            )
        self.image_size = model.config.vision_config.image_size
        del model.text_model  # a third of the weights, and never used
        return model

    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        squares = [crop_square(image, self.image_size) for image in images]
        features = image_features(self.model, self.image_processor(squares, return_tensors="pt").pixel_values)
        return self.head.to(self.device)(features).squeeze(-1).tolist()


def _head(state: dict[str, torch.Tensor]) -> nn.Sequential:
    """The linear layers, from weights named by their place in the original, which had dropout in between."""
    head = nn.Sequential(
        nn.Linear(768, 1024),
        nn.Identity(),
        nn.Linear(1024, 128),
        nn.Identity(),
        nn.Linear(128, 64),
        nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    head.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in state.items()})
    return head.float().requires_grad_(False)
