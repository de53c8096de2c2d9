# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""PickScore: which image people would choose for a prompt."""

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .clip_features import image_features, text_features
from .model_reward import ModelReward


class PickScore(ModelReward):
    """
    PickScore v1 (https://huggingface.co/papers/2305.01569): a CLIP ViT-H/14 fine-tuned on the choices of the users of
    Pick-a-Pic.

    The value is `exp(logit_scale) * cos(image, prompt)`, the logit of the paper. Prompts are cut at 77 tokens, as in
    the original.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or local folder of a [`~transformers.CLIPModel`].
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or local folder of the tokenizer and the image processor.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32, that of the original scores,
            without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights move to the CPU between generation batches.
    """

    value_range = "100 times a cosine, in practice about 20"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, dtype, offload)
        self.model_id = model
        self.processor_id = processor

    def load(self) -> CLIPModel:
        self.tokenizer = CLIPTokenizer.from_pretrained(self.processor_id)
        # With Pillow, like the original: torchvision, where it is installed, resizes differently.
        self.image_processor = CLIPImageProcessorPil.from_pretrained(self.processor_id)
        model = CLIPModel.from_pretrained(self.model_id)
        # Before the weights are cast: in bfloat16 a scale of 100 would be 98.9.
        self.logit_scale = model.logit_scale.float().exp().item()
        return model

    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        image = image_features(self.model, pixels)
        text = text_features(self.model, self.tokenizer, prompts)
        return (self.logit_scale * (image * text).sum(dim=-1)).tolist()
