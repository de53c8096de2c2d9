# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The parts of an adapter that was trained for every balance between rewards, as adapters of their own."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .files import LoraLayer, read_layers, write_layers


FOLDER = "adapters"  # beside the adapter that is their equal mixture


def part_names(reward_names: Sequence[str]) -> list[str]:
    """
    What the adapter of each reward is called, as a file and in a pipeline.

    Args:
        reward_names (`Sequence[str]`):
            The rewards, in the order of the parts.

    Returns:
        `list[str]`: the same, where these can be names of files and of modules, which adapters are; else similar.
    """
    names: list[str] = []
    for reward in reward_names:
        name = re.sub(r"\W+", "_", reward, flags=re.ASCII).strip("_") or "reward"
        # Of names that differ in case only, some systems make one file.
        while name.lower() in map(str.lower, names) or hasattr(nn.ModuleDict(), name):
            name += "_"
        names.append(name)
    return names


def part_file(name: str) -> str:
    """
    The file of a part, relative to the folder of the whole adapter.

    Only the whole adapter has the file name that diffusers looks for. Of several such files in a repository it would
    load any.
    """
    return f"{FOLDER}/{name}.safetensors"


def split_adapter(file: Path, reward_names: Sequence[str]) -> list[Path]:
    """
    Write each part of an adapter as an adapter of its own. Mixed with the weights 1 / K they are the whole adapter.

    Args:
        file (`Path`):
            The whole adapter, see [`~trl_marble.pipelines.mixing.mixing`].
        reward_names (`Sequence[str]`):
            The rewards, in the order of the parts.

    Returns:
        `list[Path]`: their files, `adapters/<name>.safetensors` in the folder of the whole adapter.
    """
    layers, number = read_layers(file), len(reward_names)
    written = []
    for place, name in enumerate(part_names(reward_names)):
        part = {layer: _part(lora, place, number) for layer, lora in layers.items()}
        written.append(file.parent / part_file(name))
        write_layers(part, written[-1])
    return written


def _part(lora: LoraLayer, place: int, number: int) -> LoraLayer:
    """One of some equal parts of the ranks, as strong as where it has the whole share."""
    rank = lora.rank // number
    own = slice(place * rank, (place + 1) * rank)
    return LoraLayer(lora.lora_A[own], lora.lora_B[:, own], number * lora.scale)
