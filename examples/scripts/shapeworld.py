# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble[plots]"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""
The script to copy: a reward of your own with others, two held-out rewards to detect reward hacking, a live table. It
runs on a laptop, with the tiny pretrained pipeline that comes with the package:

```bash
python examples/scripts/shapeworld.py \\
    --output_dir runs/shapeworld \\
    --learning_rate 1.2e-3 \\
    --num_generations 16 \\
    --per_device_train_batch_size 128 \\
    --gradient_accumulation_steps 1 \\
    --num_inference_steps 8 \\
    --timestep_fraction 0.75 \\
    --beta 0 \\
    --max_steps 12 \\
    --eval_strategy steps \\
    --eval_steps 4 \\
    --eval_on_start \\
    --per_device_eval_batch_size 64
```

On several devices, with settings in a file:

```bash
accelerate launch --num_processes 2 examples/scripts/shapeworld.py --config my_settings.yaml
```
"""

from dataclasses import dataclass, field

import numpy as np
from trl import TrlParser

from trl_marble import LiveTableCallback, MarbleConfig, MarbleNFTTrainer, RewardHackingCallback
from trl_marble.shapeworld import load_pipeline, load_prompts
from trl_marble.shapeworld.rewards import calm, centring, composition, coverage, reader


@dataclass
class ScriptArguments:
    """
    What the script does besides training.

    Args:
        num_eval_prompts (`int`, *optional*, defaults to `24`):
            Number of held-out prompts in an evaluation.
        stop_on_hacking (`bool`, *optional*, defaults to `False`):
            Whether training stops, instead of warning, when rewards rise while held-out rewards fall.
    """

    num_eval_prompts: int = field(default=24, metadata={"help": "Number of held-out prompts in an evaluation."})
    stop_on_hacking: bool = field(default=False, metadata={"help": "Stop, not only warn, on reward hacking."})


def warmth(images, **kwargs):
    """Red minus blue in an image, in [-1, 1]."""
    return [float((np.asarray(image)[..., 0].mean() - np.asarray(image)[..., 2].mean()) / 255) for image in images]


def main(script_args: ScriptArguments, training_args: MarbleConfig) -> None:
    # ---- Training: four rewards, two of them for some prompts only ----
    prompts = load_prompts("test").shuffle(seed=training_args.seed).select(range(script_args.num_eval_prompts))
    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=[composition, reader, coverage, warmth],
        eval_reward_funcs=[centring, calm],  # evaluated, never trained on
        args=training_args,
        train_dataset=load_prompts("train"),
        eval_dataset=prompts,
        callbacks=[
            LiveTableCallback(),
            RewardHackingCallback(action="stop" if script_args.stop_on_hacking else "warn"),
        ],
    )
    trainer.train()

    # ---- Adapter and card ----
    trainer.save_model()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, MarbleConfig)).parse_args_and_config())
