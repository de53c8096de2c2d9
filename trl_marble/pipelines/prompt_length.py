# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How long a prompt the text encoders of a pipeline read, and prompts that are longer."""

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .families import Family


def find_length_limit(pipeline: DiffusionPipeline, family: Family, max_sequence_length: int | None) -> int | None:
    """
    How many tokens of a prompt count.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        family (`Family`):
            Its row of the table.
        max_sequence_length (`int`, *optional*):
            What was asked for. Defaults to the pipeline's own.

    Returns:
        `int`: `None` where the pipeline has no such argument.

    Raises:
        `ValueError`: it has none, and something was asked for.
    """
    pipeline_class: Any = family.pipeline_class
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if "max_sequence_length" in parameters:
        return parameters["max_sequence_length"].default if max_sequence_length is None else max_sequence_length
    if max_sequence_length is not None:
        raise ValueError(
            f"max_sequence_length={max_sequence_length} would be ignored: {type(pipeline).__name__} has no "
            "such argument. Leave it out."
        )
    return None


def describe_long_prompts(
    pipeline: DiffusionPipeline, family: Family, max_sequence_length: int | None, prompts: Sequence[str]
) -> str | None:
    """
    A warning about the prompts that the text encoders cut off.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        family (`Family`):
            Its row of the table, which names the text encoder that reads the longest text.
        max_sequence_length (`int`, *optional*):
            How many tokens that text encoder reads. `None` where the pipeline has no such argument.
        prompts (`Sequence[str]`):
            The prompts.

    Returns:
        `str`: the warning; `None` where every prompt is read to its end, or the family does not say what reads it.
    """
    if family.long_text_tokenizer is None:
        return None
    components = pipeline.components
    if max_sequence_length is not None and components[family.long_text_encoder] is not None:
        tokenizer, limit = components[family.long_text_tokenizer], max_sequence_length
    else:
        tokenizer = components["tokenizer"]
        limit = tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if not too_long:
        return None
    first = too_long[0]
    return (
        f"The prompt {prompts[first]!r} has {lengths[first]} tokens, but the text encoders read only the first "
        f"{limit}; the rest has no effect on the image. {len(too_long)} of these {len(prompts)} prompts are too "
        "long. Shorten them, or raise `max_sequence_length` where the text encoder allows it. This warning is given "
        "once."
    )
