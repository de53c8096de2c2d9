# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Compiling a transformer block by block."""

import torch
from torch import nn


MANY_VERSIONS = 64  # of one block's code; more would be a sign that something is compiled again and again


def transformer_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The members of the module lists right below a transformer: most of its weights, in the order of their use."""
    return [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]


def compile_blocks(transformer: nn.Module, backend: str, mode: str | None = None) -> None:
    """
    Compile the transformer's blocks one by one, in place: all blocks of a kind are compiled once.

    (The diffusers method for this knows no blocks in some families, Stable Diffusion 3 among them.)

    Args:
        transformer (`torch.nn.Module`):
            The transformer. Its blocks are the members of the module lists right below it.
        backend (`str`):
            As `torch.compile` has it.
        mode (`str`, *optional*):
            As `torch.compile` has it.

    Raises:
        `ValueError`: the transformer has no blocks.
    """
    blocks = transformer_blocks(transformer)
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no lists of blocks to compile; set torch_compile=False.")
    # Every kind of block is compiled for sampling, training, per-reward gradients and the base model, each again for
    # other batch sizes. Beyond its limit PyTorch would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MANY_VERSIONS)
    # Without this the only backward pass of one step may be compiled to overwrite what the first of two still needs.
    torch._functorch.config.donated_buffer = False
    for block in blocks:
        block.compile(backend=backend, mode=mode)
