# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Read the LoRA adapter of a pipeline, and save it so that every loader reads the same adapter."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers.utils import logging

from ..pipelines.lora_layouts import scale_weight
from .files import sort_header


logger = logging.get_logger(__name__)


# Fields of a peft configuration that loaders read even if they are missing (diffusers 0.35 does).
_ALWAYS_PUBLISHED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
# Fields about the making of an adapter or paths of the machine, not about what it computes.
_NOT_PUBLISHED = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights"})

_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?P<scaled>lora_B\.(?:weight|bias))|lora_A\.weight|lora_magnitude_vector(?:\.weight)?)"
)


def adapter_state(pipeline: DiffusionPipeline, adapter_name: str = "default") -> dict[str, Tensor]:
    """
    The weights of one LoRA adapter of a pipeline's transformer.

    Args:
        pipeline (`DiffusionPipeline`):
            A pipeline whose `transformer` has the adapter.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter's name in the transformer.

    Returns:
        `dict[str, Tensor]`: peft's state dict, keys without the adapter's name (`"...attn.to_q.lora_A.weight"` of
        shape (r, in_features), `"...lora_B.weight"` of shape (out_features, r)). The tensors share memory
        with the adapter's parameters, detached.

    Raises:
        `ValueError`: the transformer has no adapter of that name.
    """
    _lora_config(pipeline, adapter_name)
    state = get_peft_model_state_dict(pipeline.transformer, adapter_name=adapter_name)
    return {key: value.detach() for key, value in state.items()}


def save_adapter(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    state: dict[str, Tensor] | None = None,
    *,
    adapter_name: str = "default",
) -> Path:
    """
    Write a LoRA adapter so that `load_lora_weights(folder)` on a fresh base pipeline makes the same images.

    The weights in the file are multiplied by the scale, alpha / r (or alpha / sqrt(r) for rank-stabilized LoRA), and
    alpha is r in the file's configuration. Loaders that read the tensors alone assume this, among them ComfyUI and
    `load_lora_weights(state_dict)`, and so use the adapter at its full strength. The pipeline's own weights stay as
    they are. If an adapter has other weights than those of LoRA and DoRA on linear layers and convolutions, its scale
    stays in the configuration, with a warning.

    Args:
        pipeline (`DiffusionPipeline`):
            The trained pipeline. Its class determines the names of the file's keys.
        folder (`str` or `os.PathLike`):
            The folder for `pytorch_lora_weights.safetensors`; made if missing. An earlier file of that name is
            replaced.
        state (`dict[str, Tensor]`, *optional*):
            Other weights for the same adapter, such as their moving average, with the keys and shapes of
            [`adapter_state`]. Defaults to the adapter's own weights.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter's name in the transformer.

    Returns:
        `Path`: the file that was written.

    Raises:
        `ValueError`: the transformer has no adapter of that name, `state` has other keys or shapes, or a weight is not
            finite. An earlier file stays as it is.
        `NotADirectoryError`: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"Cannot save the adapter in {folder}: it is a file. Pass a folder.")
    config = _lora_config(pipeline, adapter_name)
    own = adapter_state(pipeline, adapter_name)
    if state is None:
        state = own
    _check_same_layout(state, own, adapter_name)
    scales = _scales(pipeline, adapter_name)
    if unknown := [key for key in state if not _KEY.fullmatch(key)]:
        logger.warning(
            f"The scale of the adapter {adapter_name!r} stays in the file's metadata, because of weights such as "
            f"{unknown[0]!r}. Loaders that do not read the metadata, such as ComfyUI, use another strength."
        )
        published = _published_config(config)
    else:
        state = {key: _multiply_scale(key, value, scales) for key, value in state.items()}
        published = _published_config(config) | {"lora_alpha": config.r, "alpha_pattern": config.rank_pattern}
        published.pop("use_rslora", None)

    state = _on_cpu(state)
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(
                f"`{key}` of the adapter {adapter_name!r} is not finite, so it is not saved. Go back to an earlier "
                "checkpoint, and lower the learning rate or avoid float16."
            )

    # The file gets its name when it is complete, also if the process is killed before.
    file, unfinished = folder / LORA_WEIGHT_NAME_SAFE, folder / f"tmp-{LORA_WEIGHT_NAME_SAFE}"
    pipeline.save_lora_weights(
        folder,
        weight_name=unfinished.name,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=published,
        safe_serialization=True,
    )
    sort_header(unfinished)
    os.replace(unfinished, file)
    return file


def _lora_config(pipeline: DiffusionPipeline, adapter_name: str) -> LoraConfig:
    """The configuration of one adapter of the transformer, or a `ValueError` that lists its adapters."""
    configs: dict[str, LoraConfig] = getattr(pipeline.transformer, "peft_config", {})
    if adapter_name not in configs:
        present = ", ".join(map(repr, configs)) or "none"
        raise ValueError(
            f"The transformer has no adapter {adapter_name!r} (it has: {present}). Pass another `adapter_name`, or "
            f"add it with `pipeline.transformer.add_adapter(LoraConfig(...), adapter_name={adapter_name!r})`."
        )
    return configs[adapter_name]


def _scales(pipeline: DiffusionPipeline, adapter_name: str) -> dict[str, float]:
    """The trained scale of each layer, alpha / r or alpha / sqrt(r) (`set_adapters` can change the one in use)."""
    rank_stabilized = pipeline.transformer.peft_config[adapter_name].use_rslora
    return {
        name: layer.lora_alpha[adapter_name] / (math.sqrt(rank) if rank_stabilized else rank)
        for name, layer in pipeline.transformer.named_modules()
        if isinstance(layer, LoraLayer) and (rank := layer.r.get(adapter_name)) is not None
    }


def _multiply_scale(key: str, weight: Tensor, scales: Mapping[str, float]) -> Tensor:
    match = _KEY.fullmatch(key)
    return scale_weight(weight, scales[match["layer"]]) if match is not None and match["scaled"] else weight


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU. Those of one dtype come together, so that the device is waited for once."""
    together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, value in state.items():
        together.setdefault((value.device, value.dtype), []).append(key)
    copies: dict[str, Tensor] = {}
    for keys in together.values():
        values = [state[key].detach() for key in keys]
        parts = torch.cat([value.flatten() for value in values]).cpu().split([value.numel() for value in values])
        # Each on its own: safetensors writes no tensors that share memory.
        copies |= {key: part.view_as(value).clone() for key, part, value in zip(keys, parts, values, strict=True)}
    return {key: copies[key] for key in state}


def _published_config(config: LoraConfig) -> dict[str, Any]:
    """
    The part of a peft configuration that a loader needs, ready for JSON.

    Values that are peft's defaults are left out: with all fields the file would not load in an older or newer version
    of peft that does not know some of them. Sets, whose order is random, become sorted lists.
    """
    values, defaults = config.to_dict(), LoraConfig().to_dict()
    published = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in values.items()
        if key not in _NOT_PUBLISHED and value != defaults[key]
    }
    return {key: values[key] for key in _ALWAYS_PUBLISHED} | published


def _check_same_layout(state: dict[str, Tensor], own: dict[str, Tensor], adapter_name: str) -> None:
    """Raise a `ValueError` if two states differ in keys or shapes."""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    found = [f"{len(keys)} {what} (first: {keys[0]})" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"`state` does not fit the adapter {adapter_name!r}: {'; '.join(found)}. Take its keys from "
            "`trl_marble.hub.adapter_state(pipeline)`."
        )
