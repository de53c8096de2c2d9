# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One way to condition, sample and differentiate any flow-matching diffusers pipeline."""

import copy
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import PIL.Image
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..sde import SDEWindow
from ..step_times import StepTimes
from .acceleration import Acceleration
from .assumed_family import assume_family
from .conditioning import Conditioning
from .families import find_family
from .pipeline_calls import PipelineCalls
from .pipeline_checks import check_guidance, check_size, check_trainable
from .prompt_encoding import PromptEncoder
from .prompt_length import find_length_limit
from .quantization import base_dtype
from .rollouts import Rollout, sample
from .training_times import find_training_times
from .velocities import batch_velocity, negatives_of


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
        self.max_sequence_length = find_length_limit(pipeline, self.family, max_sequence_length)
        self.num_frames = num_frames
        self.autocast_dtype = autocast_dtype
        self._encoder = PromptEncoder()

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
        return self._calls.splits_batches

    def precision(self) -> AbstractContextManager[None]:
        """
        The context of all calls of the pipeline. With `autocast_dtype` its transformer runs under autocast, and so
        does the second transformer for unconditional predictions that some pipelines have.
        """
        return self._calls.precision()

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
        return self._encoder.encode(self._calls, prompts, images, self._encodes_negatives)

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
        self._encoder.cache_embeddings(self._calls, folder, device, self._encodes_negatives)

    def drop_text_encoders(self) -> None:
        """
        Remove the text encoders from the pipeline, whose embeddings are all on disk (see [`cache_embeddings`]). No
        other prompt can be encoded then.

        Raises:
            `RuntimeError`: embeddings are not kept on disk.
        """
        self._encoder.drop_text_encoders(self._calls)

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
        other._encoder = copy.copy(self._encoder)  # each warns by itself
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
        options = (num_inference_steps, output_type, scheduler, times, acceleration, sde)
        return sample(self._calls, conditioning, seeds, *options)

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
        # A class that is not in the table is called each time: nobody has compared its recordings.
        return batch_velocity(self._calls, x_t, t, conditioning, may_record=self.is_listed)

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
        negative = self.velocity(x_t, t, negatives_of(conditioning, self.family))
        return negative + scale * (self.velocity(x_t, t, conditioning) - negative)

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
        return find_training_times(self._calls, self.encode_any(), num_inference_steps, scheduler)

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
        return self._calls.arguments(conditioning, guided)

    @property
    def is_guided(self) -> bool:
        """Whether rollouts use classifier-free guidance."""
        return self._calls.is_guided

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

    @property
    def _calls(self) -> PipelineCalls:
        """How the pipeline is called, with the settings that this object has now."""
        return PipelineCalls(
            pipeline=self.pipeline,
            family=self.family,
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            max_sequence_length=self.max_sequence_length,
            guidance_scale=self.guidance_scale,
            autocast_dtype=self.autocast_dtype,
        )
