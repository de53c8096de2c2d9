# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Add an adapter to a pipeline's own weights."""

import os
from pathlib import Path

from diffusers import DiffusionPipeline

from ..pipelines import adapter_names, load_adapter, load_pipeline


def fuse_adapter(
    pipeline: str | os.PathLike | DiffusionPipeline,
    adapter: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    *,
    weight: float = 1.0,
) -> DiffusionPipeline:
    """
    Add an adapter to a pipeline's own weights: the pipeline then makes the adapter's images without an adapter.

    A run can train a new adapter on it, and it needs neither peft nor this package. The sum is rounded to the dtype of
    the pipeline's weights: bf16 loses the smallest changes, fp32 almost nothing.

    Args:
        pipeline (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            The base pipeline: a Hub id, a local folder (both are loaded in fp32), or the object, whose weights are
            changed in place and cannot be restored.
        adapter (`str` or `os.PathLike`):
            See [`load_adapter`].
        output_dir (`str` or `os.PathLike`, *optional*):
            A new or empty folder where the pipeline is saved, as safetensors files.
        weight (`float`, *optional*, defaults to `1.0`):
            The factor of the adapter's change.

    Returns:
        [`~diffusers.DiffusionPipeline`]: the pipeline.

    Raises:
        `FileExistsError`: `output_dir` is a file or a folder that is not empty.
        `OSError`: there is no such adapter.
        `ValueError`: as [`load_adapter`]; or the pipeline has adapters, which would be lost.
    """
    if output_dir is not None and Path(output_dir).exists():
        if not Path(output_dir).is_dir() or any(Path(output_dir).iterdir()):
            raise FileExistsError(
                f"{str(output_dir)!r} exists and is not empty. Pass a new folder for the fused pipeline."
            )
    pipeline = load_pipeline(pipeline)
    if present := adapter_names(pipeline):
        raise ValueError(
            f"The pipeline has adapters ({', '.join(present)}), which would be lost. Remove them with "
            "`pipeline.unload_lora_weights()` first."
        )
    load_adapter(pipeline, adapter, weight=weight)
    pipeline.fuse_lora(adapter_names=["default"])
    pipeline.unload_lora_weights()
    if output_dir is not None:
        pipeline.save_pretrained(output_dir)
    return pipeline
