# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The pretrained pipeline of this package."""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline


PIPELINE_FOLDER = Path(__file__).parent / "shapeworld-sd3"


class ShapeWorldPipeline(StableDiffusion3Pipeline):
    """
    [`StableDiffusion3Pipeline`] without the empty tokens of a missing T5.

    If a pipeline has no T5, diffusers appends `max_sequence_length` (256 by default) all-zero tokens to the 12 tokens
    of the prompt. They have no content and make every step ten times slower, so this class leaves them out.

    The folder also works in a plain [`StableDiffusion3Pipeline`], since the weights were trained with and without
    these tokens. (It has a tiny T5 that outputs zeros, because diffusers loads no Stable Diffusion 3 without one.)
    With `text_encoder_3=None` and `max_sequence_length=0` a plain pipeline makes exactly the pictures of this class.
    """

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 256,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        return super()._get_t5_prompt_embeds(prompt, num_images_per_prompt, 0, device, dtype)  # type: ignore[misc]


def load_pipeline() -> ShapeWorldPipeline:
    """
    Load the pretrained ShapeWorld pipeline, in fp32 on the CPU.

    A very small Stable Diffusion 3: 64-pixel pictures, 5 M parameters, a vocabulary of the words in ShapeWorld's
    captions (other text is encoded byte by byte). Trained by `examples/scripts/pretrain_shapeworld.py`; sample it
    without guidance (`guidance_scale=1`) in 8 to 10 steps. It is made for quick experiments.

    Returns:
        [`ShapeWorldPipeline`], a [`StableDiffusion3Pipeline`]
    """
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    return ShapeWorldPipeline.from_pretrained(PIPELINE_FOLDER, dtype=torch.float32, **without_t5)
