# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Replacements of a pipeline's own `encode_prompt` and `prepare_latents` during a call."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from .conditioning import Conditioning


def encode_once(encode_prompt: Callable[..., Any], conditioning: Conditioning) -> Callable[..., Any]:
    """Wrap `encode_prompt` so that it runs once for the prompts of a conditioning, and without gradients."""

    @functools.wraps(encode_prompt)
    def encode(*args: Any, **kwargs: Any) -> Any:
        key = _cache_key((args, sorted(kwargs.items())))
        output = conditioning.cached_output(key)
        if output is None:
            with torch.no_grad():
                output = encode_prompt(*args, **kwargs)
            conditioning.cache_output(key, output)
        return output

    return encode


def _cache_key(value: Any) -> Hashable:
    """The texts and settings of a call, without tensors and images: those are of the conditioning's own rows."""
    if isinstance(value, list | tuple):
        return tuple(_cache_key(item) for item in value)
    return type(value).__name__ if isinstance(value, Tensor | PIL.Image.Image) else repr(value)


def replace_latents(prepare_latents: Callable[..., Any], x_t: Tensor) -> Callable[..., Any]:
    """Wrap `prepare_latents` so that it returns x_t in place of its first result, the latents to be denoised."""

    @functools.wraps(prepare_latents)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        output = prepare_latents(*args, **kwargs)
        made, *others = output if isinstance(output, tuple) else (output,)
        if made.shape != x_t.shape:
            raise ValueError(
                f"x_t is of shape {tuple(x_t.shape)}, but the pipeline's own latents are {tuple(made.shape)}. Pass "
                "latents in the layout of `Rollout.latents`, of the height, width and frames of this object."
            )
        return (x_t.to(made), *others) if others else x_t.to(made)

    return prepare
