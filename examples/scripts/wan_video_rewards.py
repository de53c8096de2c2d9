# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble[clip,plots]"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""
Align Wan 2.1, a text-to-video model, with four rewards at once: PickScore and HPSv2.1 on frames of each video, and two
rewards of the complete video that conflict: motion, and smoothness (no flicker).

Settings to start from for eight GPUs with 80 GB, 16 prompts x 8 videos of two seconds per step:

```bash
accelerate launch --num_processes 8 examples/scripts/wan_video_rewards.py \\
    --output_dir wan2.1-marble \\
    --prompts prompts.txt \\
    --height 480 \\
    --width 832 \\
    --num_frames 33 \\
    --num_generations 8 \\
    --num_inference_steps 20 \\
    --timestep_fraction 0.25 \\
    --rollout_batch_size 1 \\
    --per_device_train_batch_size 1 \\
    --per_device_eval_batch_size 1 \\
    --gradient_accumulation_steps 16 \\
    --activation_checkpointing \\
    --bf16 \\
    --max_steps 300
```

Wan makes 4k + 1 frames, and its 1.3B model was trained for videos of 832 x 480.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor
from trl import TrlParser

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.data import load_prompts
from trl_marble.rewards import FrameReward, HPSv2, PickScore


@dataclass
class ScriptArguments:
    """
    Where the model and the prompts are, and how many frames are scored.

    Args:
        prompts (`str`):
            The prompts: a file or a Hub dataset, see `load_prompts`.
        model (`str`, *optional*, defaults to `"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"`):
            The pipeline: a Hub id or a local folder.
        num_scored_frames (`int`, *optional*, defaults to `4`):
            How many frames of each video PickScore and HPSv2 see.
    """

    prompts: str = field(metadata={"help": "The prompts: a file or a Hub dataset."})
    model: str = field(
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", metadata={"help": "Hub id or folder of the pipeline."}
    )
    num_scored_frames: int = field(default=4, metadata={"help": "Frames of each video that PickScore and HPSv2 see."})


def motion(videos: Tensor, **kwargs: Any) -> list[float]:
    """Mean absolute difference between consecutive frames, from 0 to 1. Alone, it would reward flicker."""
    return videos.diff(dim=1).abs().flatten(1).mean(dim=1).tolist()


def smoothness(videos: Tensor, **kwargs: Any) -> list[float]:
    """Minus the mean absolute second difference, from -2 to 0: even movement. Alone, it would stop all movement."""
    return (-videos.diff(n=2, dim=1).abs().flatten(1).mean(dim=1)).tolist()


# Both get the videos as one tensor [B, F, 3, H, W] in [0, 1] instead of lists of PIL frames.
motion.image_type = smoothness.image_type = "pt"


def main(script_args: ScriptArguments, training_args: MarbleConfig) -> None:
    # ---- Prompts ----
    prompts = load_prompts(script_args.prompts)

    # ---- Rewards: two of images on frames of each video, and two of the complete video ----
    rewards = [
        FrameReward(PickScore(), script_args.num_scored_frames),
        FrameReward(HPSv2(), script_args.num_scored_frames),
        motion,
        smoothness,
    ]

    # ---- Training: the base in bf16 with --bf16; the VAE in fp32, as its authors use it; the adapter in fp32 ----
    pipeline = WanPipeline.from_pretrained(
        script_args.model,
        vae=AutoencoderKLWan.from_pretrained(
            script_args.model, subfolder="vae", dtype=torch.float32, use_safetensors=True
        ),
        dtype=torch.bfloat16 if training_args.bf16 else torch.float32,
        use_safetensors=True,
    )
    trainer = MarbleNFTTrainer(
        pipeline,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=prompts,
    )
    trainer.train()

    # ---- Adapter and card ----
    trainer.save_model()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, MarbleConfig)).parse_args_and_config())
