# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Keep the components of a pipeline other than the transformer on the CPU while they are not used."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn


def offload_components(pipeline: DiffusionPipeline, device: torch.device | str) -> None:
    """
    Keep everything but the transformer on the CPU between its uses.

    Text encoders, image encoders and the VAE move to the device when they are called, one at a time, and back to the
    CPU before the transformer runs. Their weights do not change, so they stay in the CPU's memory meanwhile, and
    nothing is copied back. (`pipeline.enable_model_cpu_offload` would move the transformer too, between every
    rollout's last step and the VAE.) A text encoder whose layers the pipeline calls one by one, as Ideogram 4 does,
    computes on the CPU. The hooks are those of `accelerate`; `pipeline.remove_all_hooks()` removes them and moves
    nothing.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, changed in place. Its transformers, also a second one for unconditional predictions, are
            moved to the device and stay there.
        device (`torch.device` or `str`):
            The device of all computations.
    """
    device = torch.device(device)
    moved: Moved = []
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            if "transformer" in name:
                component.to(device)
            elif next(component.parameters(), None) is not None:
                add_hook_to_module(component, _MoveToDevice(device, moved), append=True)
    add_hook_to_module(pipeline.transformer, _MoveOthersToCpu(moved), append=True)


Moved = list[tuple[nn.Module, Callable[[], Any]]]  # what is on the device, and how each comes back


class _MoveToDevice(CpuOffload):
    """Before a component is called, move it to the device and the other components to the CPU."""

    def __init__(self, device: torch.device, moved: Moved) -> None:
        super().__init__(device)
        self.moved = moved

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if [each for each, _ in self.moved] != [module]:
            _move_to_cpu(self.moved)
            self.moved.append((module, _way_back(module)))
        return super().pre_forward(module, *args, **kwargs)


class _MoveOthersToCpu(ModelHook):
    """Before the transformer is called, move all components that were moved to the device back to the CPU."""

    def __init__(self, moved: Moved) -> None:
        self.moved = moved

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _move_to_cpu(self.moved)
        return args, kwargs


def _move_to_cpu(moved: Moved) -> None:
    while moved:
        _, come_back = moved.pop()
        come_back()


def _way_back(module: nn.Module) -> Callable[[], Any]:
    """What puts a module that is on the CPU, and moves to the device now, back as it was."""
    if any(type(parameter) is not nn.Parameter for parameter in module.parameters()):  # quantized ones change
        return lambda: module.to("cpu")
    parts = list(module.modules())
    parameters = [
        (part._parameters, name, parameter, parameter.data)
        for part in parts
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    buffers = [(part._buffers, name, buffer) for part in parts for name, buffer in part._buffers.items()]

    def come_back() -> None:
        for owner, name, parameter, data in parameters:
            parameter.data = data
            owner[name] = parameter
        for holder, name, buffer in buffers:
            holder[name] = buffer
        module.to("cpu")  # what is left

    return come_back
