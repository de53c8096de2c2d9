# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The precision that a transformer computes in, whoever calls it."""

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .quantization import base_dtype


def autocast_for(module: nn.Module, dtype: torch.dtype) -> torch.autocast:
    """
    Autocast for the device of a module.

    Without a cache: it finds converted weights by their tensor, and would go on with the values that a parameter had
    before another policy's were put in its place.

    Args:
        module (`torch.nn.Module`):
            The module.
        dtype (`torch.dtype`):
            What to compute in.
    """
    return torch.autocast(next(module.parameters()).device.type, dtype, cache_enabled=False)


@contextmanager
def autocast_calls(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """
    Let the calls of some modules inside the context run under autocast, and nothing else.

    What they return has the dtype of their own weights, as without autocast: the solver and the VAE go on in the
    precision that the pipeline was loaded in.

    Args:
        modules (`Iterable[torch.nn.Module]`):
            The modules, such as the transformer of a pipeline whose other components keep their precision.
        dtype (`torch.dtype`):
            What to compute in, such as `torch.bfloat16`.
    """
    handles = []
    running: list[torch.autocast] = []  # one for each call that has not returned

    def begin(module: nn.Module, args: Any) -> None:
        region = autocast_for(module, dtype)
        region.__enter__()
        running.append(region)

    def end(module: nn.Module, args: Any, output: Any) -> Any:
        running.pop().__exit__(None, None, None)
        return _convert(output, base_dtype(module))

    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        while running:  # PyTorch does not call `end` after a KeyboardInterrupt
            running.pop().__exit__(None, None, None)


def _convert(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of what a module returned in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_convert(each, dtype) for each in value)
    if isinstance(value, MutableMapping):  # as the outputs of diffusers are
        for key, each in value.items():
            value[key] = _convert(each, dtype)
    return value
