# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A pipeline's Euler scheduler that adds noise in some of its steps, and keeps what it went through."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..sde import SDESteps, SDEWindow, Transitions
from ..seeding import Draw, derive_seed
from .schedulers import has_inverted_time


MIN_DEVIATION = 0.01  # of the noise of a step


def euler_of(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """
    A copy of a pipeline's own scheduler, or for a multistep solver the Euler scheduler of the same shift.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            A flow-matching scheduler.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return copy.deepcopy(scheduler)
    return FlowMatchEulerDiscreteScheduler(
        shift=scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
    )


class SDESolver:
    """
    Makes an Euler scheduler add noise in a window of its steps, see [`~trl_marble.sde.SDEWindow`]. The others are its
    own.

    The latents of the window are kept as the pipeline has them, also where that is in half precision: the next step
    begins there, and so the probability of a step must be that of going there.

    Args:
        solver (`diffusers.FlowMatchEulerDiscreteScheduler`):
            A scheduler that is used for one call of a pipeline, changed in place.
        window ([`~trl_marble.sde.SDEWindow`]):
            The steps that add noise.
        seeds (`Sequence[int]`):
            The seed of each sample, from which that of its noise follows: samples do not depend on their batch.

    Raises:
        `ValueError`: the scheduler adds noise of its own.
    """

    def __init__(self, solver: Any, window: SDEWindow, seeds: Sequence[int]) -> None:
        if solver.config.stochastic_sampling:
            raise ValueError(
                f"The {type(solver).__name__} has stochastic_sampling=True: it adds noise in every step, of which no "
                "probability is known. Load it with stochastic_sampling=False."
            )
        self._solver, self._window = solver, window
        # Not the seed itself, with which the noise would be the sample's initial noise again.
        self._generators = [torch.Generator().manual_seed(derive_seed(seed, Draw.SOLVER)) for seed in seeds]
        self._points: list[Tensor] = []
        self._returned: Tensor | None = None
        euler_step = solver.step

        @functools.wraps(euler_step)  # pipelines look at its signature
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("per_token_timesteps") is not None:
                raise ValueError("The pipeline gives every token a time of its own; noise needs one time for all.")
            output = euler_step(model_output, timestep, sample, *args, **kwargs)
            moved = self._after_step(model_output, sample, solver.step_index - 1)
            if moved is None:
                return output
            moved = moved.to(output[0].dtype)
            self._returned = moved.clone()
            return (moved,) if isinstance(output, tuple) else type(output)(prev_sample=moved)

        solver.step = step

    def transitions(self) -> Transitions:
        """What the steps of the window went through, when the call is over."""
        return Transitions(torch.stack(self._points, dim=1), self._times.cpu().float(), self._window.begin)

    @property
    def _times(self) -> Tensor:
        """The times of all steps, and the end of the last one."""
        sigmas = self._solver.sigmas
        return 1 - sigmas if has_inverted_time(self._solver) else sigmas

    def _after_step(self, model_output: Tensor, sample: Tensor, index: int) -> Tensor | None:
        """Keep a point of the window; where a step with noise goes to, `None` for the others."""
        place = index - self._window.begin
        if 0 <= place <= self._window.size:
            self._keep(sample)
        return self._move(model_output, sample, index) if 0 <= place < self._window.size else None

    def _keep(self, sample: Tensor) -> None:
        """Keep a point of the window, which must be the one that the step before it went to."""
        if self._returned is not None:
            expected = self._returned.to(sample.dtype)
            if not torch.equal(sample.nan_to_num(), expected.nan_to_num()):
                raise ValueError(
                    "The pipeline changes the latents between two steps, so that the probability of a step is not "
                    "known; it cannot be trained on transitions."
                )
        self._points.append(sample.to(torch.float32, copy=True))

    def _move(self, model_output: Tensor, sample: Tensor, index: int) -> Tensor:
        """Where a step with noise goes to, in float32."""
        times = self._times
        if index + 1 >= len(times) - 1:
            raise ValueError(
                f"Step {index + 1} of {len(times) - 1} is to add noise, and the last one must not: images would keep "
                "it. Use more steps."
            )
        x = sample.float()
        velocity = -model_output.float() if has_inverted_time(self._solver) else model_output.float()
        step = SDESteps.of_grid(self._window.kind, self._window.noise_level, times).at(index)
        if 0 < step.deviation < MIN_DEVIATION:
            raise ValueError(
                f"Step {index + 1} of {len(times) - 1} ends at t = {step.t_next:.3g}, where {self._window.kind} adds "
                f"noise of deviation {step.deviation:.2g}: so little that the step's probability would outweigh those "
                "of all others. Use a smaller window (`grpo_window_size`)."
            )
        step = step.expand(x)
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in self._generators]).to(x)
        return step.mean(x, velocity) + step.deviation.view(-1, *[1] * (x.ndim - 1)) * noise
