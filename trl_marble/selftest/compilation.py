# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Compiled blocks against those that are not."""

import os
import shutil

import torch
from torch.utils._triton import has_triton

from .micro_step import MicroStep, relative_error
from .subject import Subject
from .verdicts import Failed, Finding, Skipped


def check_compilation(subject: Subject) -> Finding:
    """Per-reward gradients with `torch_compile=True` are those without."""
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise Skipped("torch.compile is switched off by the environment")
    with subject.trainer(torch_compile=True) as trainer:
        device = trainer.args.device.type
        if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise Skipped("torch.compile needs a C++ compiler on a CPU, and there is none")
        if device == "cuda" and not has_triton():
            raise Skipped("torch.compile needs Triton on a GPU, and it is not installed")
        with torch.compiler.set_stance("force_eager"):
            step = MicroStep(trainer)
            expected = step.weighted()
        error = relative_error(step.weighted(), expected)
    if not error <= subject.tolerance:
        raise Failed(
            f"compiled blocks give other gradients: relative error {error:.1e}, of at most {subject.tolerance:.0e}",
            relative_error=error,
        )
    return Finding(f"relative error {error:.1e}", {"relative_error": error})
