# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What is done to a pipeline with its adapter before it is trained."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.utils import logging

from .compilation import compile_blocks
from .flow_pipeline import FlowPipeline
from .loading import plain_lora_linears
from .offloading import offload_components
from .sharding import shard_base
from .verification import verify_velocities


logger = logging.get_logger(__name__)


def place_base(
    flow: FlowPipeline,
    trainable: Iterable[nn.Parameter],
    device: torch.device,
    *,
    shards: bool = False,
    offloads: bool = False,
    compile_backend: str | None = None,
    compile_mode: str | None = None,
) -> None:
    """
    Bring a pipeline to where it is trained: complete, sharded, or in part; and compile it.

    Args:
        flow ([`~trl_marble.pipelines.FlowPipeline`]):
            The pipeline with its adapter, changed in place.
        trainable (`Iterable[nn.Parameter]`):
            The adapter's weights.
        device (`torch.device`):
            Where the process works.
        shards (`bool`, *optional*, defaults to `False`):
            Whether each process keeps a part of the frozen transformer only, see [`shard_base`].
        offloads (`bool`, *optional*, defaults to `False`):
            Whether everything but the transformer is on the CPU between its uses, see [`offload_components`].
        compile_backend (`str`, *optional*):
            The backend of `torch.compile`; by default nothing is compiled.
        compile_mode (`str`, *optional*):
            Its mode.

    Raises:
        `ValueError`: If the pipeline is of a class that is not in the table and its velocities are wrong.
    """
    if shards:
        shard_base(flow.transformer, trainable, device)
    if offloads:
        offload_components(flow.pipeline, device)
    else:
        flow.pipeline.to(device)
    verify_velocities(flow)
    if compile_backend is not None:
        compile_blocks(flow.transformer, compile_backend, compile_mode)


def measured_linears(
    flow: FlowPipeline, names: Iterable[str], edits: bool, micro_batch_size: int
) -> list[nn.Linear] | None:
    """
    The linear layers from whose inputs and outputs per-reward gradients are taken, see
    [`~trl_marble.balance.WeightedBackward`].

    Warns where there are none: then each reward takes a backward pass of its own.

    Args:
        flow ([`~trl_marble.pipelines.FlowPipeline`]):
            The pipeline with its adapter.
        names (`Iterable[str]`):
            Of the adapter's weights in the transformer.
        edits (`bool`):
            Whether it edits images.
        micro_batch_size (`int`):
            Number of images in one forward and backward pass.

    Returns:
        `list[nn.Linear]`: The layer of each weight, or `None`.
    """
    kind = type(flow.pipeline).__name__
    if not flow.is_listed:  # whether every layer sees a row a sample is tested for the table only
        logger.warning(
            f"{kind} is not among the pipeline classes that are tested. Its velocities are those of its own denoising "
            "steps; each step that solves the balancing problem takes one backward pass per reward."
        )
        return None
    if (flow.splits_batches or edits) and micro_batch_size > 1:
        # No call of the transformer sees the whole micro-batch.
        one = "sample" if flow.family.one_sample or edits else "time"
        logger.warning(
            f"{kind} takes one {one} per call, so the transformer runs more than once for a micro-batch, and each "
            "step that solves the balancing problem takes one backward pass per reward. With "
            "`per_device_train_batch_size=1` and more accumulation it takes two in all."
        )
        return None
    linears = plain_lora_linears(flow.transformer, names)
    if linears is None:
        logger.warning(
            "The adapter is not plain LoRA on linear layers, so each step that solves the balancing problem takes "
            "one backward pass per reward. Plain LoRA (no DoRA, no convolutions) takes two in all."
        )
    return linears
