# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One way to condition, sample and differentiate any flow-matching diffusers pipeline."""

import copy
import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .families import find_family


FLOW_MATCHING_SCHEDULERS = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """
    Encoded prompts: what the pipeline's `__call__` takes in the place of text.

    Prompts are encoded once and then selected per sample: `flow.encode(unique_prompts).select(prompt_of_sample)`.

    Args:
        kwargs (`dict[str, torch.Tensor]`):
            `__call__` arguments by name, each of shape `[number of prompts, ...]`.

    Raises:
        `ValueError`: there is no tensor, or the tensors disagree about the number of prompts.
    """

    kwargs: dict[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in self.kwargs.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"conditioning tensors need one first dimension, a row per prompt; got {sizes}")

    def __len__(self) -> int:
        return next(iter(self.kwargs.values())).shape[0]

    def select(self, indices: Tensor) -> "Conditioning":
        """
        Rows by index, in the order of the indices; an index may come more than once.

        Args:
            indices (`torch.LongTensor` of shape `[n]`):
                Which rows to take.

        Returns:
            `Conditioning`: of length `n`.
        """
        return Conditioning({name: tensor[indices.to(tensor.device)] for name, tensor in self.kwargs.items()})

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same conditioning on another device."""
        return Conditioning({name: tensor.to(device) for name, tensor in self.kwargs.items()})


class Rollout(NamedTuple):
    """
    What is kept of sampled images.

    Args:
        latents (`torch.Tensor` of shape `[batch, ...]`):
            The clean latents x0 in the layout that the transformer sees (packed tokens for Flux).
        images (`list[PIL.Image.Image]` or `torch.Tensor` of shape `[batch, 3, height, width]`):
            The decoded images; values of a tensor are in [0, 1].
    """

    latents: Tensor
    images: list[PIL.Image.Image] | Tensor


class _OneStep:
    """
    Stands in for the pipeline's scheduler in a velocity call.

    It presents the wanted times as the only step of the schedule, keeps what the transformer returned and moves
    nothing.
    """

    order = 1

    def __init__(self, scheduler: Any, t: Tensor):
        self.config = scheduler.config
        # One "step" whose timestep is a whole batch: pipelines expand it to the batch size, which leaves it as it is.
        self.timesteps = [t * scheduler.config.num_train_timesteps]
        self.velocity: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Takes whatever a pipeline passes: the one step is known already."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """There is only index 0."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> tuple[Tensor]:
        self.velocity = model_output
        return (sample,)


