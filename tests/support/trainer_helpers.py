# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The smallest real runs: prompts, rewards of a few pixels, and a trainer on a tiny SD3 pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from tiny import tiny_sd3

from trl_marble import MarbleConfig, MarbleNFTTrainer


PROMPTS = ["a red dog", "a cat", "red hat", "tree", "big red", "sky"]


def bright(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """Mean of all channels, in [0, 1]."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def blue(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """Mean of the blue channel, in [0, 1]."""
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


def prompt_set() -> Dataset:
    """Six prompts and a column `tag` for the rewards."""
    return Dataset.from_dict({"prompt": PROMPTS, "tag": list("abcdef")})


def small_config(output_dir: str | Path, **overrides: Any) -> MarbleConfig:
    """Two prompts x two images an optimizer step, two solver steps, no files but what the test asks for."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "num_inference_steps": 2,
        "max_steps": 2,
        "balance_every": 2,
        "max_sequence_length": 16,
        "save_strategy": "no",
        "log_images": False,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    if overrides.get("multi_objective_aggregation") in ("sum_then_normalize", "normalize_then_sum", "progress"):
        del settings["balance_every"]  # nothing is balanced then
    return MarbleConfig(str(output_dir), **(settings | overrides))


def small_trainer(
    output_dir: str | Path,
    reward_funcs: Any = (bright, blue),
    pipeline: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    eval_reward_funcs: Any = None,
    callbacks: Any = None,
    weighting: Any = None,
    teachers: Any = None,
    **overrides: Any,
) -> MarbleNFTTrainer:
    """A trainer on a tiny SD3 pipeline; keywords go to [`small_config`]."""
    return MarbleNFTTrainer(
        tiny_sd3(num_layers=1) if pipeline is None else pipeline,
        reward_funcs=list(reward_funcs) if isinstance(reward_funcs, tuple) else reward_funcs,
        args=small_config(output_dir, **overrides),
        train_dataset=prompt_set() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        eval_reward_funcs=eval_reward_funcs,
        callbacks=callbacks,
        weighting=weighting,
        teachers=teachers,
    )
