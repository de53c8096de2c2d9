# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The times at which a rollout evaluates the transformer, from the schedule that the pipeline sets up itself."""

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .conditioning import Conditioning
from .pipeline_calls import PipelineCalls
from .schedulers import FLOW_MATCHING_SCHEDULERS, record_times


def find_training_times(
    calls: PipelineCalls, conditioning: Conditioning, num_inference_steps: int, scheduler: SchedulerMixin | None
) -> Tensor:
    """
    See [`~trl_marble.pipelines.FlowPipeline.training_times`].

    Args:
        calls (`PipelineCalls`):
            How the pipeline is called.
        conditioning (`Conditioning`):
            One row, on which nothing depends.
        num_inference_steps (`int`):
            Number of denoising steps, at least 1.
        scheduler ([`~diffusers.SchedulerMixin`], *optional*):
            The solver. Defaults to the pipeline's scheduler.
    """
    solver = calls.fresh_solver(num_inference_steps, scheduler)
    times = record_times(solver)
    try:
        with torch.no_grad():
            calls.run_with_gradients(
                calls.driver(solver, conditioning),
                conditioning,
                # Its own generator: the initial noise, though not used, must not advance torch's global one.
                generator=torch.Generator("cpu").manual_seed(0),
                num_inference_steps=num_inference_steps,
            )
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(solver, FLOW_MATCHING_SCHEDULERS):
            raise
        raise ValueError(
            f"{type(calls.pipeline).__name__} cannot set up a schedule with {type(solver).__name__} "
            f"({type(error).__name__}: {error}). Use UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler."
        ) from error
    if not times[0].isfinite().all():
        raise ValueError(
            f"{type(solver).__name__} has no schedule of num_inference_steps={num_inference_steps}: its times are "
            f"{times[0].tolist()}. Use more steps."
        )
    # Solvers of higher order come back to a time; each counts once.
    return torch.unique_consecutive(times[0].to(device="cpu", dtype=torch.float32))
