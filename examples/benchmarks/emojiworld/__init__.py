# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""EmojiWorld: a second small world for benchmarks, with pictures that people drew and rewards that were learned."""

import hashlib
from pathlib import Path

import torch

from trl_marble.shapeworld import ShapeWorldPipeline

from .captions import load_prompts
from .networks import NETWORKS_FOLDER
from .rewards import heldout_funcs, reward_funcs


PIPELINE_FOLDER = Path(__file__).parent / "emojiworld-sd3"


def load_pipeline(folder: Path = PIPELINE_FOLDER) -> ShapeWorldPipeline:
    """
    Load the pretrained EmojiWorld pipeline, in fp32 on the CPU.

    It has the parts and the sizes of ShapeWorld's, and is sampled like it: without guidance (`guidance_scale=1`), in 8
    to 10 steps.

    Args:
        folder (`Path`, *optional*, defaults to the folder beside this file): The pipeline in diffusers' layout.

    Returns:
        [`~trl_marble.shapeworld.ShapeWorldPipeline`], a [`StableDiffusion3Pipeline`]

    Raises:
        `FileNotFoundError`: If the folder is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist. Train the pipeline with `python examples/scripts/pretrain_emojiworld.py`, and "
            "copy the folder `pipeline` of its output there."
        )
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None}
    return ShapeWorldPipeline.from_pretrained(folder, dtype=torch.float32, **without_t5)


def fingerprint() -> str:
    """SHA-256 of all weights, of the pipeline and of the networks: what is measured belongs to them."""
    digest = hashlib.sha256()
    for file in sorted([*PIPELINE_FOLDER.rglob("*.safetensors"), *NETWORKS_FOLDER.glob("*.safetensors")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


__all__ = ["PIPELINE_FOLDER", "fingerprint", "heldout_funcs", "load_pipeline", "load_prompts", "reward_funcs"]
