# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How a diffusers pipeline is called: with which arguments, on which copy of it, and in which precision."""

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from .conditioning import Conditioning
from .families import Family
from .overrides import encode_once
from .precision import autocast_calls, autocast_for
from .schedulers import check_flow_matching, has_inverted_time


@dataclass(frozen=True, eq=False)
class PipelineCalls:
    """
    The calls of a pipeline with one choice of settings, see [`~trl_marble.pipelines.FlowPipeline`].

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline. It stays as it is: calls run on copies that share its components.
        family (`Family`):
            Its row of the table.
        height (`int`, *optional*):
            Height of the images in pixels.
        width (`int`, *optional*):
            Width of the images in pixels.
        num_frames (`int`, *optional*):
            Number of frames of a video.
        max_sequence_length (`int`, *optional*):
            Longest text in tokens. `None` where the pipeline has no such argument.
        guidance_scale (`float`):
            At least 1, which is no guidance.
        autocast_dtype (`torch.dtype`, *optional*):
            The dtype of autocast for the transformer.
    """

    pipeline: DiffusionPipeline
    family: Family
    height: int | None
    width: int | None
    num_frames: int | None
    max_sequence_length: int | None
    guidance_scale: float
    autocast_dtype: torch.dtype | None

    @property
    def transformer(self) -> ModelMixin:
        """The denoiser."""
        return self.pipeline.transformer

    @property
    def is_guided(self) -> bool:
        """Whether rollouts use classifier-free guidance."""
        return self.family.guidance == "classifier_free" and self.guidance_scale > 1

    @property
    def splits_batches(self) -> bool:
        """Whether one call is limited to one time or to one sample, whatever the conditioning."""
        # The loop of the 5B of Wan 2.2 writes the time of the batch into every token.
        expands_time = bool(self.pipeline.config.get("expand_timesteps"))
        return self.family.one_time or self.family.one_sample or expands_time

    def takes_one_sample(self, conditioning: Conditioning) -> bool:
        """Whether one call is limited to one row of the conditioning."""
        return self.family.one_sample or "image" in conditioning.kwargs

    def arguments(self, conditioning: Conditioning, guided: bool = False) -> dict[str, Any]:
        """The arguments of `__call__`, see [`~trl_marble.pipelines.FlowPipeline.call_arguments`]."""
        family = self.family
        arguments = {
            **family.arguments,
            "max_sequence_length": self.max_sequence_length,
        }
        # Only what was set: many pipelines have a number as default and fail at `None`.
        if self.height is not None:
            arguments["height"] = self.height
        if self.width is not None:
            arguments["width"] = self.width
        if self.height is not None and self.width is not None:
            arguments["max_area"] = self.height * self.width  # Flux Kontext scales every size to it, or to a million
        if self.num_frames is not None:
            arguments[family.num_frames_argument] = self.num_frames
        if guided:  # with embeddings the text must be None, which is not every pipeline's default
            arguments["negative_prompt"] = [""] * len(conditioning) if family.encoded_names is None else None
        # Copies: some pipelines write into the lists that they are given.
        rows: dict[str, Any] = {
            name: row if isinstance(row, Tensor) else list(row)
            for name, row in conditioning.kwargs.items()
            if guided or not name.startswith("negative_")
        }
        if "image" in rows:
            (rows["image"],) = rows["image"]  # there is one sample, and a list could mean several images of it
        scale = self.guidance_scale if guided or family.guidance == "embedded" else 1.0
        pipeline_class: Any = family.pipeline_class
        return known_arguments(pipeline_class.__call__, arguments) | family.guidance_arguments(scale) | rows

    def fresh_solver(self, num_inference_steps: int, scheduler: SchedulerMixin | None) -> Any:
        """A copy of the scheduler: solvers have state, and that of the caller's must not change."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if scheduler is None:
            scheduler = self.pipeline.scheduler
        check_flow_matching(scheduler)
        inverts, should_invert = has_inverted_time(scheduler), has_inverted_time(self.pipeline.scheduler)
        if inverts != should_invert:
            raise ValueError(
                f"With invert_sigmas={inverts} time runs in the other direction in this {type(scheduler).__name__} "
                f"than in {type(self.pipeline).__name__}. Use a scheduler with invert_sigmas={should_invert} in "
                "its config."
            )
        return copy.deepcopy(scheduler)

    def driver(self, solver: Any, conditioning: Conditioning) -> Any:
        """A copy of the pipeline with another solver and without a progress bar; other components are shared."""
        driver = copy.copy(self.pipeline)
        driver.set_progress_bar_config(disable=True)
        driver.scheduler = solver
        if self.family.encoded_names is None:
            driver.encode_prompt = encode_once(driver.encode_prompt, conditioning)
        return driver

    def run_with_gradients(self, driver: Any, conditioning: Conditioning, **options: Any) -> None:
        """Run the pipeline's `__call__` without its `no_grad` decorator and without classifier-free guidance."""
        with self.precision():
            inspect.unwrap(type(driver).__call__)(
                driver, **self.arguments(conditioning, guided=False), **options, output_type="latent"
            )

    def precision(self) -> AbstractContextManager[None]:
        """The context of all calls, see [`~trl_marble.pipelines.FlowPipeline.precision`]."""
        if self.autocast_dtype is None:
            return nullcontext()
        components = self.pipeline.components.items()
        modules = [part for name, part in components if isinstance(part, nn.Module) and "transformer" in name]
        return autocast_calls(modules, self.autocast_dtype)

    def call_transformer(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer in its precision, without the conversion of its output."""
        if self.autocast_dtype is None:
            return self.transformer(*args, **kwargs)
        with autocast_for(self.transformer, self.autocast_dtype):
            return self.transformer(*args, **kwargs)


def known_arguments(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """
    The values that a function has an argument for.

    Args:
        function (`Callable`):
            The function.
        values (`dict[str, Any]`):
            Values by name.
    """
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in parameters}
