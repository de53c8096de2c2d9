# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Whether velocities are right for a pipeline class that is not in the table, found out by sampling."""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .assumed_family import describe_unusable
from .conditioning import Conditioning
from .families import Family
from .flow_pipeline import FlowPipeline


# Of different length, and both shorter than what any text encoder reads.
PROMPTS = ("a cat", "two very large dogs")
SEEDS = (1, 2)
STEPS = 2


class Step(NamedTuple):
    """One denoising step of a plain call: where it started, what the scheduler was given, and where it led."""

    sample: Tensor
    sigma: Tensor
    model_output: Tensor
    next_sample: Tensor
    next_sigma: Tensor


@torch.no_grad()
def verify_velocities(flow: FlowPipeline) -> None:
    """
    Make sure that velocities are those of the pipeline's own denoising steps, whatever class it is of.

    Does nothing for a class in the table: its row is tested. For another one two images are sampled in two steps, and
    each step's velocities are asked for again: of both samples together, and of each alone at a time of its own. Where
    that differs, guidance that is off at 0 and not at 1 is tried, and calls that hold one time or one sample.

    Args:
        flow (`FlowPipeline`):
            The pipeline, on its device. Its `family` becomes the one with which velocities are right.

    Raises:
        `ValueError`: there is none. The message says what differs, and what to add.
    """
    if not flow.is_listed:
        flow.family = _find_family(flow)


def _find_family(flow: FlowPipeline) -> Family:
    if flow.guidance_scale > 1 and flow.family.guidance == "classifier_free":
        raise ValueError(
            describe_unusable(
                flow.pipeline, f"guidance_scale={flow.guidance_scale} is not known to mean the same to it as to others"
            )
            + " Or set guidance_scale=1.0."
        )
    try:
        unguided = _unguided(flow)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a pipeline can fail in any way on what it is not made for
        finding = f"called with nothing but text it raises {type(error).__name__}: {error}"
        raise ValueError(describe_unusable(flow.pipeline, finding)) from error
    if unguided is None:
        finding = (
            f"its guidance is off neither with {flow.family.guidance_argument}=1 nor with 0: its transformer runs "
            "more than once a step, or the negative prompt matters"
        )
        raise ValueError(describe_unusable(flow.pipeline, finding))
    findings = []
    for family in (unguided, replace(unguided, one_time=True), replace(unguided, one_sample=True)):
        difference = _difference(_with_family(flow, family))
        if difference is None:
            return family
        findings.append(difference)
    raise ValueError(describe_unusable(flow.pipeline, "; ".join(dict.fromkeys(findings))))


def _with_family(flow: FlowPipeline, family: Family) -> FlowPipeline:
    trial = copy.copy(flow)
    trial.family = family
    return trial


def _unguided(flow: FlowPipeline) -> Family | None:
    """The row with the value of the guidance scale at which there is no guidance, if there is one."""
    for off in (1.0, 0.0):
        trial = _with_family(flow, replace(flow.family, unguided=off))
        if not _is_guided(trial):
            return trial.family
    return None


def _is_guided(flow: FlowPipeline) -> bool:
    """Whether a plain call follows a negative prompt."""
    steps, calls = _plain_call(flow, [0])
    if calls != len(steps):
        return True
    if "negative_prompt" not in inspect.signature(type(flow.pipeline).__call__).parameters:
        return False
    others, _ = _plain_call(flow, [0], negative_prompt=[PROMPTS[1]])
    return not all(torch.equal(a.model_output, b.model_output) for a, b in zip(steps, others, strict=True))


def _difference(flow: FlowPipeline) -> str | None:
    """What is wrong with the velocities, in words; `None` if nothing is."""
    try:
        return _velocity_difference(flow) or _batch_difference(flow)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}"


def _velocity_difference(flow: FlowPipeline) -> str | None:
    """Whether velocities are what the steps of a plain call see, and these lead from noise to data."""
    for group in [[0], [1]] if flow.family.one_sample else [[0, 1]]:
        steps, _ = _plain_call(flow, group)
        conditioning = flow.encode([PROMPTS[i] for i in group])
        if fault := _wrong_path(steps):
            return fault
        for step in steps:
            velocity = flow.velocity(step.sample, step.sigma.expand(len(group)), conditioning)
            if not _close(velocity, step.model_output):
                return "its velocity at a time is not what its own denoising step at that time sees"
    return None


def _batch_difference(flow: FlowPipeline) -> str | None:
    """Whether a sample's velocity depends on the other samples, or on their times."""
    steps = [_plain_call(flow, [i])[0] for i in range(len(PROMPTS))]
    samples = torch.cat([steps[i][0].sample for i in range(len(PROMPTS))])
    times = torch.stack([steps[i][i].sigma for i in range(len(PROMPTS))]).to(samples.device)
    for t in (times, times[:1].expand(len(PROMPTS))):
        together = flow.velocity(samples, t, flow.encode(PROMPTS))
        for i, prompt in enumerate(PROMPTS):
            if not _close(together[i : i + 1], flow.velocity(samples[i : i + 1], t[i : i + 1], flow.encode([prompt]))):
                return "the velocity of a sample depends on the other samples of its batch"
    return None


def _plain_call(flow: FlowPipeline, group: Sequence[int], **options: Any) -> tuple[list[Step], int]:
    """The steps of a call as users make it, by Euler's method, and how often the transformer ran."""
    driver = copy.copy(flow.pipeline)
    driver.set_progress_bar_config(disable=True)
    driver.scheduler = scheduler = _euler(flow.pipeline)
    euler_step, steps = scheduler.step, []

    @functools.wraps(euler_step)  # pipelines look at its signature
    def recorded(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        output = euler_step(model_output, timestep, sample, **kwargs)
        sigma, next_sigma = scheduler.sigmas[scheduler.step_index - 1 : scheduler.step_index + 1]
        steps.append(Step(sample.clone(), sigma, model_output.clone(), output[0].clone(), next_sigma))
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


def _euler(pipeline: DiffusionPipeline) -> Any:
    """The pipeline's own scheduler, or for a multistep one the Euler scheduler of the same shift."""
    own: Any = pipeline.scheduler
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        return copy.deepcopy(own)
    return FlowMatchEulerDiscreteScheduler(shift=own.config.get("flow_shift") or own.config.get("shift") or 1.0)


def _wrong_path(steps: Sequence[Step]) -> str | None:
    """Whether the steps lead from noise at time 1 to data at time 0 along v = noise - data."""
    sigmas = torch.stack([step.sigma for step in steps] + [steps[-1].next_sigma]).float()
    if not (0.9 < sigmas[0] <= 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()):
        return f"its times are {[round(sigma, 4) for sigma in sigmas.tolist()]}, not from 1 (noise) down to 0 (data)"
    spread = steps[0].sample.float().std().item()
    if not 0.5 < spread < 2:
        return f"it starts from latents with standard deviation {spread:.3g}, not from noise with 1"
    return None


def _close(values: Tensor, wanted: Tensor) -> bool:
    """Whether two results are the same but for rounding."""
    if values.shape != wanted.shape:
        return False
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 5e-2
    difference = (values.float() - wanted.float()).norm()
    return bool(difference <= tolerance * wanted.float().norm())  # False for NaN
