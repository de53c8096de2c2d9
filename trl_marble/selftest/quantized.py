# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A base in 4 bits."""

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from ..extras import MissingExtraError, require_extra
from ..pipelines import quantization_config
from .gradients import check_gradients
from .subject import Subject
from .verdicts import Finding, Skipped


def check_quantized(subject: Subject) -> Finding:
    """Per-reward gradients on a quantized base are those of autograd."""
    method, config = "bitsandbytes nf4", quantization_config("nf4", subject.dtype)
    finding = check_gradients(subject, load_quantized(subject, config))
    return Finding(f"{method}: {finding.reason}", {"method": method, **finding.measured})


def load_quantized(subject: Subject, config: PipelineQuantizationConfig) -> DiffusionPipeline:
    """The subject's pipeline with a quantized transformer."""
    return subject.load(quantization_config=config)


def require_quantization() -> None:
    """
    Ask for the library, and for a GPU.

    Raises:
        [`Skipped`]: If one of them is missing.
    """
    try:
        require_extra("quantization", "A base in 4 bits")
    except MissingExtraError as error:
        raise Skipped(str(error)) from error
    if not torch.cuda.is_available():
        raise Skipped("bitsandbytes quantizes weights on a GPU only when it loads them")