class FlowPipeline:
    """
    A flow-matching diffusers pipeline with one convention for all families.

    The path is `x_t = (1 - t) * data + t * noise` with t in [0, 1], and the velocity is `v = noise - data`. Everything
    goes through the pipeline's own `__call__`, so that the time scale, the packing of latents, position ids and the
    guidance input are the pipeline's own business. Calls run on a shallow copy of the pipeline: its components are
    shared, but its scheduler, progress bar and other attributes stay as the caller left them, whatever happens.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of a class in `trl_marble.pipelines.FAMILIES` with a flow-matching scheduler.
        height (`int`, *optional*):
            Height of the images in pixels. Defaults to the pipeline's own.
        width (`int`, *optional*):
            Width of the images in pixels. Defaults to the pipeline's own.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            In the `"classifier_free"` families, values above 1 make *rollouts* use classifier-free guidance;
            velocities never do. In the `"embedded"` families it is the value that the transformer is given in both.
        max_sequence_length (`int`, *optional*):
            Longest text in tokens, as the pipeline's argument of that name. Defaults to the pipeline's own.

    Raises:
        `TypeError`: `pipeline` is not a `DiffusionPipeline`.
        `ValueError`: the pipeline is not flow matching, has no `transformer`, is of a class that is not in the table,
            or is given a guidance value that its transformer has no input for.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
    ):
        if not isinstance(pipeline, DiffusionPipeline):
            raise TypeError(
                f"`pipeline` must be a diffusers.DiffusionPipeline, got {type(pipeline).__name__}. Load one with "
                "trl_marble.pipelines.load_pipeline or DiffusionPipeline.from_pretrained."
            )
        check_flow_matching(pipeline.components.get("scheduler"))
        if pipeline.components.get("transformer") is None:
            raise ValueError(
                f"{type(pipeline).__name__} has no `transformer` to train (its components: "
                f"{sorted(pipeline.components)}). Use a transformer-based flow-matching pipeline."
            )
        self.pipeline = pipeline
        self.family = find_family(pipeline)
        self.height = height
        self.width = width
        self.guidance_scale = guidance_scale
        call_arguments = inspect.signature(self.family.pipeline_class.__call__).parameters
        self.max_sequence_length: int = (
            call_arguments["max_sequence_length"].default if max_sequence_length is None else max_sequence_length
        )
        self._warned_of_long_prompt = False
        if self.family.guidance == "embedded" and guidance_scale > 1 and not self.transformer.config.guidance_embeds:
            raise ValueError(
                f"guidance_scale={guidance_scale} would be ignored: this {type(self.transformer).__name__} is not "
                "guidance-distilled (its config has guidance_embeds=False). Set guidance_scale=1.0."
            )

    @property
    def transformer(self) -> ModelMixin:
        """The denoiser, the component that is trained."""
        return self.pipeline.transformer

    @property
    def device(self) -> torch.device:
        """The device of the transformer."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the transformer's base weights, whatever the dtype of adapters on top of them."""
        return self.transformer.dtype

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """
        Encode prompts with the pipeline's own text encoders.

        Warns once in the life of this object when a prompt is longer than the text encoders read.

        Args:
            prompts (`Sequence[str]`):
                The prompts.

        Returns:
            `Conditioning`: one row per prompt, in the transformer's dtype. With classifier-free guidance it holds the
            embeddings of the empty negative prompt too.

        Raises:
            `TypeError`: `prompts` is one string.
            `ValueError`: there are no prompts.
        """
        if isinstance(prompts, str):
            raise TypeError(f"`prompts` must be a sequence of strings, got one string: pass [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("`prompts` is empty; pass at least one prompt.")
        self._warn_of_long_prompts(prompts)
        arguments = dict(self.family.encode_arguments, max_sequence_length=self.max_sequence_length)
        if self.family.guidance == "classifier_free":
            arguments["do_classifier_free_guidance"] = self.guidance_scale > 1
        outputs = self.pipeline.encode_prompt(list(prompts), **arguments)
        return Conditioning(
            {
                name: output.to(self.dtype)
                for name, output in zip(self.family.encoded_names, outputs, strict=True)
                if name is not None and output is not None
            }
        )

    def rollout(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        num_inference_steps: int,
        output_type: Literal["pil", "pt"] = "pil",
        scheduler: SchedulerMixin | None = None,
    ) -> Rollout:
        """
        Sample one image per row of the conditioning.

        Every sample draws its initial noise from a CPU generator of its own, so that it depends neither on the other
        samples of its batch nor on the device. (A stochastic solver draws further noise from torch's global
        generator.) The transformer samples in evaluation mode.

        Args:
            conditioning (`Conditioning`):
                The encoded prompts, of length `batch`.
            seeds (`Sequence[int]`):
                One seed per sample.
            num_inference_steps (`int`):
                Number of denoising steps, at least 1.
            output_type (`"pil"` or `"pt"`, *optional*, defaults to `"pil"`):
                Images as a list of PIL images or as one tensor.
            scheduler ([`~diffusers.SchedulerMixin`], *optional*):
                Another flow-matching solver. Defaults to the pipeline's scheduler. It is copied, never changed.

        Returns:
            `Rollout`: the clean latents and the images.

        Raises:
            `ValueError`: the number of seeds is not the number of prompts, `num_inference_steps` is below 1 or
                `scheduler` is not flow matching.
        """
        if len(seeds) != len(conditioning):
            raise ValueError(f"got {len(seeds)} seeds for {len(conditioning)} prompts; pass one seed per prompt.")
        solver = self._fresh_solver(num_inference_steps, scheduler)
        latents: list[Tensor] = []

        def keep_latents(_: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
            latents[:] = [tensors["latents"]]
            return {}

        was_training = self.transformer.training
        self.transformer.eval()
        try:
            output = self._driver(solver)(
                **conditioning.kwargs,
                **self._image_size(),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=num_inference_steps,
                guidance_scale=self.guidance_scale,
                max_sequence_length=self.max_sequence_length,
                output_type=output_type,
                callback_on_step_end=keep_latents,
            )
        finally:
            self.transformer.train(was_training)
        return Rollout(latents=latents[0], images=output.images)

    def velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The transformer's velocity `v = noise - data`, differentiable.

        Gradients, autocast and gradient checkpointing follow the context of the call. Classifier-free guidance is
        never used; a guidance-distilled transformer is given `guidance_scale`.

        Args:
            x_t (`torch.Tensor` of shape `[batch, ...]`):
                Noisy latents in the layout of `Rollout.latents`.
            t (`torch.Tensor` of shape `[batch]`):
                The time of every sample in [0, 1]; 0 is data, 1 is noise.
            conditioning (`Conditioning`):
                The encoded prompts, of length `batch`.

        Returns:
            `torch.Tensor`: the velocity, of the shape and dtype of `x_t`.

        Raises:
            `ValueError`: `t` or `conditioning` does not have one entry per sample.
        """
        batch = x_t.shape[0]
        if t.shape != (batch,) or len(conditioning) != batch:
            raise ValueError(
                f"x_t has {batch} samples, but t has shape {tuple(t.shape)} and the conditioning {len(conditioning)} "
                "rows; pass one time and one row per sample."
            )
        solver = _OneStep(self.pipeline.scheduler, t.to(device=x_t.device, dtype=torch.float32))
        self._call_with_gradients(
            self._driver(solver),
            _without_negatives(conditioning.kwargs),
            latents=x_t,
            num_inference_steps=1,
        )
        if solver.velocity is None:
            raise RuntimeError(f"{type(self.pipeline).__name__} ended without a denoising step.")
        return solver.velocity.to(x_t.dtype)

    def training_times(self, num_inference_steps: int, scheduler: SchedulerMixin | None = None) -> Tensor:
        """
        The times at which a rollout evaluates the transformer.

        The pipeline sets the schedule up itself, with every shift that depends on the resolution, and the times are
        read from the scheduler's `sigmas`: some solvers truncate their `timesteps` to integers.

        Args:
            num_inference_steps (`int`):
                Number of denoising steps, at least 1.
            scheduler ([`~diffusers.SchedulerMixin`], *optional*):
                The solver that the rollouts use. Defaults to the pipeline's scheduler. It is copied, never changed.

        Returns:
            `torch.Tensor` of shape `[num_inference_steps]`: distinct times in (0, 1], descending, fp32 on the CPU.

        Raises:
            `ValueError`: `num_inference_steps` is below 1 or `scheduler` is not flow matching.
        """
        solver = self._fresh_solver(num_inference_steps, scheduler)
        set_timesteps = solver.set_timesteps
        times: list[Tensor] = []

        @functools.wraps(set_timesteps)  # pipelines look at its signature
        def record_times(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            times[:] = [solver.sigmas[: len(solver.timesteps)]]
            solver.timesteps = solver.timesteps[:0]  # leaves the denoising loop nothing to do

        solver.set_timesteps = record_times
        with torch.no_grad():
            self._call_with_gradients(
                self._driver(solver),
                _without_negatives(self.encode([""]).kwargs),
                # Its own generator: the initial noise, though not used, must not advance torch's global one.
                generator=torch.Generator("cpu").manual_seed(0),
                num_inference_steps=num_inference_steps,
            )
        # Solvers of higher order come back to a time; each counts once.
        return torch.unique_consecutive(times[0].to(device="cpu", dtype=torch.float32))

    def _fresh_solver(self, num_inference_steps: int, scheduler: SchedulerMixin | None) -> Any:
        """A copy of the scheduler to run with: solvers hold state, and the caller's must not change."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if scheduler is None:
            scheduler = self.pipeline.scheduler
        check_flow_matching(scheduler)
        return copy.deepcopy(scheduler)

    def _driver(self, solver: Any) -> Any:
        """The pipeline with another solver and without a progress bar, as a copy that shares all other components."""
        driver = copy.copy(self.pipeline)
        driver.set_progress_bar_config(disable=True)
        driver.scheduler = solver
        return driver

    def _call_with_gradients(self, driver: Any, kwargs: dict[str, Tensor], **options: Any) -> None:
        """The pipeline's `__call__` without its `no_grad` decorator and without classifier-free guidance."""
        inspect.unwrap(type(driver).__call__)(
            driver,
            **kwargs,
            **self._image_size(),
            **options,
            guidance_scale=self.guidance_scale if self.family.guidance == "embedded" else 1.0,
            max_sequence_length=self.max_sequence_length,
            output_type="latent",
        )

    def _image_size(self) -> dict[str, int | None]:
        return {"height": self.height, "width": self.width}

    def _warn_of_long_prompts(self, prompts: Sequence[str]) -> None:
        if self._warned_of_long_prompt:
            return
        components = self.pipeline.components
        if components[self.family.long_text_encoder] is not None:
            tokenizer, limit = components[self.family.long_text_tokenizer], self.max_sequence_length
        else:
            tokenizer = components["tokenizer"]
            limit = tokenizer.model_max_length
        lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
        too_long = [index for index, length in enumerate(lengths) if length > limit]
        if not too_long:
            return
        first = too_long[0]
        warnings.warn(
            f"The prompt {prompts[first]!r} has {lengths[first]} tokens, but the text encoders read only the first "
            f"{limit}; what follows does not reach the image. {len(too_long)} of these {len(prompts)} prompts are too "
            "long. Shorten them, or raise `max_sequence_length` where the text encoder allows it. This is said once.",
            UserWarning,
            stacklevel=4,  # the caller of encode, beyond its no_grad decorator
        )
        self._warned_of_long_prompt = True


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


def _without_negatives(kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in kwargs.items() if not name.startswith("negative_")}
