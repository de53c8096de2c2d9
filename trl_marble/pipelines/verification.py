# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Verify, by sampling, that velocities are right for a pipeline class that is not in the table."""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .acceleration import Acceleration
from .assumed_family import describe_unusable
from .conditioning import Conditioning
from .families import Family
from .flow_pipeline import FlowPipeline
from .sde_solver import euler_of


# Of different length, and both shorter than what any text encoder reads.
PROMPTS = ("a cat", "two very large dogs")
SEEDS = (1, 2)
STEPS = 2


class Step(NamedTuple):
    """One denoising step of a plain call: the arguments of the scheduler, its time, and the time of the next step."""

    sample: Tensor
    sigma: Tensor
    model_output: Tensor
    next_sigma: Tensor


@torch.no_grad()
def verify_velocities(flow: FlowPipeline) -> None:
    """
    Verify that velocities are those of the pipeline's own denoising steps.

    Does nothing for a class in the table, whose row is tested. For another class two images are sampled in two steps,
    and the velocities of each step are computed again: of both samples together, and of each alone at a different
    time. Where they differ, guidance that is off at 0 instead of 1 is tried, and calls with one time or one sample.

    Args:
        flow (`FlowPipeline`):
            The pipeline, on its device. Its `family` is set to a row with which velocities are right.

    Raises:
        `ValueError`: there is no such row. The message says what differs, and what to add.
    """
    if not flow.is_listed:
        flow.family = _find_family(flow)


@torch.no_grad()
def verify_acceleration(flow: FlowPipeline, acceleration: Acceleration, num_inference_steps: int) -> None:
    """
    Verify that rollouts can be sampled faster in some way, by sampling one image.

    Args:
        flow (`FlowPipeline`):
            The pipeline, on its device.
        acceleration (`Acceleration`):
            How.
        num_inference_steps (`int`):
            Number of solver steps of a rollout.

    Raises:
        `ValueError`: they cannot. The message says why.
    """
    transformer = flow.transformer
    acceleration.check(transformer, flow.is_guided)
    device = flow.device
    hooked: list[int] = []

    def count_hooks(*_: Any) -> None:
        registries = [vars(module).get("_diffusers_hook") for module in transformer.modules()]
        hooked.append(sum(len(registry.hooks) for registry in registries if registry is not None))

    handle = transformer.register_forward_pre_hook(count_hooks)
    count_hooks()  # those that are there in any case
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            flow.rollout(flow.encode_any(), [0], num_inference_steps, acceleration=acceleration)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel or a hook does not expect
        raise ValueError(
            f"{type(flow.pipeline).__name__} cannot sample with `rollout_attention_backend="
            f"{acceleration.attention_backend!r}` and `rollout_cache={acceleration.cache!r}` "
            f"({type(error).__name__}: {error}). Leave them out, or choose others."
        ) from error
    finally:
        handle.remove()
    if acceleration.cache is not None and max(hooked) == hooked[0]:
        raise ValueError(
            f"`rollout_cache={acceleration.cache!r}` has no effect: it fits no layer of {type(transformer).__name__}. "
            "Leave it out, or choose another one."
        )


def _find_family(flow: FlowPipeline) -> Family:
    """The row with which velocities are right, from the assumed one and its variants."""
    if flow.guidance_scale > 1 and flow.family.guidance == "classifier_free":
        raise ValueError(
            describe_unusable(
                flow.pipeline, f"nobody has checked what guidance_scale={flow.guidance_scale} means for it"
            )
            + " Or set guidance_scale=1.0."
        )
    try:
        unguided = _find_unguided(flow)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a pipeline can fail in any way on a call that it is not made for
        finding = f"called with nothing but text it raises {type(error).__name__}: {error}"
        raise ValueError(describe_unusable(flow.pipeline, finding)) from error
    if unguided is None:
        finding = (
            f"its guidance is off neither with {flow.family.guidance_argument}=1 nor with 0: its transformer runs "
            "more than once per step, or the negative prompt changes the images"
        )
        raise ValueError(describe_unusable(flow.pipeline, finding))
    findings = []
    for family in (unguided, replace(unguided, one_time=True), replace(unguided, one_sample=True)):
        difference = _describe_difference(_with_family(flow, family))
        if difference is None:
            return family
        findings.append(difference)
    raise ValueError(describe_unusable(flow.pipeline, "; ".join(dict.fromkeys(findings))))


def _with_family(flow: FlowPipeline, family: Family) -> FlowPipeline:
    trial = copy.copy(flow)
    trial.family = family
    return trial


