# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""ShapeWorld: a pretrained text-to-image pipeline with prompts and rewards, small enough for a laptop."""

from .drawing import PALETTE, SHAPES, SIZE
from .pretrained import PIPELINE_FOLDER, ShapeWorldPipeline, load_pipeline
from .prompts import Caption, all_captions, load_prompts, split_captions
from .rewards import reward_funcs
from .world import draw_picture, generate


__all__ = [
    "PALETTE",
    "PIPELINE_FOLDER",
    "SHAPES",
    "SIZE",
    "Caption",
    "ShapeWorldPipeline",
    "all_captions",
    "draw_picture",
    "generate",
    "load_pipeline",
    "load_prompts",
    "reward_funcs",
    "split_captions",
]
