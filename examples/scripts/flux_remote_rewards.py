# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# requires-python = ">=3.11"
# dependencies = ["trl_marble[ocr,plots]"]
#
# [tool.uv.sources]
# trl_marble = { path = "../.." }  # `uv run` from a clone: the package is not on PyPI yet
# ///
"""
Flux.1 with rewards that run elsewhere: scorers behind a reward server, a vision-language judge behind an
OpenAI-compatible endpoint, and the reader of written text on the trainer's own CPU.

On the machine of the scorers (the server listens on it alone; reach it through an SSH tunnel):

```bash
python -m trl_marble.rewards.server --rewards pickscore imagereward --device cuda --port 8100
vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8000
```

On the trainer's:

```bash
accelerate launch --num_processes 8 examples/scripts/flux_remote_rewards.py \\
    --output_dir flux-marble \\
    --prompts prompts.txt \\
    --height 512 \\
    --width 512 \\
    --guidance_scale 3.5 \\
    --bf16 \\
    --activation_checkpointing \\
    --gradient_accumulation_steps 18 \\
    --reward_timeout 600 \\
    --max_steps 500
```
"""

from dataclasses import dataclass, field

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from trl import TrlParser

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.data import load_prompts, mix_prompts, ocr_prompts
from trl_marble.rewards import OCRAccuracy, RemoteReward, VLMJudge


@dataclass
class ScriptArguments:
    """
    Where the model, the prompts and the rewards are.

    Args:
        prompts (`str`):
            General prompts: a file or a Hub dataset, see `load_prompts`.
        model (`str`, *optional*, defaults to `"black-forest-labs/FLUX.1-dev"`):
            The pipeline: a Hub id or a local folder.
        reward_server (`str`, *optional*, defaults to `"http://127.0.0.1:8100"`):
            Address of the reward server.
        judge (`str`, *optional*, defaults to `"http://127.0.0.1:8000/v1"`):
            Address of the judge's endpoint.
        judge_model (`str`, *optional*, defaults to `"CodeGoat24/UnifiedReward-qwen-7b"`):
            The judge's model.
        lora_rank (`int`, *optional*, defaults to `32`):
            Rank of the adapter.
    """

    prompts: str = field(metadata={"help": "General prompts: a file or a Hub dataset."})
    model: str = field(default="black-forest-labs/FLUX.1-dev", metadata={"help": "Hub id or folder of the pipeline."})
    reward_server: str = field(default="http://127.0.0.1:8100", metadata={"help": "Address of the reward server."})
    judge: str = field(default="http://127.0.0.1:8000/v1", metadata={"help": "Address of the judge's endpoint."})
    judge_model: str = field(default="CodeGoat24/UnifiedReward-qwen-7b", metadata={"help": "The judge's model."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter."})


def main(script_args: ScriptArguments, training_args: MarbleConfig) -> None:
    # ---- Prompts: general ones, and others that ask for written text ----
    prompts = mix_prompts(
        {"general": load_prompts(script_args.prompts), "ocr": ocr_prompts(2000, seed=training_args.seed)}
    )

    # ---- Rewards: two on the server, a judge, and the reader here ----
    rewards = [
        RemoteReward(script_args.reward_server, "PickScore"),
        RemoteReward(script_args.reward_server, "ImageReward"),
        VLMJudge(script_args.judge_model, script_args.judge),
        OCRAccuracy(),
    ]

    # ---- Training: the attention layers of both streams ----
    pipeline = FluxPipeline.from_pretrained(
        script_args.model, dtype=torch.bfloat16 if training_args.bf16 else torch.float32, use_safetensors=True
    )
    trainer = MarbleNFTTrainer(
        pipeline,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=prompts,
        peft_config=LoraConfig(
            r=script_args.lora_rank,
            lora_alpha=2 * script_args.lora_rank,
            init_lora_weights="gaussian",
            target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"],
        ),
    )
    trainer.train()

    # ---- Adapter and card ----
    trainer.save_model()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, MarbleConfig)).parse_args_and_config())
