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

On the scorers' machine (the server accepts connections from this machine only; use an SSH tunnel):

```bash
python -m trl_marble.rewards.server --rewards pickscore imagereward --device cuda --port 8100
vllm serve CodeGoat24/UnifiedReward-qwen-7b --port 8000
```

On the trainer's machine:

```bash
accelerate launch --num_processes 8 examples/scripts/flux_remote_rewards.py \\
    --output_dir flux-marble \\
    --model_name_or_path black-forest-labs/FLUX.1-dev \\
    --dtype bfloat16 \\
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

The options of the model are those of TRL's scripts. Without `--use_peft` the adapter is the paper's; with it,
`--lora_r` and the like say what it is. `--load_in_4bit` stores the transformer in 4 bits.
"""

from dataclasses import dataclass, field

import torch
from diffusers import FluxPipeline, PipelineQuantizationConfig
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.data import load_prompts, mix_prompts, ocr_prompts
from trl_marble.rewards import OCRAccuracy, RemoteReward, VLMJudge


@dataclass
class ScriptArguments:
    """
    Where the prompts and the rewards are.

    Args:
        prompts (`str`):
            General prompts: a file or a Hub dataset, see `load_prompts`.
        reward_server (`str`, *optional*, defaults to `"http://127.0.0.1:8100"`):
            Address of the reward server.
        judge (`str`, *optional*, defaults to `"http://127.0.0.1:8000/v1"`):
            Address of the judge's endpoint.
        judge_model (`str`, *optional*, defaults to `"CodeGoat24/UnifiedReward-qwen-7b"`):
            The judge's model.
    """

    prompts: str = field(metadata={"help": "General prompts: a file or a Hub dataset."})
    reward_server: str = field(default="http://127.0.0.1:8100", metadata={"help": "Address of the reward server."})
    judge: str = field(default="http://127.0.0.1:8000/v1", metadata={"help": "Address of the judge's endpoint."})
    judge_model: str = field(default="CodeGoat24/UnifiedReward-qwen-7b", metadata={"help": "The judge's model."})


def main(script_args: ScriptArguments, training_args: MarbleConfig, model_args: ModelConfig) -> None:
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

    # ---- Training: the attention layers of both streams, if `--lora_target_modules` does not say otherwise ----
    quantization = get_quantization_config(model_args)
    pipeline = FluxPipeline.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=getattr(torch, model_args.dtype),
        quantization_config=quantization and PipelineQuantizationConfig(quant_mapping={"transformer": quantization}),
        use_safetensors=True,
    )
    if model_args.attn_implementation is not None:
        pipeline.transformer.set_attention_backend(model_args.attn_implementation)
    trainer = MarbleNFTTrainer(
        pipeline,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=prompts,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()

    # ---- Adapter and card ----
    trainer.save_model()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, MarbleConfig, ModelConfig)).parse_args_and_config())
