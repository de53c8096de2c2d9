# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble[clip,ocr,plots]"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""
Align Stable Diffusion 3.5 Medium with five rewards at once, as MARBLE does (huggingface.co/papers/2605.06507):
PickScore, HPSv2.1 and CLIPScore on every prompt, the accuracy of written text and GenEval on their own prompts.

With the paper's settings: the defaults of `MarbleConfig`, except for the five before `--max_steps`
(`--gradient_accumulation_steps` is the default 144 divided by the number of processes). For more than some tens of
steps leave `--beta` out: with the paper's, policies drift until rewards are lost.

```bash
accelerate launch --num_processes 8 examples/scripts/sd3_five_rewards.py \\
    --output_dir sd3.5m-marble \\
    --height 512 \\
    --width 512 \\
    --bf16 \\
    --gradient_accumulation_steps 18 \\
    --balance_every 10 \\
    --balance_on loss \\
    --beta 1e-4 \\
    --regularizer_fraction 1.0 \\
    --old_policy_preset 1 \\
    --max_steps 1000 \\
    --push_to_hub
```

For one GPU with 24 or 80 GB of memory, and for eight, `examples/configs` has recipes that say what they cost, for
`trl-marble train`.
"""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusion3Pipeline
from trl import TrlParser

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.data import compositional_prompts, load_prompts, mix_prompts, ocr_prompts
from trl_marble.rewards import CLIPScore, GenEval, HPSv2, OCRAccuracy, PickScore


@dataclass
class ScriptArguments:
    """
    What to train on.

    Args:
        model (`str`, *optional*, defaults to `"stabilityai/stable-diffusion-3.5-medium"`):
            The pipeline: a Hub id or a local folder.
        general_prompts (`str`, *optional*, defaults to `"Gustavosta/Stable-Diffusion-Prompts"`):
            General prompts: a Hub dataset or a local file, see `load_prompts`.
        prompt_column (`str`, *optional*, defaults to `"Prompt"`):
            The column of `general_prompts` with the prompts.
        num_generated_prompts (`int`, *optional*, defaults to `4000`):
            Number of generated prompts that ask for written text, and of generated compositional ones.
        offload_rewards (`bool`, *optional*, defaults to `False`):
            Whether the scorers leave the GPU during updates.
        use_t5 (`bool`, *optional*, defaults to `True`):
            Whether T5 encodes the prompts too, which needs 9 GB in bf16. If `False`, also use the adapter without T5.
    """

    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "Hub id or folder of the pipeline."}
    )
    general_prompts: str = field(
        default="Gustavosta/Stable-Diffusion-Prompts", metadata={"help": "Hub dataset or file of general prompts."}
    )
    prompt_column: str = field(default="Prompt", metadata={"help": "The column with the general prompts."})
    num_generated_prompts: int = field(default=4000, metadata={"help": "Generated prompts of each kind."})
    offload_rewards: bool = field(default=False, metadata={"help": "Keep the scorers off the GPU during updates."})
    use_t5: bool = field(default=True, metadata={"help": "Encode prompts with T5 too."})


def main(script_args: ScriptArguments, training_args: MarbleConfig) -> None:
    # ---- Prompts: three sources, mixed in every step ----
    number = script_args.num_generated_prompts
    prompts = mix_prompts(
        {
            "general": load_prompts(script_args.general_prompts, column=script_args.prompt_column),
            "ocr": ocr_prompts(number, seed=training_args.seed),
            "geneval": compositional_prompts(number, seed=training_args.seed),
        }
    )

    # ---- Rewards: the last two apply to prompts of their own source only ----
    offload = script_args.offload_rewards
    rewards = [
        PickScore(offload=offload),
        HPSv2(offload=offload),
        CLIPScore(offload=offload),
        OCRAccuracy(),
        GenEval(offload=offload),
    ]

    # ---- Training: the base in bf16 with --bf16, the adapter always in fp32 ----
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        script_args.model,
        dtype=torch.bfloat16 if training_args.bf16 else torch.float32,
        use_safetensors=True,
        **({} if script_args.use_t5 else {"text_encoder_3": None, "tokenizer_3": None}),
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
