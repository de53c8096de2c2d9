# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What is done to a pipeline with its adapter before it is trained."""

from collections.abc import Iterable

from torch import nn
from transformers.utils import logging

from ..pipelines import (
    FlowPipeline,
    compile_blocks,
    offload_components,
    plain_lora_linears,
    shard_base,
    verify_velocities,
)
from .marble_config import MarbleConfig


logger = logging.get_logger(__name__)


def place_base(flow: FlowPipeline, trainable: Iterable[nn.Parameter], args: MarbleConfig) -> None:
    """
    Bring a pipeline to where it is trained, as the settings say: whole, sharded, or in part; and compile it.

    Args:
        flow ([`~trl_marble.pipelines.FlowPipeline`]):
            The pipeline with its adapter, changed in place.
        trainable (`Iterable[nn.Parameter]`):
            The adapter's weights.
        args ([`MarbleConfig`]):
            The settings.

    Raises:
        `ValueError`: If the pipeline is of a class that is not in the table and its velocities are wrong, or if it
            cannot be sharded.
    """
    if args.base_is_sharded:
        shard_base(flow.transformer, trainable, args.device)
    if args.offload_components:
        offload_components(flow.pipeline, args.device)
    else:
        flow.pipeline.to(args.device)
    verify_velocities(flow)
    if args.shard_base and flow.splits_batches:
        raise ValueError(
            "`shard_base=True` needs processes that call the transformer equally often, and "
            f"{type(flow.pipeline).__name__} is called once for every different time of a micro-batch. Set "
            "`shard_base=False`."
        )
    if args.torch_compile_backend is not None:  # `torch_compile` sets it, and is set by it
        compile_blocks(flow.transformer, args.torch_compile_backend, args.torch_compile_mode)


def measured_linears(
    flow: FlowPipeline, names: Iterable[str], edits: bool, args: MarbleConfig
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
        args ([`MarbleConfig`]):
            The settings.

    Returns:
        `list[nn.Linear]`: The layer of each weight, or `None`.
    """
    kind = type(flow.pipeline).__name__
    if not flow.is_listed:  # whether every layer sees a row a sample is tested for the table only
        logger.warning(
            f"{kind} is not among the pipeline classes that are tested. Its velocities are those of its own denoising "
            "steps; each step that solves the balancing problem takes one backward pass a reward."
        )
        return None
    if (flow.splits_batches or edits) and args.per_device_train_batch_size > 1:
        # No call of the transformer sees the whole micro-batch.
        one = "sample" if flow.family.one_sample or edits else "time"
        logger.warning(
            f"{kind} holds one {one} a call, so the transformer runs more than once for a micro-batch, and each step "
            "that solves the balancing problem takes one backward pass a reward. With `per_device_train_batch_size=1` "
            "and more accumulation it takes two in all."
        )
        return None
    linears = plain_lora_linears(flow.transformer, names)
    if linears is None and args.balances_gradients:
        logger.warning(
            "The adapter is not plain LoRA on linear layers, so each step that solves the balancing problem takes "
            "one backward pass a reward. Plain LoRA (no DoRA, no convolutions) takes two in all."
        )
    return linears
