# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A base in 8 or 4 bits."""

from importlib.util import find_spec
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, TorchAoConfig

from ..pipelines import quantization_config
from .gradients import check_gradients
from .subject import Subject
from .verdicts import Finding, Skipped


def check_quantized(subject: Subject) -> Finding:
    """Per-reward gradients on a quantized base are those of autograd."""
    method, config = _choose(subject)
    finding = check_gradients(subject, load_quantized(subject, config))
    return Finding(f"{method}: {finding.reason}", {"method": method, **finding.measured})


def load_quantized(subject: Subject, config: PipelineQuantizationConfig) -> DiffusionPipeline:
    """The subject's pipeline with a quantized transformer."""
    return subject.load(quantization_config=config)


def _choose(subject: Subject) -> tuple[str, Any]:
    """A method that is installed, and works on this machine; with its configuration."""
    if find_spec("bitsandbytes") is not None and torch.cuda.is_available():
        return "bitsandbytes nf4", quantization_config("nf4", subject.dtype)
    if find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig

        mapping = {"transformer": TorchAoConfig(Int8WeightOnlyConfig())}
        return "torchao int8", PipelineQuantizationConfig(quant_mapping=mapping)
    if find_spec("bitsandbytes") is not None:
        raise Skipped("bitsandbytes loads weights on a GPU only, and torchao is not installed")
    raise Skipped("neither bitsandbytes nor torchao is installed")
