# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Adapters that do something, and the images by which they are told apart."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
FILE = "pytorch_lora_weights.safetensors"


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: DiffusionPipeline) -> np.ndarray:
    """Two images from fixed seeds, as floats in [0, 1] of shape (2, height, width, 3)."""
    return pipeline(
        ["two red circles", "a blue square"],
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        output_type="np",
    ).images


def add_trained_adapter(
    pipeline: DiffusionPipeline, name: str = "default", seed: int = 0, std: float = 0.3, **changes: Any
) -> None:
    """Give the transformer an adapter that does something, with alpha far from r."""
    settings = {"r": 4, "lora_alpha": 12, "init_lora_weights": "gaussian", "target_modules": TARGETS} | changes
    pipeline.transformer.add_adapter(LoraConfig(**settings), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in pipeline.transformer.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = std * torch.randn(parameter.shape, generator=generator)
