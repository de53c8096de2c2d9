# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Refuse pipelines that cannot be trained, and settings that a pipeline would ignore or change."""

from collections.abc import Sequence

import PIL.Image
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .families import Family
from .schedulers import check_flow_matching


def check_trainable(pipeline: object) -> None:
    """
    Refuse a pipeline that is not flow matching, or has not exactly one transformer to train.

    Args:
        pipeline (`object`):
            What should be a [`~diffusers.DiffusionPipeline`].

    Raises:
        `TypeError`: it is not a `DiffusionPipeline`.
        `ValueError`: its scheduler is not flow matching, or it has no `transformer` or two for different times.
    """
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
    if pipeline.config.get("boundary_ratio") is not None:
        raise ValueError(
            f"This {type(pipeline).__name__} has two transformers, one for times above and one for times below "
            f"boundary_ratio={pipeline.config.boundary_ratio}, and only one can be trained. Use a model that has "
            "one (Wan 2.1, or the 5B of Wan 2.2)."
        )


def check_size(
    pipeline: DiffusionPipeline, family: Family, height: int | None, width: int | None, num_frames: int | None
) -> None:
    """
    Refuse a size that the pipeline would change, and a number of frames that it would ignore.

    Raises:
        `ValueError`: only one of height and width is given, and the pipeline would change it; or `num_frames` is
            given for a pipeline that makes images.
    """
    if family.needs_both_sides and (height is None) != (width is None):
        raise ValueError(
            f"height={height}, width={width}: {type(pipeline).__name__} would not keep one without the other. "
            "Give both or neither."
        )
    if num_frames is not None and family.output != "video":
        raise ValueError(
            f"num_frames={num_frames} would be ignored: {type(pipeline).__name__} makes images, not videos. Leave "
            "it out."
        )


def check_guidance(pipeline: DiffusionPipeline, family: Family, scale: float) -> None:
    """
    Refuse a guidance scale below 1, and one that the pipeline would ignore.

    Raises:
        `ValueError`: the transformer takes no guidance as input, the pipeline is distilled and never guides, or a
            classifier-free scale is below 1.
    """
    kind = type(pipeline).__name__
    if family.guidance == "embedded":
        if scale > 1 and not pipeline.transformer.config.guidance_embeds:
            raise ValueError(
                f"guidance_scale={scale} would be ignored: this {type(pipeline.transformer).__name__} is not "
                "guidance-distilled (its config has guidance_embeds=False). Set guidance_scale=1.0."
            )
    elif scale < 1:
        raise ValueError(
            f"guidance_scale={scale} is below 1, and 1 is no guidance for {kind} and every other pipeline with "
            "classifier-free guidance, whatever the pipeline's own argument means. Set guidance_scale=1.0 for no "
            "guidance."
        )
    elif scale > 1 and pipeline.config.get("is_distilled"):
        raise ValueError(
            f"guidance_scale={scale} would be ignored: this {kind} is distilled (its config has "
            "is_distilled=True). Set guidance_scale=1.0."
        )


def check_images(
    pipeline: DiffusionPipeline, family: Family, prompts: Sequence[str], images: Sequence[PIL.Image.Image] | None
) -> None:
    """
    Refuse images to be edited where the pipeline takes none, none where it needs some, and a wrong number of them.

    Raises:
        `ValueError`: the images do not fit the pipeline or the prompts.
    """
    kind = type(pipeline).__name__
    if images is None and family.takes_image == "required":
        raise ValueError(f"{kind} edits images, but there are none. Pass `images`, one for each prompt.")
    if images is not None and family.takes_image == "no":
        raise ValueError(f"{kind} takes no images to edit, but there are {len(images)}. Leave them out.")
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"got {len(images)} images for {len(prompts)} prompts; pass one image for each prompt.")
