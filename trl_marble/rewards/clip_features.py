# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Shared by rewards built on CLIP: features of unit length, preparation of texts and images, files of weights."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..extras import require_extra


def image_features(clip: Any, pixels: Tensor) -> Tensor:
    """
    Projected features of images.

    Args:
        clip ([`~transformers.CLIPModel`]):
            The model.
        pixels (`Tensor` of shape `[B, 3, H, W]`):
            Normalized images of the model's size, on any device.

    Returns:
        `Tensor` of shape `[B, D]`, float32: vectors of length 1 on the model's device.
    """
    pooled = clip.vision_model(pixel_values=pixels.to(clip.device, clip.dtype)).pooler_output
    return normalize(clip.visual_projection(pooled).float(), dim=-1)


def text_features(clip: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """
    Projected features of texts. A text that is too long for the model is cut at its end.

    Args:
        clip ([`~transformers.CLIPModel`]):
            The model.
        tokenizer ([`~transformers.CLIPTokenizer`]):
            Its tokenizer.
        texts (`list[str]`):
            The texts.

    Returns:
        `Tensor` of shape `[B, D]`, float32: vectors of length 1 on the model's device.
    """
    different = list(dict.fromkeys(texts))  # the images of a group have the same prompt: encode it once
    tokens = tokenizer(
        different,
        padding="max_length",  # not to the longest text, so that a value does not depend on the rest of its batch
        truncation=True,
        max_length=clip.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    # Without a mask: each token attends to those before it only, and the features are those of the first end token.
    pooled = clip.text_model(input_ids=tokens.input_ids.to(clip.device)).pooler_output
    features = normalize(clip.text_projection(pooled).float(), dim=-1)
    return features[[different.index(text) for text in texts]]


def text_cleaner() -> Callable[[str], str]:
    """
    The function that cleans texts in the tokenizers of OpenAI's CLIP and open_clip, but not in that of transformers.

    It repairs wrongly decoded text, replaces typographic quotes (`’` becomes `'`), resolves HTML entities and converts
    to lower case.

    Raises:
        [`~trl_marble.extras.MissingExtraError`]: If `ftfy` is not installed.
    """
    require_extra("clip", "A reward that cleans prompts as its original does (CLIPScore, HPSv2)")
    import ftfy

    def clean(text: str) -> str:
        # Twice, as in the originals: captions from the web contain "&amp;quot;".
        return html.unescape(html.unescape(ftfy.fix_text(text))).strip().lower()

    return clean


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """
    Resize and crop the middle of an image as OpenAI's CLIP does.

    The image processor of transformers resizes in the same way, but rounds the margins down, which is one pixel off
    for some shapes (such as 832 x 1216). It leaves images that were cropped here unchanged.

    Args:
        image (`PIL.Image.Image`):
            An RGB image of any size.
        size (`int`):
            Width and height of the result; the shorter side of `image` is resized to it.
    """
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def normalize_pixels(pixels: Tensor) -> Tensor:
    """
    Normalize an image by the mean and standard deviation of OpenAI's CLIP, which other models use too.

    Args:
        pixels (`Tensor` of shape `[3, H, W]`):
            RGB, float32, in [0, 1].
    """
    return (pixels - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def weights_file(model: str, filename: str) -> str:
    """
    The path of a file of a model, downloaded if it is on the Hub.

    Args:
        model (`str`):
            A local folder or the id of a model on the Hub.
        filename (`str`):
            Name of the file in it.
    """
    folder = Path(model)
    return str(folder / filename) if folder.is_dir() else hf_hub_download(model, filename)
