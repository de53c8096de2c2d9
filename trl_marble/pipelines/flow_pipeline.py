# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One way to condition, sample and differentiate any flow-matching diffusers pipeline."""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL.Image
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from ..media import to_rgb
from ..sde import SDEWindow, Transitions
from ..step_times import StepTimes
from .acceleration import Acceleration
from .assumed_family import assume_family
from .conditioning import Conditioning, Rows
from .embedding_cache import EmbeddingCache, encoder_fingerprint, in_chunks, join_rows
from .families import find_family
from .overrides import encode_once, replace_latents
from .pipeline_checks import check_guidance, check_images, check_size, check_trainable
from .precision import autocast_calls, autocast_for
from .prompt_length import describe_long_prompts
from .quantization import base_dtype
from .recording import Circumstances, Recorder, Recording, autocast_of
from .schedulers import (
    FLOW_MATCHING_SCHEDULERS,
    OneStep,
    check_flow_matching,
    has_inverted_time,
    keep_samples,
    record_times,
)
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


class FlowPipeline:
    """
    A flow-matching diffusers pipeline with one convention for all families.

    The path is `x_t = (1 - t) * data + t * noise` with t in [0, 1], and the velocity is `v = noise - data`. Everything
    goes through the pipeline's own `__call__`, which sets the time scale, packs the latents and makes position ids and
    the guidance input. Calls run on a shallow copy of the pipeline: its components are shared, but its scheduler,
    progress bar and other attributes stay as the caller left them, also after an error.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline with a flow-matching scheduler, of a class in `trl_marble.pipelines.FAMILIES`. Another class is
            called with text and without guidance; call [`verify_velocities`] before any other use.
        height (`int`, *optional*):
            Height of the images in pixels. Defaults to the pipeline's own.
        width (`int`, *optional*):
            Width of the images in pixels. Defaults to the pipeline's own.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            In the `"classifier_free"` families, at least 1: *rollouts* follow `negative + guidance_scale * (positive -
            negative)`, so 1 is no guidance and does not run the negative prompt; velocities are never guided. It has
            this meaning in every such family: the pipelines of Z-Image and Krea 2, whose own `guidance_scale` is 0
            without guidance, are called with 1 less. In the `"embedded"` families the transformer takes the value as
            an input, in rollouts and velocities alike.
        max_sequence_length (`int`, *optional*):
            Longest text in tokens, the pipeline's argument of that name. Defaults to the pipeline's own.
        num_frames (`int`, *optional*):
            Number of frames of a video; diffusers rounds it to what the VAE can make. Defaults to the pipeline's own.
        autocast_dtype (`torch.dtype`, *optional*):
            The dtype of autocast for the transformer, such as `torch.bfloat16`, in rollouts and velocities alike. The
            other components compute in their own dtype, and so does the transformer by default.
        reference_guidance_scale (`float`, *optional*):
            Guidance scale of [`~FlowPipeline.reference_velocity`], in the convention of `guidance_scale`. By default
            it is the velocity as it is.

    Raises:
        `TypeError`: `pipeline` is not a `DiffusionPipeline`.
        `ValueError`: the pipeline is not flow matching, has no `transformer` or two of them for different times, or
            is of a class that is known not to work; a guidance scale is below 1 or would be ignored; only one of
            `height` and `width` is given, and the pipeline would change it; or the pipeline has no argument
            `max_sequence_length` or `num_frames`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
        num_frames: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        reference_guidance_scale: float | None = None,
    ):
        check_trainable(pipeline)
        self.pipeline = pipeline
        family = find_family(pipeline)
        self.is_listed = family is not None
        self.family = family or assume_family(pipeline)
        check_size(pipeline, self.family, height, width, num_frames)
        for scale in {
            guidance_scale,
            guidance_scale if reference_guidance_scale is None else reference_guidance_scale,
        }:
            check_guidance(pipeline, self.family, scale)
        self.height = height
        self.width = width
        self.guidance_scale = guidance_scale
        self.reference_guidance_scale = reference_guidance_scale
        pipeline_class: Any = self.family.pipeline_class
        self._encode_parameters = inspect.signature(pipeline_class.encode_prompt).parameters
        self._call_parameters = inspect.signature(pipeline_class.__call__).parameters
        self.max_sequence_length: int | None = self._find_length_limit(max_sequence_length)
        self.num_frames = num_frames
        self.autocast_dtype = autocast_dtype
        self._warned_of_long_prompt = False
        self._embeddings: EmbeddingCache | None = None
        self._encoder_device: torch.device | None = None  # where it is not the transformer's
        self._has_text_encoders = True

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
        """The dtype that the transformer computes in, whatever the dtype of its adapters and of quantized weights."""
        return base_dtype(self.transformer)

    @property
    def splits_batches(self) -> bool:
        """Whether one call of the pipeline is limited to one time or to one sample, even without images to edit."""
        # The loop of the 5B of Wan 2.2 writes the time of the batch into every token.
        expands_time = bool(self.pipeline.config.get("expand_timesteps"))
        return self.family.one_time or self.family.one_sample or expands_time

    def precision(self) -> AbstractContextManager[None]:
        """
        The context of all calls of the pipeline. With `autocast_dtype` its transformer runs under autocast, and so
        does the second transformer for unconditional predictions that some pipelines have.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        components = self.pipeline.components.items()
        modules = [part for name, part in components if isinstance(part, nn.Module) and "transformer" in name]
        return autocast_calls(modules, self.autocast_dtype)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], images: Sequence[PIL.Image.Image] | None = None) -> Conditioning:
        """
        Encode prompts with the pipeline's own text encoders.

        Warns when a prompt is longer than the text encoders read, once per `FlowPipeline`.

        Args:
            prompts (`Sequence[str]`):
                The prompts.
            images (`Sequence[PIL.Image.Image]`, *optional*):
                The images to be edited, one per prompt, for a family that edits images.

        Returns:
            `Conditioning`: one row per prompt, in the transformer's dtype. With classifier-free guidance (of rollouts
            or of the reference) it has the embeddings of the empty negative prompt too. For a pipeline that takes no
            embeddings it has the text, and the text encoders run when it is used. Images are in RGB, see
            [`~trl_marble.media.to_rgb`].

        Raises:
            `TypeError`: `prompts` is one string.
            `ValueError`: there are no prompts; there is not one image per prompt; or there are no images where the
                family needs them, or images where it takes none.
        """
        if isinstance(prompts, str):
            raise TypeError(f"`prompts` must be a sequence of strings, got one string: pass [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("`prompts` is empty; pass at least one prompt.")
        check_images(self.pipeline, self.family, prompts, images)
        if self._has_text_encoders and not self._warned_of_long_prompt:  # whose limits count
            message = describe_long_prompts(self.pipeline, self.family, self.max_sequence_length, prompts)
            if message is not None:
                warnings.warn(message, UserWarning, stacklevel=3)  # the caller, beyond the no_grad decorator
                self._warned_of_long_prompt = True
        rows: dict[str, Rows] = {} if images is None else {"image": [to_rgb(image) for image in images]}
        if self.family.encoded_names is None:
            return Conditioning({**rows, "prompt": list(prompts)})
        rows |= self._encode_in_chunks(list(prompts), self.family.encoded_names)
        if self._encodes_negatives and self.family.negative_names is not None:
            rows |= self._encode_in_chunks([""] * len(prompts), self.family.negative_names)
        conditioning = Conditioning(rows)
        return conditioning if self._embeddings is None else conditioning.to(self.device)

    def cache_embeddings(self, folder: str | os.PathLike, device: torch.device | str | None = None) -> None:
        """
        Keep the embeddings of prompts on disk from now on, and read those that are there already.

        They are found by their prompt and a fingerprint of the text encoders, their weights and all settings.

        Args:
            folder (`str` or `os.PathLike`):
                Where to keep them, in safetensors files.
            device (`torch.device` or `str`, *optional*):
                Where to compute them: the text encoders are moved there. Defaults to the transformer's device, with
                the text encoders where they are.

        Raises:
            `ValueError`: the pipeline takes no embeddings.
        """
        if self.family.encoded_names is None:
            raise ValueError(
                f"{type(self.pipeline).__name__} takes no embeddings but text, so there are none to keep. Set "
                "cache_embeddings=False."
            )
        settings = [
            type(self.pipeline).__name__,
            sorted(self.family.arguments.items()),
            self.family.encoded_names,
            self.family.negative_names,
            self.max_sequence_length,
            self._encodes_negatives,
            self.dtype,
        ]
        self._embeddings = EmbeddingCache(Path(folder), encoder_fingerprint(self.pipeline, settings))
        if device is not None:
            self._encoder_device = torch.device(device)
            for name in self._text_encoders:
                self.pipeline.components[name].to(device)

    def drop_text_encoders(self) -> None:
        """
        Remove the text encoders from the pipeline, whose embeddings are all on disk (see [`cache_embeddings`]). No
        other prompt can be encoded then.

        Raises:
            `RuntimeError`: embeddings are not kept on disk.
        """
        if self._embeddings is None:
            raise RuntimeError("Without text encoders nothing can be encoded; call `cache_embeddings` first.")
        for name in self._text_encoders:
            setattr(self.pipeline, name, None)
        self._has_text_encoders = False

    @property
    def _text_encoders(self) -> list[str]:
        """The names of the text encoders that the pipeline has."""
        components = self.pipeline.components.items()
        return [name for name, part in components if name.startswith("text_encoder") and part is not None]

    def with_size(self, height: int | None, width: int | None) -> "FlowPipeline":
        """
        The same pipeline for images of another size.

        Args:
            height (`int`, *optional*):
                Height of the images in pixels. Defaults to the pipeline's own.
            width (`int`, *optional*):
                Width of the images in pixels. Defaults to the pipeline's own.

        Raises:
            `ValueError`: only one of them is given, and the pipeline would change it.
        """
        check_size(self.pipeline, self.family, height, width, self.num_frames)
        other = copy.copy(self)
        other.height, other.width = height, width
        return other

    def encode_any(self) -> Conditioning:
        """One row that the pipeline can be called with, where it does not matter with which."""
        any_image = PIL.Image.new("RGB", (self.width or 512, self.height or 512))
        return self.encode([self.family.empty_prompt], [any_image] if self.family.takes_image == "required" else None)

    def rollout(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        num_inference_steps: int,
        output_type: Literal["pil", "pt"] = "pil",
        scheduler: SchedulerMixin | None = None,
        times: StepTimes | None = None,
        acceleration: Acceleration | None = None,
        sde: SDEWindow | None = None,
    ) -> Rollout:
        """
        Sample one image or video per row of the conditioning.

        Every sample has its own CPU generator for its initial noise, so that it depends neither on the other samples
        of its batch nor on the device. (A stochastic solver draws further noise from torch's global generator.) The
        transformer is in evaluation mode meanwhile.

        Args:
            conditioning (`Conditioning`):
                The encoded prompts, of length `batch`.
            seeds (`Sequence[int]`):
                One seed per sample.
            num_inference_steps (`int`):
                Number of denoising steps, at least 1.
            output_type (`"pil"` or `"pt"`, *optional*, defaults to `"pil"`):
                Images as PIL images or as one tensor.
            scheduler ([`~diffusers.SchedulerMixin`], *optional*):
                Another flow-matching solver. Defaults to the pipeline's scheduler. It is copied, never changed.
            times ([`~trl_marble.step_times.StepTimes`], *optional*):
                What is added to: from the last solver step to the images is `"decode"`. Defaults to measuring nothing.
            acceleration ([`~trl_marble.pipelines.Acceleration`], *optional*):
                How to sample faster, for other images. Defaults to the pipeline as it is.
            sde ([`~trl_marble.sde.SDEWindow`], *optional*):
                Steps that add noise, of which `Rollout.transitions` are kept. The solver is Euler's then, with the
                pipeline's schedule. Defaults to none.

        Returns:
            `Rollout`: the clean latents and the images.

        Raises:
            `ValueError`: the number of seeds is not the number of prompts, `num_inference_steps` is below 1 or
                `scheduler` is not flow matching or its time runs in the other direction; or with `sde`, a step's
                probability would not be known.
        """
        if len(seeds) != len(conditioning):
            raise ValueError(f"got {len(seeds)} seeds for {len(conditioning)} prompts; pass one seed per prompt.")
        was_training = self.transformer.training
        self.transformer.eval()
        options = (num_inference_steps, output_type, scheduler, times, acceleration, sde)
        try:
            if not self._takes_one_sample(conditioning):
                return self._sample(conditioning, seeds, *options)
            rollouts = [
                self._sample(conditioning.select(torch.tensor([i])), [seed], *options) for i, seed in enumerate(seeds)
            ]
        finally:
            self.transformer.train(was_training)
        images: list[Any] = [image for rollout in rollouts for image in rollout.images]
        return Rollout(
            latents=torch.cat([rollout.latents for rollout in rollouts]),
            images=torch.stack(images) if output_type == "pt" else images,
            transitions=Transitions.concatenate([rollout.transitions for rollout in rollouts]),
        )

    def velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The transformer's velocity `v = noise - data`, differentiable.

        Gradients and gradient checkpointing are as in the context of the call, and so is autocast where there is no
        `autocast_dtype`. Classifier-free guidance is never used; a guidance-distilled transformer takes
        `guidance_scale` as an input. Where one call of the pipeline is limited to one time (`Family.one_time`) or one
        sample (`Family.one_sample`, or an image to be edited), the transformer runs once for every different time, or
        for every sample.

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
        t = t.to(device=x_t.device, dtype=torch.float32)
        one_sample = self._takes_one_sample(conditioning)
        if not one_sample and not self.splits_batches:
            return self._velocity_at(x_t, t, conditioning)
        calls = torch.arange(batch) if one_sample else torch.unique(t, return_inverse=True)[1].cpu()
        if not calls.any():
            return self._velocity_at(x_t, t[0], conditioning)
        samples = [torch.nonzero(calls == call).flatten() for call in calls.unique()]
        parts = [self._velocity_at(x_t[rows], t[rows[0]], conditioning.part(rows)) for rows in samples]
        return torch.cat(parts)[torch.argsort(torch.cat(samples))]

    def reference_velocity(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The velocity with `reference_guidance_scale`, where there is one.

        In the `"classifier_free"` families it is `negative + scale * (positive - negative)` of two velocities, without
        the rescaling that some pipelines add. In the `"embedded"` families the transformer takes the value as input.

        Args:
            x_t (`torch.Tensor` of shape `[batch, ...]`):
                See [`~FlowPipeline.velocity`].
            t (`torch.Tensor` of shape `[batch]`):
                See [`~FlowPipeline.velocity`].
            conditioning (`Conditioning`):
                See [`~FlowPipeline.velocity`].

        Returns:
            `torch.Tensor`: the velocity, of the shape and dtype of `x_t`.
        """
        scale = self.reference_guidance_scale
        if scale is None or not self.guides_reference:
            return self.velocity(x_t, t, conditioning)
        if self.family.guidance == "embedded":
            guided = copy.copy(self)
            guided.guidance_scale = scale
            return guided.velocity(x_t, t, conditioning.twin("guided"))  # whose recorded calls are other ones
        negative = self.velocity(x_t, t, self._negatives(conditioning))
        return negative + scale * (self.velocity(x_t, t, conditioning) - negative)

    def _negatives(self, conditioning: Conditioning) -> Conditioning:
        """The negative prompts of a conditioning in the place of its prompts."""
        rows, encoded = conditioning.kwargs, self.family.encoded_names
        if encoded is None:
            return conditioning.twin("negative", rows | {"prompt": [self.family.empty_prompt] * len(conditioning)})
        # Not the prompts' own where there is no negative one: a mask is left out where nothing is padded.
        others = {name: row for name, row in rows.items() if name not in encoded and not name.startswith("negative_")}
        negatives = {name.removeprefix("negative_"): row for name, row in rows.items() if name.startswith("negative_")}
        return conditioning.twin("negative", others | negatives)

    def training_times(self, num_inference_steps: int, scheduler: SchedulerMixin | None = None) -> Tensor:
        """
        The times at which a rollout evaluates the transformer.

        The pipeline sets the schedule up itself, with every shift that depends on the resolution.

        Args:
            num_inference_steps (`int`):
                Number of denoising steps, at least 1.
            scheduler ([`~diffusers.SchedulerMixin`], *optional*):
                The solver that the rollouts use. Defaults to the pipeline's scheduler. It is copied, never changed.

        Returns:
            `torch.Tensor` of shape `[num_inference_steps]`: distinct times in (0, 1], descending, fp32 on the CPU.

        Raises:
            `ValueError`: `num_inference_steps` is too small, or `scheduler` is not flow matching or not one that the
                pipeline can use.
        """
        solver = self._fresh_solver(num_inference_steps, scheduler)
        times = record_times(solver)
        conditioning = self.encode_any()
        try:
            with torch.no_grad():
                self._call_with_gradients(
                    self._driver(solver, conditioning),
                    conditioning,
                    # Its own generator: the initial noise, though not used, must not advance torch's global one.
                    generator=torch.Generator("cpu").manual_seed(0),
                    num_inference_steps=num_inference_steps,
                )
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            if isinstance(solver, FLOW_MATCHING_SCHEDULERS):
                raise
            raise ValueError(
                f"{type(self.pipeline).__name__} cannot set up a schedule with {type(solver).__name__} "
                f"({type(error).__name__}: {error}). Use UniPCMultistepScheduler or FlowMatchEulerDiscreteScheduler."
            ) from error
        if not times[0].isfinite().all():
            raise ValueError(
                f"{type(solver).__name__} has no schedule of num_inference_steps={num_inference_steps}: its times are "
                f"{times[0].tolist()}. Use more steps."
            )
        # Solvers of higher order come back to a time; each counts once.
        return torch.unique_consecutive(times[0].to(device="cpu", dtype=torch.float32))

    def _fresh_solver(self, num_inference_steps: int, scheduler: SchedulerMixin | None) -> Any:
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

    def _driver(self, solver: Any, conditioning: Conditioning) -> Any:
        """A copy of the pipeline with another solver and without a progress bar; other components are shared."""
        driver = copy.copy(self.pipeline)
        driver.set_progress_bar_config(disable=True)
        driver.scheduler = solver
        if self.family.encoded_names is None:
            driver.encode_prompt = encode_once(driver.encode_prompt, conditioning)
        return driver

    def _sample(
        self,
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
            scheduler = euler_of(self.pipeline.scheduler)
        solver = self._fresh_solver(num_inference_steps, scheduler)
        noisy = None if sde is None else SDESolver(solver, sde, seeds)
        # Each step begins the decoding anew, the last one for good.
        latents = keep_samples(solver, lambda: times.begin("decode") if times is not None else None)
        driver = self._driver(solver, conditioning)
        faster = nullcontext() if acceleration is None else acceleration.applied(driver, num_inference_steps)
        with self.precision(), faster:
            output = driver(
                **self.call_arguments(conditioning, guided=self.is_guided),
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=num_inference_steps,
                output_type=output_type,
            )
        if times is not None:
            times.end("decode")
        transitions = None if noisy is None else noisy.transitions()
        return Rollout(latents=latents[0], images=output[0], transitions=transitions)  # `images` or `frames`

    def _velocity_at(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """
        The velocity in one call; `t` is one time per sample, or one time for all samples.

        The first call for a conditioning goes through the pipeline. What it does is recorded, and later calls do the
        same without it.
        """
        if not self.is_listed or torch.is_inference_mode_enabled():  # not compared; or writes would go unnoticed
            return self._velocity_by_pipeline(x_t, t, conditioning).to(x_t.dtype)
        circumstances, derived = self._circumstances(x_t, t), conditioning.derived()
        recorded: tuple[Circumstances | None, Recording | None] = derived.get(Recording, (None, None))
        before, recording = recorded
        if before != circumstances or not (recording is None or recording.is_intact()):
            recorder = Recorder(x_t, t)
            with recorder.recording(self.transformer, self._call_transformer):
                velocity = self._velocity_by_pipeline(x_t, t, conditioning, recorder.stop)
            derived[Recording] = circumstances, recorder.finish(velocity)
        elif recording is None:  # it cannot be repeated
            velocity = self._velocity_by_pipeline(x_t, t, conditioning)
        else:
            velocity = recording.velocity(x_t, t)
        return velocity.to(x_t.dtype)

    def _velocity_by_pipeline(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, when_done: Callable[[], None] | None = None
    ) -> Tensor:
        """The velocity as the pipeline hands it to its scheduler."""
        solver = OneStep(self.pipeline.scheduler, t, when_done)
        driver = self._driver(solver, conditioning)
        options: dict[str, Any] = {}
        if "prepare_latents" in dir(driver):  # without it, `__call__` uses the latents it is given as they are
            driver.prepare_latents = replace_latents(driver.prepare_latents, x_t)
            options["generator"] = torch.Generator("cpu").manual_seed(0)  # not torch's global one
        else:
            options["latents"] = x_t.to(self.dtype)
        # Two, because Mochi divides by half of it; `OneStep` takes one step whatever the number.
        self._call_with_gradients(driver, conditioning, num_inference_steps=2, **options)
        vars(driver).clear()  # its replaced methods hold it, and so the latents, until the next garbage collection
        if solver.velocity is None:
            raise RuntimeError(f"{type(self.pipeline).__name__} ended without a denoising step; it cannot be trained.")
        return solver.velocity

    def _circumstances(self, x_t: Tensor, t: Tensor) -> Circumstances:
        """What a velocity call depends on, apart from the conditioning, the weights and the values of x_t and t."""
        parts = list(vars(self.pipeline).values())
        configs = [part.config for part in parts if isinstance(part, ConfigMixin)]
        weight = next(self.transformer.parameters())
        return Circumstances(
            [*vars(self).values(), *parts, *configs],
            (x_t.shape, x_t.stride(), x_t.dtype, x_t.device, t.shape, weight.dtype, weight.device, autocast_of(x_t)),
        )

    def _call_transformer(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer in its precision, without the conversion of its output, which is recorded."""
        if self.autocast_dtype is None:
            return self.transformer(*args, **kwargs)
        with autocast_for(self.transformer, self.autocast_dtype):
            return self.transformer(*args, **kwargs)

    def _call_with_gradients(self, driver: Any, conditioning: Conditioning, **options: Any) -> None:
        """Run the pipeline's `__call__` without its `no_grad` decorator and without classifier-free guidance."""
        with self.precision():
            inspect.unwrap(type(driver).__call__)(
                driver, **self.call_arguments(conditioning, guided=False), **options, output_type="latent"
            )

    def call_arguments(self, conditioning: Conditioning, guided: bool = False) -> dict[str, Any]:
        """
        The arguments of the pipeline's `__call__` for a conditioning, without those that differ from call to call.

        Args:
            conditioning (`Conditioning`):
                The encoded prompts.
            guided (`bool`, *optional*, defaults to `False`):
                Whether classifier-free guidance is used.

        Returns:
            `dict[str, Any]`: arguments by name.
        """
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
        return _select_known(arguments, self._call_parameters) | family.guidance_arguments(scale) | rows

    def _encode_in_chunks(self, prompts: list[str], names: tuple[str | None, ...]) -> dict[str, Rows]:
        if self._embeddings is not None:
            return self._embeddings.rows(prompts, names, lambda chunk: self._run_encoders(chunk, names))
        return join_rows([self._run_encoders(chunk, names) for chunk in in_chunks(prompts)])

    def _run_encoders(self, prompts: list[str], names: tuple[str | None, ...]) -> dict[str, Rows]:
        """Run `encode_prompt`; its outputs by the names of the `__call__` arguments, each with one row per prompt."""
        if not self._has_text_encoders:
            raise ValueError(
                f"The prompt {prompts[0]!r} is not in the cache of embeddings, and the text encoders were dropped. "
                "Only prompts of the `train_dataset` and the `eval_dataset` that the trainer was made with can be "
                "used; for others set cache_embeddings=False."
            )
        arguments = {
            **self.family.arguments,
            "max_sequence_length": self.max_sequence_length,
            "do_classifier_free_guidance": self._encodes_negatives,
            "device": self._encoder_device or self.device,
        }
        outputs = self.pipeline.encode_prompt(prompts, **_select_known(arguments, self._encode_parameters))
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        return {
            name: self._cast(output)
            for name, output in zip(names, outputs, strict=True)
            if name is not None and output is not None and len(output) > 0  # some return [] without negative prompts
        }

    def _cast(self, rows: Rows) -> Rows:
        """Convert embeddings to the transformer's dtype; masks of integers and truth values keep theirs."""
        if not isinstance(rows, Tensor):
            return [self._cast(row) for row in rows]
        return rows.to(self.dtype) if rows.is_floating_point() else rows

    def _takes_one_sample(self, conditioning: Conditioning) -> bool:
        """Whether one call is limited to one row of the conditioning."""
        return self.family.one_sample or "image" in conditioning.kwargs

    @property
    def is_guided(self) -> bool:
        """Whether rollouts use classifier-free guidance."""
        return self.family.guidance == "classifier_free" and self.guidance_scale > 1

    @property
    def guides_reference(self) -> bool:
        """Whether [`~FlowPipeline.reference_velocity`] is another than the velocity."""
        scale, unguided = self.reference_guidance_scale, 1.0
        if self.family.guidance == "embedded":
            unguided = self.guidance_scale
        return scale is not None and scale != unguided

    @property
    def _encodes_negatives(self) -> bool:
        """Whether prompts are encoded together with the empty negative prompt."""
        return self.is_guided or (self.family.guidance == "classifier_free" and self.guides_reference)

    def _find_length_limit(self, max_sequence_length: int | None) -> int | None:
        if "max_sequence_length" in self._call_parameters:
            own = self._call_parameters["max_sequence_length"].default
            return own if max_sequence_length is None else max_sequence_length
        if max_sequence_length is not None:
            raise ValueError(
                f"max_sequence_length={max_sequence_length} would be ignored: {type(self.pipeline).__name__} has no "
                "such argument. Leave it out."
            )
        return None


def _select_known(values: dict[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function has."""
    return {name: value for name, value in values.items() if name in parameters}
