# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Text encoders and VAE on the CPU while they are not used."""

import torch
from torch import nn

from .micro_step import MicroStep, relative_error
from .subject import Subject
from .verdicts import Failed, Finding


def check_offloading(subject: Subject) -> Finding:
    """With `offload_components=True` images are the same, and after a step only the transformer is on the device."""
    latents = []
    for offloads in (False, True):
        with subject.trainer(offload_components=offloads) as trainer:
            latents.append(MicroStep(trainer).latents.float())
    error = relative_error(latents[1], latents[0])
    if not error <= subject.tolerance:
        raise Failed(f"offloading changes the images: relative error {error:.1e} of the latents", relative_error=error)
    with subject.trainer(offload_components=True) as trainer:
        trainer.train()
        device = trainer.args.device
        left = [
            name
            for name, component in trainer.pipeline.components.items()
            if isinstance(component, nn.Module) and "transformer" not in name and not _is_on(component, "cpu")
        ]
        if left or not _is_on(trainer.flow.transformer, device.type):
            raise Failed(f"after a step these are not where they belong: {', '.join(left) or 'the transformer'}")
    where = "nothing moves on a CPU" if device.type == "cpu" else "only the transformer stays on the device"
    return Finding(f"relative error of images {error:.1e}; {where}", {"relative_error": error})


def _is_on(module: nn.Module, device_type: str) -> bool:
    return all(torch.device(weight.device).type == device_type for weight in module.parameters())
