# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The pipeline with its adapters, where and as it is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig
from torch import nn

from ...checkpoint.run_state import base_fingerprint
from ...evaluation.prompt_sets import evaluation_sets
from ...pipelines import (
    FlowPipeline,
    Teacher,
    add_trainable_adapter,
    load_teachers,
    lora_config,
    place_base,
    verify_acceleration,
)
from ...pipelines.embedding_cache import in_chunks
from ...pipelines.mixing import add_mixed_adapter
from ...processes import FailingTogether
from ..marble_config import MarbleConfig


EMBEDDINGS = Path(HF_HOME) / "trl_marble" / "embeddings"


def build_flow(pipeline: DiffusionPipeline, args: MarbleConfig) -> FlowPipeline:
    """
    The pipeline with the settings of the rollouts.

    Raises:
        `ValueError`: If it cannot have them.
    """
    flow = FlowPipeline(
        pipeline,
        args.height,
        args.width,
        args.guidance_scale,
        args.max_sequence_length,
        num_frames=args.num_frames,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
        reference_guidance_scale=args.reference_guidance_scale,
    )
    if args.policy_loss == "grpo" and flow.is_guided:
        raise ValueError(
            f"`policy_loss='grpo'` needs the velocity that the rollouts follow, and with "
            f"`guidance_scale={args.guidance_scale}` they follow a guided one, which is not trained; set "
            "`guidance_scale=1.0`."
        )
    return flow


def add_adapters(
    flow: FlowPipeline, peft_config: LoraConfig | None, teachers: Sequence[Teacher], parts: int | None
) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """
    Add the adapter that is trained, with a number of parts where it has some, and load the teachers.

    Returns:
        `tuple`: The trainable weights by name, and what describes the frozen ones, ready for JSON: the base model and
        the teachers.

    Raises:
        `ValueError`: If one of them does not fit the pipeline.
    """
    pipeline = flow.pipeline
    if parts is not None:
        trainable = add_mixed_adapter(flow, peft_config, parts)
    else:
        trainable = dict(add_trainable_adapter(pipeline, peft_config or lora_config(pipeline)))
    base_model = base_fingerprint(pipeline.transformer)
    # `None` is what a checkpoint from before there were teachers has.
    return trainable, {"base_model": base_model, "teachers": load_teachers(pipeline, teachers) or None}


def cache_embeddings(
    flow: FlowPipeline, train_dataset: Dataset, eval_dataset: Dataset | dict[str, Dataset] | None, args: MarbleConfig
) -> None:
    """
    With `cache_embeddings`, encode all prompts that are not on disk yet, and drop the text encoders. Each process
    encodes its share.

    Raises:
        `ValueError`: If the pipeline takes no embeddings.
    """
    if not args.cache_embeddings:
        return
    flow.cache_embeddings(EMBEDDINGS, args.device)
    sets = [train_dataset, *evaluation_sets(eval_dataset).values()]
    prompts = dict.fromkeys(prompt for prompts in sets for prompt in prompts["prompt"][:])
    prompts |= {flow.family.empty_prompt: None}  # with which the time grid is found
    with FailingTogether().phase():
        for chunk in in_chunks(list(prompts)[args.process_index :: args.world_size]):
            flow.encode(chunk)
    flow.drop_text_encoders()


def place_pipeline(flow: FlowPipeline, trainable: Mapping[str, Any], args: MarbleConfig) -> None:
    """
    Bring a pipeline with its adapter to where it is trained, see [`~trl_marble.pipelines.place_base`].

    Raises:
        `ValueError`: If it cannot be sharded, is of an unknown class and its velocities are wrong, or cannot sample
            with `rollout_attention_backend` or `rollout_cache`.
    """
    if args.shard_base and flow.splits_batches:
        raise ValueError(
            "`shard_base=True` needs processes that call the transformer equally often, and "
            f"{type(flow.pipeline).__name__} is called once for every different time of a micro-batch. Set "
            "`shard_base=False`."
        )
    place_base(
        flow,
        trainable.values(),
        args.device,
        shards=args.base_is_sharded,
        offloads=args.offload_components,
        compile_backend=args.torch_compile_backend,  # `torch_compile` sets it, and is set by it
        compile_mode=args.torch_compile_mode,
    )
    if (acceleration := args.build_acceleration()) is not None:
        verify_acceleration(flow, acceleration, args.num_inference_steps)
