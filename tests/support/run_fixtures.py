# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A small run: six prompts, three rewards (one masked, one async), tiny SD3."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from trl_marble import MarbleConfig, MarbleNFTTrainer


OWN = {
    "pipeline",
    "reward_funcs",
    "train_dataset",
    "eval_dataset",
    "peft_config",
    "callbacks",
    "weighting",
    "optimizers",
    "eval_reward_funcs",
    "teachers",
}
PROMPTS = ["a red dog", "a cat", "red hat", "tree", "big red", "sky"]


def brightness(images, **kwargs):
    return [float(np.asarray(image).mean()) / 255 for image in images]


def redness(images, prompts, **kwargs):
    """Applies to prompts that ask for red only."""
    return [
        float(np.asarray(image)[..., 0].mean()) / 255 if "red" in prompt else None
        for image, prompt in zip(images, prompts, strict=True)
    ]


async def darkness(images, **kwargs):
    """At odds with `brightness`, but not its exact opposite."""
    return [1 - float((np.asarray(image) / 255.0).max(axis=-1).mean()) for image in images]


@pytest.fixture
def prompts():
    return Dataset.from_dict({"prompt": PROMPTS, "source": [f"list {i}" for i in range(len(PROMPTS))]})


@pytest.fixture
def rewards():
    return [brightness, redness, darkness]


@pytest.fixture
def make_trainer(tmp_path, tiny_sd3, prompts, rewards):
    """Factory of trainers: keywords of the trainer itself, the rest are settings."""

    def make(folder="run", **overrides):
        own = {name: overrides.pop(name) for name in OWN if name in overrides}
        settings = {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "num_inference_steps": 3,
            "timestep_fraction": 0.7,
            "max_steps": 2,
            "balance_every": 1,
            "max_sequence_length": 16,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "log_images": False,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = MarbleConfig(str(tmp_path / folder), **(settings | overrides))
        defaults = {"pipeline": tiny_sd3(), "reward_funcs": list(rewards), "train_dataset": prompts}
        return MarbleNFTTrainer(args=args, **(defaults | own))

    return make


@pytest.fixture
def pictures():
    """Images of many modes and sizes, one pixel and transparent ones among them."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return [
        noise.resize((48, 40)),
        Image.new("RGB", (1, 1), "red"),
        Image.new("RGBA", (20, 30), (0, 200, 0, 90)),
        noise.resize((64, 64)).convert("L"),
        noise.resize((9, 50)),
    ]
