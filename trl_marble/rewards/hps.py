# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Human Preference Score v2: how much people would prefer an image for a prompt."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .clip_features import image_features, normalize_pixels, text_cleaner, text_features, weights_file
from .model_reward import ModelReward


# Widths of an attention head in open_clip's ViT-H-14, which do not follow from the shapes of the weights.
TEXT_HEAD_WIDTH = 64
IMAGE_HEAD_WIDTH = 80

# Parts of the names in an open_clip checkpoint and in a CLIPModel, replaced in this order.
RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.": "self_attn.",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class HPSv2(ModelReward):
    """
    Human Preference Score v2.1 (https://huggingface.co/papers/2306.09341): a CLIP ViT-H/14 fine-tuned on people's
    choices between generated images.

    The value is `cos(image, prompt)`; papers often print 100 times that. It is equal to that of `hpsv2.score` in the
    package hpsv2 1.2.0 in float32 (the package computes in float16 on a GPU) with torchvision 0.17 or newer (older
    versions resize without anti-aliasing). Neither package is needed: the open_clip checkpoint is converted to a
    [`~transformers.CLIPModel`]. As in the original, images are not cropped but get black bars if they are not square,
    and prompts are cleaned and cut at 77 tokens.

    Args:
        model (`str`, *optional*, defaults to `"xswu/HPSv2"`):
            Hub id or local folder of the checkpoint.
        filename (`str`, *optional*, defaults to `"HPS_v2.1_compressed.pt"`):
            Its name. Version 2.0 is `"HPS_v2_compressed.pt"`.
        tokenizer (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or local folder of the tokenizer.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32 without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights move to the CPU between generation batches.

    Raises:
        [`~trl_marble.extras.MissingExtraError`]: If `ftfy` is not installed.
        `ValueError`: At the first image, if the checkpoint is not that of an open_clip CLIP.
    """

    value_range = "-1 to 1, in practice about 0.2 to 0.35"

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        filename: str = "HPS_v2.1_compressed.pt",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size, dtype, offload)
        self.clean = text_cleaner()
        self.model_id = model
        self.filename = filename
        self.tokenizer_id = tokenizer

    def load(self) -> CLIPModel:
        self.tokenizer = CLIPTokenizer.from_pretrained(self.tokenizer_id)
        path = weights_file(self.model_id, self.filename)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        try:
            model: Any = clip_from_open_clip(checkpoint["state_dict"], self.tokenizer.eos_token_id)
        except KeyError as error:
            raise ValueError(
                f"`{self.filename}` of {self.model_id} is not a checkpoint of HPSv2: it has no {error}."
            ) from error
        self.image_size = model.config.vision_config.image_size
        return model

    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        pixels = torch.stack([letterbox(image, self.image_size) for image in images])
        image = image_features(self.model, pixels)
        text = text_features(self.model, self.tokenizer, [self.clean(prompt) for prompt in prompts])
        return (image * text).sum(dim=-1).tolist()


def letterbox(image: Image.Image, size: int) -> Tensor:
    """
    Prepare an image as HPSv2 does: resize it to fit into a square, add black bars, and normalize.

    Unlike CLIP's own preprocessing, the original resizes values in [0, 1] and not bytes, so that bicubic overshoot is
    neither rounded nor clipped. The original fails on images whose longer side alone is `size`, and on very thin ones;
    here they are treated like all others.

    Args:
        image (`PIL.Image.Image`):
            An RGB image of any size.
        size (`int`):
            Width and height of the result.

    Returns:
        `Tensor` of shape `[3, size, size]`, float32.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        pixels = interpolate(pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    pixels = pad(pixels, (left, size - width - left, top, size - height - top))
    return normalize_pixels(pixels)


def clip_from_open_clip(state: dict[str, Tensor], eos_token_id: int) -> CLIPModel:
    """
    Convert the weights of an open_clip ViT to a model of `transformers`.

    Args:
        state (`dict[str, Tensor]`):
            State dict of an `open_clip.CLIP` with a vision transformer, GELU (not quick GELU) and the head widths of
            ViT-H-14.
        eos_token_id (`int`):
            The token whose features are those of the text. open_clip uses the token with the highest number.

    Raises:
        `KeyError`: If a weight is missing whose shape gives a size of the model.
        `ValueError`: If another weight is missing, or there are unknown ones.
    """
    grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
    image_width, _, patch_size, _ = state["visual.conv1.weight"].shape
    vocab_size, text_width = state["token_embedding.weight"].shape
    alike = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    config = CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        text_config=alike
        | {
            "vocab_size": vocab_size,
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _blocks(state, "transformer.resblocks."),
            "num_attention_heads": text_width // TEXT_HEAD_WIDTH,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": None,
        },
        vision_config=alike
        | {
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "hidden_size": image_width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _blocks(state, "visual.transformer.resblocks."),
            "num_attention_heads": image_width // IMAGE_HEAD_WIDTH,
        },
    )
    # With a state dict, `from_pretrained` skips the random initialization, which would take a minute for ViT-H.
    loaded: Any = CLIPModel.from_pretrained(None, config=config, state_dict=_renamed(state), output_loading_info=True)
    model, info = loaded
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"These are not the weights of an open_clip CLIP: missing {sorted(info['missing_keys'])}, "
            f"unknown {sorted(info['unexpected_keys'])}. Pass `model` and `filename` of one."
        )
    return model


def _blocks(state: dict[str, Tensor], prefix: str) -> int:
    """Number of transformer blocks."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and split the weights as a CLIPModel has them."""
    weights = {}
    for name, tensor in state.items():
        transposed = name in ("text_projection", "visual.proj")  # matrices in open_clip, linear layers in CLIPModel
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if ".in_proj_" in name:  # queries, keys and values are one matrix in open_clip
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            weights[name] = tensor.T if transposed else tensor
    return weights
