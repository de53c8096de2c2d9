# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What differs from one pipeline class to the next: one row of a table each, nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """
    How one pipeline class is conditioned and adapted.

    Args:
        pipeline_class (`type`):
            The diffusers pipeline class. Its subclasses belong to the family too.
        encoded_names (`tuple[str | None, ...]`):
            The `__call__` argument that takes each output of `encode_prompt`, in the order of those outputs. `None`
            where the output is not per prompt or `__call__` makes it itself.
        guidance (`"classifier_free"` or `"embedded"`):
            What `guidance_scale` means to the pipeline. `"classifier_free"`: above 1, the transformer runs on the
            negative prompt as well and the pipeline extrapolates. `"embedded"`: a guidance-distilled transformer takes
            the value as one more input, and nothing is run twice.
        lora_target_modules (`tuple[str, ...]`):
            Names (suffixes) of the transformer's linear layers that get a LoRA by default.
        long_text_encoder (`str`):
            The text encoder that reads the longest text, up to `max_sequence_length` tokens. Where the pipeline came
            without it, `tokenizer` and its own limit count.
        long_text_tokenizer (`str`):
            The tokenizer that belongs to `long_text_encoder`.
        encode_arguments (`Mapping[str, Any]`, *optional*):
            Arguments that `encode_prompt` insists on beside the prompt.
    """

    pipeline_class: type
    encoded_names: tuple[str | None, ...]
    guidance: Literal["classifier_free", "embedded"]
    lora_target_modules: tuple[str, ...]
    long_text_encoder: str
    long_text_tokenizer: str
    encode_arguments: Mapping[str, Any] = field(default_factory=dict)


# A row is added together with a tiny pipeline of its class for the tests in tests/pipelines/, when they pass for it.
FAMILIES: tuple[Family, ...] = (
    Family(
        pipeline_class=StableDiffusion3Pipeline,
        encoded_names=(
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
        guidance="classifier_free",
        # The eight joint-attention projections of https://huggingface.co/papers/2509.16117.
        lora_target_modules=(
            "attn.add_k_proj",
            "attn.add_q_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "attn.to_k",
            "attn.to_out.0",
            "attn.to_q",
            "attn.to_v",
        ),
        long_text_encoder="text_encoder_3",
        long_text_tokenizer="tokenizer_3",
        encode_arguments={"prompt_2": None, "prompt_3": None},
    ),
    Family(
        pipeline_class=FluxPipeline,
        encoded_names=("prompt_embeds", "pooled_prompt_embeds", None),
        guidance="embedded",
        # The defaults of diffusers' own DreamBooth LoRA example for Flux.
        lora_target_modules=(
            "attn.to_k",
            "attn.to_q",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_k_proj",
            "attn.add_q_proj",
            "attn.add_v_proj",
            "attn.to_add_out",
            "ff.net.0.proj",
            "ff.net.2",
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        long_text_encoder="text_encoder_2",
        long_text_tokenizer="tokenizer_2",
    ),
)


def find_family(pipeline: DiffusionPipeline) -> Family:
    """
    The row of the table that describes a pipeline.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.

    Returns:
        `Family`: the first row whose `pipeline_class` the pipeline is an instance of.

    Raises:
        `ValueError`: no row describes this pipeline class.
    """
    for family in FAMILIES:
        if isinstance(pipeline, family.pipeline_class):
            return family
    supported = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    raise ValueError(
        f"{type(pipeline).__name__} is not among the supported pipeline classes ({supported}). Use one of these, or "
        "add one `Family` row for it to `FAMILIES` in trl_marble/pipelines/families.py: the names of what its "
        "`encode_prompt` returns, what `guidance_scale` means to it, and which layers get a LoRA."
    )
