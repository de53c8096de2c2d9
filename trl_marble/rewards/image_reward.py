# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""ImageReward: how much people would like an image for its prompt."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .clip_features import crop_square, normalize_pixels, weights_file
from .model_reward import ModelReward


MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, on the data of the original
MAX_TOKENS = 35
VISION_HEAD_SIZE = 64  # of ViT-B and ViT-L, which does not follow from the shapes of the weights

# From the checkpoint's names to those of `ImageRewardNetwork`: its image encoder is timm's, here it is transformers'.
RENAMES = (
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
VISION_SIZES = (  # the weights whose shapes give the sizes of the image encoder
    "vision.embeddings.patch_embedding.weight",
    "vision.embeddings.position_embedding",
    "vision.encoder.layers.0.mlp.fc1.weight",
)


class ImageReward(ModelReward):
    """
    [ImageReward](https://huggingface.co/papers/2304.05977): a model of human preferences, trained on 137 000
    comparisons of images for the same prompt. A BLIP text encoder reads the prompt and attends to the image by cross
    attention; the score is computed from the state of its first token.

    The score has no bounds. It is standardized on the data of the original, so that most values are between -2.5 and
    2. Only the first 35 tokens of a prompt count.

    Args:
        model (`str`, *optional*, defaults to `"zai-org/ImageReward"`):
            Hub id or local folder with `ImageReward.pt` and `med_config.json`.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            Hub id or local folder of the tokenizer.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32, that of the original scores,
            without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights move to the CPU between generation batches.

    Raises:
        `OSError`: When the first image is scored: a file of `model` or `tokenizer` is missing.
        `ValueError`: When the first image is scored: weights are missing in the checkpoint.
    """

    value_range = "no bounds; standardized, mostly between -2.5 and 2"

    def __init__(
        self,
        model: str = "zai-org/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, offload=offload)
        self.model_id = model
        self.tokenizer_id = tokenizer

    def load(self) -> nn.Module:
        self.tokenizer = BertTokenizer.from_pretrained(self.tokenizer_id)
        # BLIP's own two tokens, which change only prompts that contain them.
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
        with open(weights_file(self.model_id, "med_config.json"), encoding="utf-8") as file:
            text_sizes = json.load(file)
        path = weights_file(self.model_id, "ImageReward.pt")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        self.network = network_from_checkpoint(checkpoint, text_sizes)
        return self.network

    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        size: Any = self.network.vision.config.image_size
        pixels = torch.stack([_pixels(image, size) for image in images]).to(self.device, self.dtype)
        # Always padded to the full length: a score must not depend on the longest prompt of its batch.
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        scores = self.network(pixels, tokens.input_ids, tokens.attention_mask)
        return ((scores.float() - MEAN) / STD).tolist()


class ImageRewardNetwork(nn.Module):
    """
    ImageReward's network, with the sizes of its two encoders.

    Args:
        vision ([`~transformers.BlipVisionConfig`]):
            The image encoder.
        text ([`~transformers.BlipTextConfig`]):
            The text encoder with cross attention to the image.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(  # the original has no activations between its layers; dropout is off when scoring
            nn.Linear(text.hidden_size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The raw scores `[B]` of images `[B, 3, H, W]` for prompts of tokens `[B, T]`."""
        image = self.vision(pixels).last_hidden_state
        text = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=image).last_hidden_state
        return self.head(text[:, 0]).squeeze(-1)


def network_from_checkpoint(checkpoint: dict[str, Tensor], text_sizes: dict) -> ImageRewardNetwork:
    """
    Make the network with the weights of an original checkpoint.

    Args:
        checkpoint (`dict[str, Tensor]`):
            The original's state dict. Weights that are not used for the score are left out, as in the original.
        text_sizes (`dict`):
            The original's `med_config.json`. The sizes of the image encoder follow from its weights.

    Raises:
        `ValueError`: If weights are missing; names them.
    """
    weights = {_renamed(name): weight for name, weight in checkpoint.items()}
    _require(VISION_SIZES, weights)
    with torch.device("meta"):  # without random weights, which would advance torch's generator
        vision = _vision_config(weights)
        network = ImageRewardNetwork(vision, _text_config(text_sizes, vision.hidden_size))
    names = list(network.state_dict())
    _require(names, weights)
    network.load_state_dict({name: weights[name] for name in names}, assign=True)
    positions = torch.arange(network.text.config.max_position_embeddings).expand(1, -1)
    network.text.embeddings.position_ids = positions  # a buffer, not in the state dict, and still on the meta device
    return network


def _pixels(image: Image.Image, size: int) -> Tensor:
    return normalize_pixels(torch.from_numpy(np.array(crop_square(image, size))).permute(2, 0, 1) / 255)


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _require(names: Iterable[str], weights: dict[str, Tensor]) -> None:
    if missing := [name for name in names if name not in weights]:
        raise ValueError(
            f"The checkpoint is not one of ImageReward: it has no {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}. Pass a folder or a Hub id with the "
            "original ImageReward.pt."
        )


def _vision_config(weights: dict[str, Tensor]) -> BlipVisionConfig:
    patches, positions, inner = (weights[name].shape for name in VISION_SIZES)
    width, patch_size = patches[0], patches[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner[0],
        num_hidden_layers=sum(name.endswith(".self_attn.qkv.weight") for name in weights),
        num_attention_heads=width // VISION_HEAD_SIZE,
        image_size=patch_size * math.isqrt(positions[1] - 1),  # one position is the class token's
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(sizes: dict, vision_width: int) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        encoder_hidden_size=vision_width,
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        max_position_embeddings=sizes["max_position_embeddings"],
        hidden_act=sizes["hidden_act"],
        layer_norm_eps=sizes["layer_norm_eps"],
        pad_token_id=sizes["pad_token_id"],
        is_decoder=True,  # needed for cross attention; the text is not masked causally
    )
