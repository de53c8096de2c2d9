# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Keeping the parts of a pipeline that are needed only now and then on the CPU."""

from typing import Any

import torch
from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn


def offload_components(pipeline: DiffusionPipeline, device: torch.device | str) -> None:
    """
    Keep everything but the transformer on the CPU between its uses.

    Text encoders, image encoders and the VAE come to the device when they are called, one at a time, and have left it
    again when the transformer runs. (`pipeline.enable_model_cpu_offload` would move the transformer too, between
    every rollout's last step and the VAE.) A text encoder whose layers the pipeline calls one by one, as Ideogram 4
    does, computes on the CPU. The hooks are those of `accelerate`; `pipeline.remove_all_hooks()` takes
    them off, and leaves everything where it is.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, changed in place. Its transformers, also one for unconditional predictions only, are moved
            to the device and stay there.
        device (`torch.device` or `str`):
            Where everything is computed.
    """
    device = torch.device(device)
    guests: list[nn.Module] = []
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            if "transformer" in name:
                component.to(device)
            elif next(component.parameters(), None) is not None:
                add_hook_to_module(component, _ComeAlone(device, guests), append=True)
    add_hook_to_module(pipeline.transformer, _SendAway(guests), append=True)


class _ComeAlone(CpuOffload):
    """Before a component is called it comes to the device, and who is there leaves."""

    def __init__(self, device: torch.device, guests: list[nn.Module]) -> None:
        super().__init__(device)
        self.guests = guests

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.guests != [module]:
            _send_away(self.guests)
            self.guests.append(module)
        return super().pre_forward(module, *args, **kwargs)


class _SendAway(ModelHook):
    """Before the transformer is called, who is on the device beside it leaves."""

    def __init__(self, guests: list[nn.Module]) -> None:
        self.guests = guests

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _send_away(self.guests)
        return args, kwargs


def _send_away(guests: list[nn.Module]) -> None:
    while guests:
        guests.pop().to("cpu")
