# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The table of pipeline classes: one row per class, with everything that differs between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers import (
    AuraFlowPipeline,
    BriaFiboEditPipeline,
    BriaFiboPipeline,
    ChromaPipeline,
    ErnieImagePipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HiDreamImagePipeline,
    HunyuanVideoPipeline,
    Ideogram4Pipeline,
    Krea2Pipeline,
    LTXConditionPipeline,
    LTXPipeline,
    Lumina2Pipeline,
    MochiPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SanaVideoPipeline,
    SkyReelsV2Pipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """
    How one pipeline class is conditioned and adapted.

    Args:
        pipeline_class (`type`):
            The diffusers pipeline class. Its subclasses belong to the family too.
        encoded_names (`tuple[str | None, ...]`, *optional*):
            The `__call__` argument that takes each output of `encode_prompt`, in the order of those outputs. `None`
            for an output that is not per prompt or that `__call__` makes itself. `None` instead of a tuple: the
            pipeline takes no embeddings, so it is called with text, and its text encoders run once for every
            selection of prompts.
        guidance (`"classifier_free"` or `"embedded"`):
            How the pipeline uses guidance. `"classifier_free"`: above 1, the transformer runs on the negative prompt
            as well and the pipeline extrapolates. `"embedded"`: a guidance-distilled transformer takes the value as
            one more input, and runs once.
        lora_target_modules (`tuple[str, ...]` or `str`):
            The transformer's linear layers that get a LoRA by default: suffixes of their names, or one regular
            expression that matches whole names.
        negative_names (`tuple[str | None, ...]`, *optional*):
            Where `encode_prompt` returns no embeddings of the negative prompt: the `__call__` arguments that take the
            outputs of encoding it by a second call.
        guidance_argument (`str`, *optional*, defaults to `"guidance_scale"`):
            The `__call__` argument of the guidance scale.
        unguided (`float`, *optional*, defaults to `1.0`):
            The value of that argument at which a classifier-free pipeline does not extrapolate. 0 where it adds
            `value * (positive - negative)` to the positive prediction, not to the negative one.
        arguments (`Mapping[str, Any]`, *optional*):
            Fixed arguments, for `encode_prompt`, `__call__` or both, whichever has an argument of the name.
        one_time (`bool`, *optional*, defaults to `False`):
            The denoising loop has one time for all samples of a batch: velocities at different times take one call per
            time.
        one_sample (`bool`, *optional*, defaults to `False`):
            `__call__` makes one sample only: velocities and rollouts take one call per sample.
        needs_both_sides (`bool`, *optional*, defaults to `False`):
            If only one of height and width is given, `__call__` makes images of another height or width.
        output (`"image"` or `"video"`, *optional*, defaults to `"image"`):
            What the pipeline makes.
        num_frames_argument (`str`, *optional*, defaults to `"num_frames"`):
            The `__call__` argument of the number of frames of a video.
        takes_image (`"no"`, `"optional"` or `"required"`, *optional*, defaults to `"no"`):
            Whether `__call__` has an `image` to be edited. A call with an image makes one sample only: a list would
            be several images of one sample, or be scaled to the shape of its first.
        checkpointing_fault (`str`, *optional*):
            Why gradient checkpointing gives wrong gradients in diffusers.
        empty_prompt (`str`, *optional*, defaults to `""`):
            The shortest prompt that `__call__` accepts.
        long_text_encoder (`str`, *optional*, defaults to `"text_encoder"`):
            The text encoder that reads the longest text, up to `max_sequence_length` tokens. Where the pipeline was
            loaded without it, `tokenizer` and its own limit are used.
        long_text_tokenizer (`str`, *optional*, defaults to `"tokenizer"`):
            The tokenizer that belongs to `long_text_encoder`. `None`: the length of prompts is not checked.
    """

    pipeline_class: type
    encoded_names: tuple[str | None, ...] | None
    guidance: Literal["classifier_free", "embedded"]
    lora_target_modules: tuple[str, ...] | str
    negative_names: tuple[str | None, ...] | None = None
    guidance_argument: str = "guidance_scale"
    unguided: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    one_time: bool = False
    one_sample: bool = False
    needs_both_sides: bool = False
    output: Literal["image", "video"] = "image"
    num_frames_argument: str = "num_frames"
    takes_image: Literal["no", "optional", "required"] = "no"
    checkpointing_fault: str | None = None
    empty_prompt: str = ""
    long_text_encoder: str = "text_encoder"
    long_text_tokenizer: str | None = "tokenizer"

    def guidance_arguments(self, guidance_scale: float) -> dict[str, float]:
        """
        The argument of the pipeline's `__call__` for a guidance scale.

        Args:
            guidance_scale (`float`):
                The scale in the convention of `FlowPipeline`: in classifier-free families 1 is no guidance.

        Returns:
            `dict[str, float]`: the pipeline's own argument, by its name.
        """
        own = guidance_scale if self.guidance == "embedded" else guidance_scale - 1.0 + self.unguided
        return {self.guidance_argument: own}


MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
EMBEDS_AND_MASK = ("prompt_embeds", "prompt_embeds_mask")
NEGATIVE_EMBEDS_AND_MASK = ("negative_prompt_embeds", "negative_prompt_embeds_mask")

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
# The eight joint-attention projections of https://huggingface.co/papers/2509.16117.
JOINT_ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
# The defaults of DreamBooth LoRA for Flux.
FLUX_LAYERS = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
# The attention layers of examples/dreambooth/train_dreambooth_lora_flux2.py in diffusers, and those of the text.
# `attn.to_out` is a linear layer in single blocks and a list in the others, so that no suffix means both.
FLUX2_ATTENTION = (
    r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|to_qkv_mlp_proj)"
    r"|single_transformer_blocks\.\d+\.attn\.to_out"
)

# Left out: families whose adapters diffusers cannot save and load for the pipeline (HunyuanImage, Ovis-Image,
# LongCat-Image, Bria 3.2, Nucleus-Image, and of those that edit LongCat-Image-Edit, JoyImage-Edit, OmniGen, DreamLite,
# GLM-Image); those that pad texts without a mask, so that an image depends on the rest of its batch (CogView4,
# Kandinsky 5); and HiDream, whose routed experts pass no gradient in inference mode and whose transformer returns
# another layout in training mode. docs/pipelines.md names those of videos too.
#
# A row is added together with a tiny pipeline of its class for the tests in tests/pipelines/, when they pass for it.
# "DreamBooth LoRA" are diffusers' scripts examples/dreambooth/train_dreambooth_lora_*.py.
FAMILIES: tuple[Family, ...] = (
    Family(
        pipeline_class=StableDiffusion3Pipeline,
        encoded_names=(
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        ),
        guidance="classifier_free",
        lora_target_modules=JOINT_ATTENTION,
        arguments={"prompt_2": None, "prompt_3": None},
        long_text_encoder="text_encoder_3",
        long_text_tokenizer="tokenizer_3",
    ),
    Family(
        pipeline_class=FluxPipeline,
        encoded_names=("prompt_embeds", "pooled_prompt_embeds", None),
        guidance="embedded",
        lora_target_modules=FLUX_LAYERS,
        long_text_encoder="text_encoder_2",
        long_text_tokenizer="tokenizer_2",
    ),
    Family(
        pipeline_class=FluxKontextPipeline,
        encoded_names=("prompt_embeds", "pooled_prompt_embeds", None),
        guidance="embedded",
        lora_target_modules=(*FLUX_LAYERS, "proj_mlp"),  # DreamBooth LoRA for Flux Kontext
        needs_both_sides=True,  # it scales what there is to a million pixels
        takes_image="optional",
        long_text_encoder="text_encoder_2",
        long_text_tokenizer="tokenizer_2",
    ),
    Family(
        pipeline_class=Flux2Pipeline,
        encoded_names=("prompt_embeds", None),
        guidance="embedded",
        lora_target_modules=FLUX2_ATTENTION,
        takes_image="optional",
        long_text_tokenizer=None,  # a processor of texts and images
    ),
    Family(
        pipeline_class=Flux2KleinPipeline,
        encoded_names=("prompt_embeds", None),
        guidance="classifier_free",
        lora_target_modules=FLUX2_ATTENTION,
        negative_names=("negative_prompt_embeds", None),
        takes_image="optional",
    ),
    Family(
        pipeline_class=QwenImagePipeline,
        encoded_names=EMBEDS_AND_MASK,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # DreamBooth LoRA for Qwen-Image
        negative_names=NEGATIVE_EMBEDS_AND_MASK,
        guidance_argument="true_cfg_scale",
    ),
    *(
        Family(
            pipeline_class=pipeline_class,
            encoded_names=None,  # the text encoder sees the image, as `__call__` has scaled it
            guidance="classifier_free",
            lora_target_modules=ATTENTION,  # DreamBooth LoRA for Qwen-Image
            guidance_argument="true_cfg_scale",
            takes_image="required",
            long_text_tokenizer=None,  # nothing is cut off
        )
        for pipeline_class in (QwenImageEditPipeline, QwenImageEditPlusPipeline)
    ),
    Family(
        pipeline_class=ZImagePipeline,
        encoded_names=("prompt_embeds", "negative_prompt_embeds"),
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # DreamBooth LoRA for Z-Image
        unguided=0.0,
    ),
    Family(
        pipeline_class=SanaPipeline,
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # DreamBooth LoRA for Sana, and its output projection
        # Prompts as they are, not rewritten, and the size that was asked for.
        arguments={"use_resolution_binning": False, "complex_human_instruction": None},
    ),
    Family(
        pipeline_class=Lumina2Pipeline,
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # DreamBooth LoRA for Lumina 2
    ),
    Family(
        pipeline_class=AuraFlowPipeline,
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # of the linear layers that https://github.com/ostris/ai-toolkit adapts
        one_time=True,
    ),
    Family(
        pipeline_class=ChromaPipeline,
        encoded_names=(
            "prompt_embeds",
            None,
            "prompt_attention_mask",
            "negative_prompt_embeds",
            None,
            "negative_prompt_attention_mask",
        ),
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # of the linear layers that https://github.com/ostris/ai-toolkit adapts
        checkpointing_fault="the single blocks of its transformer lose the attention mask",
    ),
    Family(
        pipeline_class=Krea2Pipeline,
        encoded_names=EMBEDS_AND_MASK,
        guidance="classifier_free",
        # What DreamBooth LoRA for Krea 2 advises for long runs. Not in `text_fusion`: the first dimension of what its
        # layers see is not the batch, which per-reward gradients need.
        lora_target_modules=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_gate|to_out\.0)",
        negative_names=NEGATIVE_EMBEDS_AND_MASK,
        unguided=0.0,
    ),
    Family(
        pipeline_class=ErnieImagePipeline,
        encoded_names=("prompt_embeds",),
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # of the linear layers that https://github.com/ostris/ai-toolkit adapts
        negative_names=("negative_prompt_embeds",),
        arguments={"use_pe": False},  # prompts as they are, not rewritten
        one_time=True,
    ),
    Family(
        pipeline_class=BriaFiboPipeline,
        encoded_names=None,
        guidance="classifier_free",
        lora_target_modules=JOINT_ATTENTION,
    ),
    Family(
        pipeline_class=BriaFiboEditPipeline,
        encoded_names=None,
        guidance="classifier_free",
        lora_target_modules=JOINT_ATTENTION,
        needs_both_sides=True,  # it takes both from the image
        takes_image="optional",
        empty_prompt='{"edit_instruction": ""}',
    ),
    Family(
        pipeline_class=Ideogram4Pipeline,
        encoded_names=None,
        guidance="classifier_free",
        lora_target_modules=(*ATTENTION, "w1", "w2", "w3"),  # DreamBooth LoRA for Ideogram 4
        arguments={"guidance_schedule": None},
    ),
    # Videos. "finetrainers" are the examples of https://github.com/a-r-r-o-w/finetrainers.
    Family(
        pipeline_class=WanPipeline,
        encoded_names=("prompt_embeds", "negative_prompt_embeds"),
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # finetrainers for Wan
        output="video",
    ),
    Family(
        pipeline_class=SkyReelsV2Pipeline,
        encoded_names=("prompt_embeds", "negative_prompt_embeds"),
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # as for Wan, which it is built on
        output="video",
    ),
    Family(
        pipeline_class=LTXPipeline,
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # finetrainers for LTX-Video
        output="video",
    ),
    Family(
        pipeline_class=LTXConditionPipeline,  # LTX-Video from 0.9.5 on, without conditions
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,
        output="video",
    ),
    Family(
        pipeline_class=HunyuanVideoPipeline,
        encoded_names=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        guidance="embedded",
        # finetrainers for HunyuanVideo: not in the refiner of the text.
        lora_target_modules=(
            r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        ),
        output="video",
    ),
    Family(
        pipeline_class=MochiPipeline,
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # https://github.com/hao-ai-lab/FastVideo for Mochi
        output="video",
    ),
    Family(
        pipeline_class=SanaVideoPipeline,
        encoded_names=MASKED,
        guidance="classifier_free",
        lora_target_modules=ATTENTION,  # this and the arguments as for Sana
        arguments={"use_resolution_binning": False, "complex_human_instruction": None},
        output="video",
        num_frames_argument="frames",
    ),
)


# Classes that would pass `verify_velocities`, and still be wrong.
UNSUPPORTED: Mapping[type, str] = {
    HiDreamImagePipeline: "its routed experts pass no gradient in inference mode, and in training mode its "
    "transformer returns another layout",
}


def find_family(pipeline: DiffusionPipeline) -> Family | None:
    """
    Find the row of the table that describes a pipeline.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.

    Returns:
        `Family`: the first row whose `pipeline_class` the pipeline is an instance of; `None` if there is no such row.

    Raises:
        `ValueError`: the class is known not to work.
    """
    for kind, reason in UNSUPPORTED.items():
        if isinstance(pipeline, kind):
            raise ValueError(f"{type(pipeline).__name__} cannot be trained: {reason}. Use another pipeline.")
    for family in FAMILIES:
        if isinstance(pipeline, family.pipeline_class):
            return family
    return None
