# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A row for a pipeline class that is not in the table, by assumption."""

import inspect

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .families import ATTENTION, Family


def assume_family(pipeline: DiffusionPipeline) -> Family:
    """
    Describe a pipeline of an unknown class: it is called with text, and without guidance.

    Whether the row is right is not known before [`verify_velocities`].

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.

    Returns:
        `Family`: the row.

    Raises:
        `ValueError`: it has no `encode_prompt`, cannot save LoRA files or has no argument that turns guidance off.
    """
    kind = type(pipeline)
    missing = [name for name in ("encode_prompt", "save_lora_weights") if name not in dir(kind)]
    if missing:
        raise ValueError(
            f"{kind.__name__} has no `{missing[0]}`, which training an adapter needs. Use another pipeline: "
            "docs/pipelines.md lists the tested ones."
        )
    call = inspect.signature(kind.__call__).parameters
    scales = [name for name in ("true_cfg_scale", "guidance_scale") if name in call]
    if not scales:
        raise ValueError(
            describe_unusable(pipeline, "its `__call__` has no `guidance_scale`, so its guidance cannot be turned off")
        )
    embedded = "guidance_scale" in call and bool(pipeline.transformer.config.get("guidance_embeds"))
    return Family(
        pipeline_class=kind,
        encoded_names=None,
        guidance="embedded" if embedded else "classifier_free",
        lora_target_modules=ATTENTION,
        guidance_argument="guidance_scale" if embedded else scales[0],
        arguments={"true_cfg_scale": 1.0} if embedded else {},
        output="video" if "num_frames" in call else "image",
        checkpointing_fault="its gradients are compared for the classes in the table only",
        long_text_tokenizer=None,
    )


def describe_unusable(pipeline: DiffusionPipeline, finding: str) -> str:
    """The message of an error about a class that is not in the table: what was found, and how to add a row for it."""
    return (
        f"{type(pipeline).__name__} is not in the table of tested pipeline classes, and cannot be trained as it is: "
        f"{finding}. Use a class of the table (docs/pipelines.md), or add a row for this one to `FAMILIES` in "
        "trl_marble/pipelines/families.py (the docstring of `Family` names what can differ) with a tiny pipeline in "
        "tests/."
    )
