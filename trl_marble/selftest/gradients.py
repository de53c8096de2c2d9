# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The gradients of all rewards from few backward passes, against one autograd call for each reward."""

from diffusers import DiffusionPipeline

from .micro_step import MicroStep, relative_error
from .subject import Subject
from .verdicts import Failed, Finding


def check_gradients(subject: Subject, pipeline: DiffusionPipeline | None = None) -> Finding:
    """
    Per-reward gradients against autograd.

    Args:
        subject ([`Subject`]):
            What is checked.
        pipeline (`DiffusionPipeline`, *optional*):
            In the place of the subject's own.
    """
    with subject.trainer(pipeline, balance_on="loss") as trainer:
        step = MicroStep(trainer)
        error = relative_error(step.weighted(), step.autograd())
        dtype = str(trainer.flow.dtype).removeprefix("torch.")
    if not error <= subject.tolerance:
        raise Failed(
            f"per-reward gradients are not those of autograd: relative error {error:.1e}, of at most "
            f"{subject.tolerance:.0e} for {dtype}",
            relative_error=error,
        )
    return Finding(f"relative error {error:.1e} ({dtype})", {"relative_error": error, "dtype": dtype})