def _find_unguided(flow: FlowPipeline) -> Family | None:
    """The assumed row with the value of the guidance argument that turns guidance off, if there is one."""
    for off in (1.0, 0.0):
        trial = _with_family(flow, replace(flow.family, unguided=off))
        if not _is_guided(trial):
            return trial.family
    return None


def _is_guided(flow: FlowPipeline) -> bool:
    """Whether a negative prompt has an effect on a plain call."""
    steps, calls = _plain_call(flow, [0])
    if calls != len(steps):
        return True
    if "negative_prompt" not in inspect.signature(type(flow.pipeline).__call__).parameters:
        return False
    others, _ = _plain_call(flow, [0], negative_prompt=[PROMPTS[1]])
    return not all(torch.equal(a.model_output, b.model_output) for a, b in zip(steps, others, strict=True))


def _describe_difference(flow: FlowPipeline) -> str | None:
    """What is wrong with the velocities, in words; `None` if they are right."""
    try:
        return _describe_wrong_velocity(flow) or _describe_batch_dependence(flow)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"


def _describe_wrong_velocity(flow: FlowPipeline) -> str | None:
    """Compare velocities with those of the steps of a plain call, which must go from noise to data."""
    for group in [[0], [1]] if flow.family.one_sample else [[0, 1]]:
        steps, _ = _plain_call(flow, group)
        conditioning = flow.encode([PROMPTS[i] for i in group])
        if fault := _describe_wrong_path(steps):
            return fault
        for step in steps:
            velocity = flow.velocity(step.sample, step.sigma.expand(len(group)), conditioning)
            if not _is_close(velocity, step.model_output):
                return "its velocity at a time differs from the one in its own denoising step at that time"
    return None


def _describe_batch_dependence(flow: FlowPipeline) -> str | None:
    """Compare the velocities of a batch with those of each sample alone."""
    steps = [_plain_call(flow, [i])[0] for i in range(len(PROMPTS))]
    samples = torch.cat([steps[i][0].sample for i in range(len(PROMPTS))])
    times = torch.stack([steps[i][i].sigma for i in range(len(PROMPTS))]).to(samples.device)
    for t in (times, times[:1].expand(len(PROMPTS))):
        together = flow.velocity(samples, t, flow.encode(PROMPTS))
        for i, prompt in enumerate(PROMPTS):
            alone = flow.velocity(samples[i : i + 1], t[i : i + 1], flow.encode([prompt]))
            if not _is_close(together[i : i + 1], alone):
                return "the velocity of a sample depends on the other samples of its batch"
    return None


def _plain_call(flow: FlowPipeline, group: Sequence[int], **options: Any) -> tuple[list[Step], int]:
    """Call the pipeline as its users do, with Euler's method: its steps, and how often the transformer ran."""
    driver = copy.copy(flow.pipeline)
    driver.set_progress_bar_config(disable=True)
    driver.scheduler = scheduler = euler_of(flow.pipeline.scheduler)
    euler_step, steps = scheduler.step, []

    @functools.wraps(euler_step)  # pipelines look at its signature
    def recorded(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        output = euler_step(model_output, timestep, sample, **kwargs)
        sigma, next_sigma = scheduler.sigmas[scheduler.step_index - 1 : scheduler.step_index + 1]
        steps.append(Step(sample.clone(), sigma, model_output.clone(), next_sigma))
        return output

    scheduler.step = recorded
    calls: list[None] = []
    handle = flow.transformer.register_forward_hook(lambda *_: calls.append(None))
    try:
        with flow.precision():
            driver(
                **flow.call_arguments(Conditioning({"prompt": [PROMPTS[i] for i in group]})),
                generator=[torch.Generator("cpu").manual_seed(SEEDS[i]) for i in group],
                num_inference_steps=STEPS,
                output_type="latent",
                **options,
            )
    finally:
        handle.remove()
    return steps, len(calls)


def _describe_wrong_path(steps: Sequence[Step]) -> str | None:
    """Check that the steps go from noise at time 1 to data at time 0."""
    sigmas = torch.stack([step.sigma for step in steps] + [steps[-1].next_sigma]).float()
    if not (0.9 < sigmas[0] <= 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()):
        return f"its times are {[round(sigma, 4) for sigma in sigmas.tolist()]}, not from 1 (noise) down to 0 (data)"
    spread = steps[0].sample.float().std().item()
    if not 0.5 < spread < 2:
        return f"it starts from latents with standard deviation {spread:.3g}, not from noise with 1"
    return None


def _is_close(values: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    if values.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
    difference = (values.float() - expected.float()).norm()
    return bool(difference <= tolerance * expected.float().norm())  # False for NaN
