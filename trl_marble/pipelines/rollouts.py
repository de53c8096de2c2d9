# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Images and videos that a pipeline samples as it does for its users."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..sde import SDEWindow, Transitions
from ..step_times import StepTimes
from .acceleration import Acceleration
from .conditioning import Conditioning
from .pipeline_calls import PipelineCalls
from .schedulers import keep_samples
from .sde_solver import SDESolver, euler_of


class Rollout(NamedTuple):
    """
    Samples: their clean latents and their images.

    Args:
        latents (`torch.Tensor` of shape `[batch, ...]`):
            The clean latents x0 in the layout that the transformer sees (packed tokens for Flux).
        images (`list` or `torch.Tensor` of shape `[batch, 3, height, width]`):
            The decoded images, as `PIL.Image.Image` or as one tensor with values in [0, 1]. Where the family makes
            videos, each is a list of frames, and the tensor is of shape `[batch, frames, 3, height, width]`.
        transitions ([`~trl_marble.sde.Transitions`], *optional*):
            What the steps with noise went through, where there are any.
    """

    latents: Tensor
    images: list[Any] | Tensor
    transitions: Transitions | None = None


def sample(
    calls: PipelineCalls,
    conditioning: Conditioning,
    seeds: Sequence[int],
    num_inference_steps: int,
    output_type: Literal["pil", "pt"],
    scheduler: SchedulerMixin | None,
    times: StepTimes | None,
    acceleration: Acceleration | None,
    sde: SDEWindow | None,
) -> Rollout:
    """
    Sample one image or video per row of the conditioning: in one call, or in one for each where the pipeline is
    limited to one sample. The arguments are those of [`~trl_marble.pipelines.FlowPipeline.rollout`].
    """
    if len(seeds) != len(conditioning):
        raise ValueError(f"got {len(seeds)} seeds for {len(conditioning)} prompts; pass one seed per prompt.")
    was_training = calls.transformer.training
    calls.transformer.eval()
    options = (num_inference_steps, output_type, scheduler, times, acceleration, sde)
    try:
        if not calls.takes_one_sample(conditioning):
            return _call(calls, conditioning, seeds, *options)
        rollouts = [
            _call(calls, conditioning.select(torch.tensor([i])), [seed], *options) for i, seed in enumerate(seeds)
        ]
    finally:
        calls.transformer.train(was_training)
    images: list[Any] = [image for rollout in rollouts for image in rollout.images]
    return Rollout(
        latents=torch.cat([rollout.latents for rollout in rollouts]),
        images=torch.stack(images) if output_type == "pt" else images,
        transitions=Transitions.concatenate([rollout.transitions for rollout in rollouts]),
    )


def _call(
    calls: PipelineCalls,
    conditioning: Conditioning,
    seeds: Sequence[int],
    num_inference_steps: int,
    output_type: Literal["pil", "pt"],
    scheduler: SchedulerMixin | None,
    times: StepTimes | None,
    acceleration: Acceleration | None,
    sde: SDEWindow | None,
) -> Rollout:
    """Call the pipeline as its users do."""
    if sde is not None:
        scheduler = euler_of(calls.pipeline.scheduler)
    solver = calls.fresh_solver(num_inference_steps, scheduler)
    noisy = None if sde is None else SDESolver(solver, sde, seeds)
    # Each step begins the decoding anew, the last one for good.
    latents = keep_samples(solver, lambda: times.begin("decode") if times is not None else None)
    driver = calls.driver(solver, conditioning)
    faster = nullcontext() if acceleration is None else acceleration.applied(driver, num_inference_steps)
    with calls.precision(), faster:
        output = driver(
            **calls.arguments(conditioning, guided=calls.is_guided),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            num_inference_steps=num_inference_steps,
            output_type=output_type,
        )
    if times is not None:
        times.end("decode")
    transitions = None if noisy is None else noisy.transitions()
    return Rollout(latents=latents[0], images=output[0], transitions=transitions)  # `images` or `frames`
