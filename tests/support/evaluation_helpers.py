# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The smallest real evaluations: four prompts, rewards of a few pixels, a tiny SD3 pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from trl_marble.evaluation import EvaluationConfig, EvaluationResults
from trl_marble.hub import save_adapter
from trl_marble.pipelines import add_trainable_adapter
from trl_marble.rewards import SetReward


def bright(images: list[Image.Image], **kwargs: Any) -> list[float]:
    """Mean of all channels, in [0, 1]."""
    return [float(np.asarray(image).mean()) / 255 for image in images]


def red_only(images: list[Image.Image], prompts: list[str], **kwargs: Any) -> list[float | None]:
    """Mean of the red channel, for prompts that ask for it."""
    red = [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]
    return [value if "red" in prompt else None for value, prompt in zip(red, prompts, strict=True)]


def rank_in_prompt(images: list[Image.Image], groups: list[int], **kwargs: Any) -> list[int]:
    """How many images of the same prompt are darker."""
    own = list(zip(bright(images), groups, strict=True))
    return [sum(other < value for other, its in own if its == group) for value, group in own]


rank_in_prompt.scope = "group"  # type: ignore[attr-defined]


class Unusual(SetReward):
    """How far the brightness of an image is from the mean over all images."""

    def features(self, images: list[Image.Image], prompts: list[str], **columns: Any) -> Tensor:
        return torch.tensor(bright(images))[:, None]

    def credit(self, features: Tensor, groups: Tensor) -> Tensor:
        return (features - features.mean(dim=0)).abs().squeeze(1)


def prompt_set() -> Dataset:
    """Four prompts of two sources, one of them without a tag."""
    return Dataset.from_dict(
        {
            "prompt": ["a red dog", "a cat", "red hat", "tree"],
            "source": ["x", "x", "y", "y"],
            "tag": ["colors", "counting", "colors", None],
        }
    )


def small_evaluation(output_dir: str | Path, **overrides: Any) -> EvaluationConfig:
    """Three images a prompt in batches of five, so that batches end within a prompt."""
    settings: dict[str, Any] = {"num_generations": 3, "num_inference_steps": 2, "batch_size": 5}
    return EvaluationConfig(str(output_dir), **(settings | {"max_sequence_length": 16} | overrides))


def random_adapter(pipeline: Any, folder: Path, seed: int = 0, attention: str = "attn") -> Path:
    """Give a pipeline a LoRA that changes its images, and publish it."""
    targets = [f"{attention}.{layer}" for layer in ("to_q", "to_v", "to_out.0")]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    generator = torch.Generator().manual_seed(seed)
    for _, weight in add_trainable_adapter(pipeline, config):
        weight.data = torch.randn(weight.shape, generator=generator)
    return save_adapter(pipeline, folder)


def made_results(folder: Path, rewards: dict[str, list[float]], /, **changes: Any) -> EvaluationResults:
    """Results of two white images a prompt; a change is one of the settings, or a column of the table."""
    num_generations = 2
    names, count = list(rewards), len(next(iter(rewards.values())))
    rows = np.arange(count) // num_generations
    table = pd.DataFrame(
        {
            "index": range(count),
            "prompt_index": rows,
            "generation": np.arange(count) % num_generations,
            "seed": np.arange(count) + 2**52,
            "prompt": pd.Series([f"prompt {row}" for row in rows], dtype="object"),
            "image": pd.Series([f"images/{index}.png" for index in range(count)], dtype="object"),
        }
        | {name: np.array(values, dtype=float) for name, values in rewards.items()}
    )
    settings = {
        "pipeline": "me/base",
        "pipeline_class": "StableDiffusion3Pipeline",
        "adapter": None,
        "rewards": names,
        "num_prompts": int(rows[-1]) + 1,
        "num_generations": num_generations,
        "seed": 0,
    }
    for name, value in changes.items():
        if name in settings:
            settings[name] = value
        else:
            table[name] = pd.Series(value, dtype="object")
    (folder / "images").mkdir(parents=True)
    for file in table["image"]:
        Image.new("RGB", (16, 16), "white").save(folder / file)
    diversity = [0.25] * table["prompt"].nunique()
    return EvaluationResults(folder, settings, names, table, dict.fromkeys(names, 0), diversity)
