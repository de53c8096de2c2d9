# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which schedulers are flow matching, and changed schedulers for one step, for the samples and for the times."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor


FLOW_MATCHING_SCHEDULERS = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)


def check_flow_matching(scheduler: SchedulerMixin | None) -> None:
    """
    Refuse a scheduler that is not flow matching.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`] or `None`):
            A pipeline's scheduler.

    Raises:
        `ValueError`: it is neither one of diffusers' `FlowMatch*` schedulers nor a solver that is configured with both
            `prediction_type="flow_prediction"` and `use_flow_sigmas=True`.
    """
    if isinstance(scheduler, FLOW_MATCHING_SCHEDULERS):
        return
    config: Mapping[str, Any] = scheduler.config if isinstance(scheduler, ConfigMixin) else {}
    prediction_type, flow_sigmas = config.get("prediction_type"), config.get("use_flow_sigmas")
    if prediction_type == "flow_prediction" and flow_sigmas:
        return
    raise ValueError(
        f"The scheduler {type(scheduler).__name__} (prediction_type={prediction_type!r}, "
        f"use_flow_sigmas={flow_sigmas!r}) is not flow matching, and only flow-matching pipelines can be trained. Use "
        "a pipeline that was trained with flow matching (Stable Diffusion 3, Flux, ...) and its "
        "FlowMatchEulerDiscreteScheduler, or a multistep solver made with "
        'prediction_type="flow_prediction", use_flow_sigmas=True and flow_shift set to the shift of the original.'
    )


def has_inverted_time(scheduler: SchedulerMixin) -> bool:
    """
    Whether a scheduler's time runs from 0 at noise to 1 at data, so that its velocity is data - noise.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            A flow-matching scheduler.

    Returns:
        `bool`: the `invert_sigmas` of its config, which Mochi's scheduler has.
    """
    return bool(scheduler.config.get("invert_sigmas"))


class OneStep:
    """
    Stands in for the pipeline's scheduler in a velocity call.

    Its schedule is one step at the given times. The step stores what the transformer returned and leaves the latents
    as they are. Where a transformer's raw output is data - noise, the pipelines negate it before they call `step`.
    Where they call `step` with data - noise (see [`has_inverted_time`]), it is negated here.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            The scheduler that it stands in for.
        t (`torch.Tensor` of shape `[batch]` or `[]`):
            The time of every sample, or one for all, in [0, 1].
        when_done (`Callable[[], None]`, *optional*):
            Called when the velocity is there.
    """

    order = 1

    def __init__(self, scheduler: Any, t: Tensor, when_done: Callable[[], None] | None = None):
        self.config = scheduler.config
        self._is_inverted = has_inverted_time(scheduler)
        t = 1 - t if self._is_inverted else t
        # One "step" whose timestep is a whole batch: pipelines expand it to the batch size, which leaves it as it is.
        self.timesteps = [t * scheduler.config.num_train_timesteps]
        # Some pipelines pass them to caches of activations; nothing is computed from them.
        self.sigmas = [torch.ones(()), torch.zeros(())]
        self.velocity: Tensor | None = None
        self._when_done = when_done

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Does nothing, whatever a pipeline passes: the schedule is fixed."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Does nothing: the only index is 0."""

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[Tensor]:
        # With times per token the pipelines pass data - noise as well.
        is_negative = self._is_inverted or per_token_timesteps is not None
        self.velocity = -model_output if is_negative else model_output
        if self._when_done is not None:
            self._when_done()
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)


def keep_samples(solver: Any, after_step: Callable[[], None]) -> list[Tensor]:
    """
    Make a scheduler store the samples that its latest step returned.

    Args:
        solver ([`~diffusers.SchedulerMixin`]):
            A scheduler that is used for nothing else, changed in place.
        after_step (`Callable[[], None]`):
            Called after each step.

    Returns:
        `list[torch.Tensor]`: empty; after a `step` it contains the samples of that step alone.
    """
    step = solver.step
    latest: list[Tensor] = []

    @functools.wraps(step)  # pipelines look at its signature
    def keep(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        latest[:] = [output[0]]
        after_step()
        return output

    solver.step = keep
    return latest


def record_times(solver: Any) -> list[Tensor]:
    """
    Make a scheduler store the schedule that a pipeline sets up with it, and skip the denoising loop.

    The times are read from `sigmas`: some solvers truncate their `timesteps` to integers.

    Args:
        solver ([`~diffusers.SchedulerMixin`]):
            A scheduler that is used for nothing else, changed in place.

    Returns:
        `list[torch.Tensor]`: empty; after `set_timesteps` it contains the times.
    """
    set_timesteps = solver.set_timesteps
    times: list[Tensor] = []

    @functools.wraps(set_timesteps)  # pipelines look at its signature
    def record(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        sigmas = solver.sigmas[: len(solver.timesteps)]
        times[:] = [1 - sigmas if has_inverted_time(solver) else sigmas]
        solver.timesteps = solver.timesteps[:0]

    solver.set_timesteps = record
    return times
