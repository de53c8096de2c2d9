# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What takes the place of a pipeline's own functions while it is called: for its text, and for its latents."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from .conditioning import Conditioning


def remembered(encode_prompt: Callable[..., Any], conditioning: Conditioning) -> Callable[..., Any]:
    """`encode_prompt` that runs once for the prompts of a conditioning, and never with gradients."""

    @functools.wraps(encode_prompt)
    def remember(*args: Any, **kwargs: Any) -> Any:
        question = _without_rows((args, sorted(kwargs.items())))
        answer = conditioning.answered(question)
        if answer is None:
            with torch.no_grad():
                answer = encode_prompt(*args, **kwargs)
            conditioning.keep_answer(question, answer)
        return answer

    return remember


def _without_rows(value: Any) -> Hashable:
    """What was asked about a conditioning: texts and settings. Its tensors and images are of its own rows."""
    if isinstance(value, list | tuple):
        return tuple(_without_rows(item) for item in value)
    return type(value).__name__ if isinstance(value, Tensor | PIL.Image.Image) else repr(value)


def giving(prepare_latents: Callable[..., Any], x_t: Tensor) -> Callable[..., Any]:
    """`prepare_latents` that gives x_t in the place of the first thing that it made: the latents to be denoised."""

    @functools.wraps(prepare_latents)
    def give(*args: Any, **kwargs: Any) -> Any:
        output = prepare_latents(*args, **kwargs)
        made, *others = output if isinstance(output, tuple) else (output,)
        if made.shape != x_t.shape:
            raise ValueError(
                f"x_t is of shape {tuple(x_t.shape)}, but the pipeline's own latents are {tuple(made.shape)}. Pass "
                "latents in the layout of `Rollout.latents`, of the height, width and frames of this object."
            )
        return (x_t.to(made), *others) if others else x_t.to(made)

    return give
