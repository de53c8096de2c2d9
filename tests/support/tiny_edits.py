# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Tiny random pipelines that edit an image, as those of tiny_families.py: the same seed gives the same weights.

Importing this module makes Flux Kontext and Qwen-Image-Edit scale their images to an area of 64 x 64 px, in place of a
million pixels.
"""

import io
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import (
    BriaFiboEditPipeline,
    FluxKontextPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from tiny import tiny_flux
from tiny_families import (
    TINY,
    _chat_tokenizer,
    _qwen25_vl,
    _qwen_image_denoiser,
    _qwen_image_vae,
    tiny_bria_fibo,
)
from transformers import Qwen2Tokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


# As TEMPLATE_WORDS of tiny_families.py: these pipelines drop the first 64 tokens by number.
EDIT_WORDS = re.findall(
    r" \(|\),|'s| ?\w+",
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate. Picture 1",
)


def _small_dimensions(target_area: float, ratio: float) -> tuple[Any, ...]:
    """As the pipelines have it, with another area; the one for edits of several images returns a pair."""
    return _dimensions(64 * 64, ratio)


_dimensions = pipeline_qwenimage_edit.calculate_dimensions
pipeline_qwenimage_edit.calculate_dimensions = _small_dimensions
pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: _small_dimensions(area, ratio)[:2]
pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS = [(64, 64), (80, 48), (48, 80)]


def edit_image(colours: str, width: int = 64, height: int = 64) -> Image.Image:
    """Stripes of the named colours, from left to right."""
    image = Image.new("RGB", (len(colours.split()), 1))
    for column, colour in enumerate(colours.split()):
        image.paste(colour, (column, 0, column + 1, 1))
    return image.resize((width, height), Image.Resampling.NEAREST)


def edit_set_of_all_modes() -> Dataset:
    """`edit_set` with images of other modes and bit depths, as they come out of files."""
    rows = edit_set()
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    images = [
        row["image"].convert(mode) for row, mode in zip(rows, ["L", "P", "RGBA", "CMYK", "1", "RGB"], strict=True)
    ]
    images[2].putalpha(100)
    images[5] = deep
    return rows.remove_columns("image").add_column(
        "image", [_in_file(image) for image in images], feature=ImageFeature()
    )


def _in_file(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, format="TIFF")
    return {"bytes": file.getvalue(), "path": None}


def edit_instruction(text: str) -> str:
    """The prompt of Bria FIBO Edit: an object of JSON."""
    return json.dumps({"edit_instruction": text})


def edit_set(in_json: bool = False) -> Dataset:
    """Six rows of an instruction and an image; of the last two, one has the text and one the image of the first."""
    prompts = ["make it a red dog", "a cat", "add a hat", "in the sky", "make it a red dog", "bigger"]
    colours = ["red", "blue yellow", "white black", "green", "black", "red"]
    return Dataset.from_dict(
        {
            "prompt": [edit_instruction(prompt) for prompt in prompts] if in_json else prompts,
            "image": [edit_image(names) for names in colours],
            "tag": list("abcdef"),
        },
        features=Features({"prompt": Value("string"), "image": ImageFeature(), "tag": Value("string")}),
    )


def tiny_flux_kontext(seed: int = 0) -> FluxKontextPipeline:
    """Flux Kontext: the image's tokens follow those of the latents, with another number in their position."""
    return FluxKontextPipeline(**tiny_flux(seed=seed).components)


def tiny_qwen_image_edit(seed: int = 0) -> QwenImageEditPipeline:
    """Qwen-Image-Edit: the image goes to the text encoder, which sees it, and to the transformer."""
    return QwenImageEditPipeline(**_qwen_edit_parts(seed))


def tiny_qwen_image_edit_plus(seed: int = 0) -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit-Plus: as before, with a smaller copy of the image for the text encoder."""
    return QwenImageEditPlusPipeline(**_qwen_edit_parts(seed))


def tiny_bria_fibo_edit(seed: int = 0) -> BriaFiboEditPipeline:
    """Bria FIBO Edit: as Bria FIBO, with prompts of JSON."""
    return BriaFiboEditPipeline(**tiny_bria_fibo(seed=seed).components)


def _qwen_edit_parts(seed: int) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _vision_tokenizer()
        text_encoder = _qwen25_vl()
        text_encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        text_encoder.config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
        text_encoder.config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
        return dict(
            **_qwen_image_denoiser(),
            vae=_qwen_image_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            processor=ImageTextProcessor(
                Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}), tokenizer
            ),
        )


class ImageTextProcessor(Qwen2VLProcessor):
    """Without the processor of videos, whose class needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def _vision_tokenizer() -> Qwen2Tokenizer:
    tokenizer = _chat_tokenizer()
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *vision]})
    tokenizer.add_tokens(sorted(set(EDIT_WORDS)))
    return tokenizer


# How each is asked for its smallest image, as TINY of tiny_families.py, beside an image to be edited.
TINY_EDITS: dict[str, tuple[Callable[..., DiffusionPipeline], dict[str, Any]]] = {
    "FluxKontextPipeline": (
        tiny_flux_kontext,
        dict(height=16, width=16, max_area=16 * 16, max_sequence_length=24, guidance_scale=3.5),
    ),
    "Flux2Pipeline": TINY["Flux2Pipeline"],
    "Flux2KleinPipeline": TINY["Flux2KleinPipeline"],
    "QwenImageEditPipeline": (tiny_qwen_image_edit, dict(height=16, width=16, true_cfg_scale=1.0)),
    "QwenImageEditPlusPipeline": (tiny_qwen_image_edit_plus, dict(height=16, width=16, true_cfg_scale=1.0)),
    "BriaFiboEditPipeline": (
        tiny_bria_fibo_edit,
        dict(height=64, width=64, max_sequence_length=64, guidance_scale=1.0),
    ),
}
