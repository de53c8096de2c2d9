# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""
MapReduce LoRA (https://huggingface.co/papers/2511.20629): train one adapter for each reward apart, merge them into the
base model, and repeat. Here on ShapeWorld's rewards, on a laptop; `--max_steps` are those of one adapter in one round:

```bash
python examples/scripts/mapreduce_lora.py \\
    --output_dir runs/mapreduce \\
    --rounds 3 \\
    --learning_rate 1.2e-3 \\
    --num_generations 16 \\
    --per_device_train_batch_size 128 \\
    --gradient_accumulation_steps 1 \\
    --num_inference_steps 8 \\
    --timestep_fraction 0.75 \\
    --max_steps 4
```

The result is a pipeline, `runs/mapreduce/pipeline`; `runs/mapreduce/round-<n>/merged` is what each round has added to
the base model's weights. The penalty of `--beta` is to the merged model that a round begins with.

On several devices:

```bash
accelerate launch --num_processes 2 examples/scripts/mapreduce_lora.py --config my_settings.yaml
```
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline
from trl import TrlParser

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.hub import combine_adapters, fuse_adapter
from trl_marble.rewards import RewardFunc
from trl_marble.shapeworld import load_pipeline, load_prompts, rewards


@dataclass
class ScriptArguments:
    """
    What the script does besides training.

    Args:
        reward_names (`list[str]`, *optional*):
            The rewards, of `trl_marble.shapeworld.rewards`. Defaults to all five.
        rounds (`int`, *optional*, defaults to `3`):
            How often adapters are trained and merged.
    """

    reward_names: list[str] = field(
        default_factory=lambda: ["composition", "reader", "coverage", "centring", "calm"],
        metadata={"help": "The rewards, each of which has an adapter of its own."},
    )
    rounds: int = field(default=3, metadata={"help": "How often adapters are trained and merged."})


# Rewards that apply to the prompts of one source only.
SOURCES = {"composition": "compositional", "reader": "glyph"}


def merged_pipeline(adapters: Sequence[Path]) -> DiffusionPipeline:
    """The base model with what earlier rounds have added to its weights."""
    pipeline: DiffusionPipeline = load_pipeline()
    for adapter in adapters:
        fuse_adapter(pipeline, adapter)
    return pipeline


def train_adapter(
    pipeline: DiffusionPipeline, reward: RewardFunc, prompts: Dataset, args: MarbleConfig, folder: Path
) -> Path:
    """Train an adapter on one reward."""
    args = copy.copy(args)
    args.output_dir = str(folder)
    trainer = MarbleNFTTrainer(pipeline, reward_funcs=reward, args=args, train_dataset=prompts)
    trainer.train()
    trainer.save_model()
    return folder


def main(script_args: ScriptArguments, training_args: MarbleConfig) -> None:
    process, output, prompts = PartialState(), Path(training_args.output_dir), load_prompts("train")
    merged: list[Path] = []
    for number in range(1, script_args.rounds + 1):
        folder = output / f"round-{number}"

        # ---- Map: one adapter for each reward ----
        adapters = []
        for name in script_args.reward_names:
            own = prompts
            if name in SOURCES:
                own = prompts.filter(lambda row, source=SOURCES[name]: row["source"] == source)
            reward = getattr(rewards, name)
            adapters.append(train_adapter(merged_pipeline(merged), reward, own, training_args, folder / name))

        # ---- Reduce: their mean goes into the base model ----
        process.wait_for_everyone()
        if process.is_main_process:
            # Exact, so that the rank of the mean is the sum of theirs.
            combine_adapters(dict.fromkeys(adapters, 1 / len(adapters)), folder / "merged")
        process.wait_for_everyone()
        merged.append(folder / "merged")

    if process.is_main_process:
        merged_pipeline(merged).save_pretrained(output / "pipeline")


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, MarbleConfig)).parse_args_and_config())
