# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Spread the frozen weights of a transformer over processes."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from .compilation import transformer_blocks


def shard_base(transformer: nn.Module, trainable: Iterable[nn.Parameter], device: torch.device) -> None:
    """
    Keep a part of the transformer's frozen weights on each process (FSDP2). They are gathered block by block, while a
    block is used, so that all processes have to call the transformer equally often, forward and backward.

    Every process keeps all weights that are trained. Call it before the transformer is moved to its device: then no
    process ever has more there than its own part and one block.

    Args:
        transformer (`torch.nn.Module`):
            The transformer with its adapter, changed in place.
        trainable (`Iterable[torch.nn.Parameter]`):
            The adapter's weights.
        device (`torch.device`):
            The device of this process.

    Raises:
        `ValueError`: the transformer has no blocks.
    """
    blocks = transformer_blocks(transformer)
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no lists of blocks to shard; set shard_base=False.")
    mesh, unsharded = init_device_mesh(device.type, (get_world_size(),)), set(trainable)
    for module in (*blocks, transformer):
        fully_shard(module, mesh=mesh, ignored_params=unsharded)
