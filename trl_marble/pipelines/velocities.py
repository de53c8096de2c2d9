# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Velocities at any latents and times, through the pipeline's own denoising step.

The first call for a conditioning goes through the pipeline. What it does is recorded, and later calls do the same
without it.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor

from .conditioning import Conditioning
from .families import Family
from .overrides import replace_latents
from .pipeline_calls import PipelineCalls
from .quantization import base_dtype
from .recording import Circumstances, Recorder, Recording, autocast_of
from .schedulers import OneStep


def batch_velocity(
    calls: PipelineCalls, x_t: Tensor, t: Tensor, conditioning: Conditioning, may_record: bool
) -> Tensor:
    """
    The velocities of a batch, in as few calls of the transformer as the pipeline allows.

    Args:
        calls (`PipelineCalls`):
            How the pipeline is called.
        x_t (`torch.Tensor` of shape `[batch, ...]`):
            See [`~trl_marble.pipelines.FlowPipeline.velocity`].
        t (`torch.Tensor` of shape `[batch]`):
            See [`~trl_marble.pipelines.FlowPipeline.velocity`].
        conditioning (`Conditioning`):
            See [`~trl_marble.pipelines.FlowPipeline.velocity`].
        may_record (`bool`):
            Whether later calls may do without the pipeline.
    """
    batch = x_t.shape[0]
    if t.shape != (batch,) or len(conditioning) != batch:
        raise ValueError(
            f"x_t has {batch} samples, but t has shape {tuple(t.shape)} and the conditioning {len(conditioning)} "
            "rows; pass one time and one row per sample."
        )
    t = t.to(device=x_t.device, dtype=torch.float32)
    one_sample = calls.takes_one_sample(conditioning)
    if not one_sample and not calls.splits_batches:
        return _velocity_at(calls, x_t, t, conditioning, may_record)
    of_calls = torch.arange(batch) if one_sample else torch.unique(t, return_inverse=True)[1].cpu()
    if not of_calls.any():
        return _velocity_at(calls, x_t, t[0], conditioning, may_record)
    samples = [torch.nonzero(of_calls == call).flatten() for call in of_calls.unique()]
    parts = [_velocity_at(calls, x_t[rows], t[rows[0]], conditioning.part(rows), may_record) for rows in samples]
    return torch.cat(parts)[torch.argsort(torch.cat(samples))]


def negatives_of(conditioning: Conditioning, family: Family) -> Conditioning:
    """
    The negative prompts of a conditioning in the place of its prompts.

    Args:
        conditioning (`Conditioning`):
            Prompts that were encoded together with their negative ones.
        family (`Family`):
            The row of the pipeline.
    """
    rows, encoded = conditioning.kwargs, family.encoded_names
    if encoded is None:
        return conditioning.twin("negative", rows | {"prompt": [family.empty_prompt] * len(conditioning)})
    # Not the prompts' own where there is no negative one: a mask is left out where nothing is padded.
    others = {name: row for name, row in rows.items() if name not in encoded and not name.startswith("negative_")}
    negatives = {name.removeprefix("negative_"): row for name, row in rows.items() if name.startswith("negative_")}
    return conditioning.twin("negative", others | negatives)


def _velocity_at(calls: PipelineCalls, x_t: Tensor, t: Tensor, conditioning: Conditioning, may_record: bool) -> Tensor:
    """The velocity in one call; `t` is one time per sample, or one time for all samples."""
    if not may_record or torch.is_inference_mode_enabled():  # whose writes would go unnoticed
        return velocity_by_pipeline(calls, x_t, t, conditioning).to(x_t.dtype)
    circumstances, derived = _circumstances(calls, x_t, t), conditioning.derived()
    recorded: tuple[Circumstances | None, Recording | None] = derived.get(Recording, (None, None))
    before, recording = recorded
    if before != circumstances or not (recording is None or recording.is_intact()):
        recorder = Recorder(x_t, t)
        with recorder.recording(calls.transformer, calls.call_transformer):
            velocity = velocity_by_pipeline(calls, x_t, t, conditioning, recorder.stop)
        derived[Recording] = circumstances, recorder.finish(velocity)
    elif recording is None:  # it cannot be repeated
        velocity = velocity_by_pipeline(calls, x_t, t, conditioning)
    else:
        velocity = recording.velocity(x_t, t)
    return velocity.to(x_t.dtype)


def velocity_by_pipeline(
    calls: PipelineCalls,
    x_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    when_done: Callable[[], None] | None = None,
) -> Tensor:
    """
    The velocity as the pipeline hands it to its scheduler.

    Args:
        calls (`PipelineCalls`):
            How the pipeline is called.
        x_t (`torch.Tensor` of shape `[batch, ...]`):
            Noisy latents.
        t (`torch.Tensor` of shape `[batch]` or `[]`):
            The time of every sample, or one for all.
        conditioning (`Conditioning`):
            The encoded prompts.
        when_done (`Callable[[], None]`, *optional*):
            Called when the velocity is there.
    """
    solver = OneStep(calls.pipeline.scheduler, t, when_done)
    driver = calls.driver(solver, conditioning)
    options: dict[str, Any] = {}
    if "prepare_latents" in dir(driver):  # without it, `__call__` uses the latents it is given as they are
        driver.prepare_latents = replace_latents(driver.prepare_latents, x_t)
        options["generator"] = torch.Generator("cpu").manual_seed(0)  # not torch's global one
    else:
        options["latents"] = x_t.to(base_dtype(calls.transformer))
    # Two, because Mochi divides by half of it; `OneStep` takes one step whatever the number.
    calls.run_with_gradients(driver, conditioning, num_inference_steps=2, **options)
    vars(driver).clear()  # its replaced methods hold it, and so the latents, until the next garbage collection
    if solver.velocity is None:
        raise RuntimeError(f"{type(calls.pipeline).__name__} ended without a denoising step; it cannot be trained.")
    return solver.velocity


def _circumstances(calls: PipelineCalls, x_t: Tensor, t: Tensor) -> Circumstances:
    """What a velocity call depends on, apart from the conditioning, the weights and the values of x_t and t."""
    parts = list(vars(calls.pipeline).values())
    configs = [part.config for part in parts if isinstance(part, ConfigMixin)]
    weight = next(calls.transformer.parameters())
    return Circumstances(
        [*vars(calls).values(), *parts, *configs],
        (x_t.shape, x_t.stride(), x_t.dtype, x_t.device, t.shape, weight.dtype, weight.device, autocast_of(x_t)),
    )
