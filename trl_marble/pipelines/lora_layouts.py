# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""LoRA files of other programs: recognize the layout of their keys, and convert it to that of diffusers."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from peft.utils.other import get_pattern_key
from torch import Tensor


Layout = Literal["diffusers", "PEFT", "ComfyUI", "kohya", "older diffusers", "prefixless", "unknown"]

# How messages describe them.
DESCRIPTIONS: dict[Layout, str] = {
    "PEFT": "PEFT's layout ('base_model.model.<layer>.lora_A.weight')",
    "ComfyUI": "ComfyUI's layout ('diffusion_model.<layer>...')",
    "kohya": "the layout of kohya's scripts ('lora_unet_<layer>.lora_down.weight')",
    "older diffusers": "the layout of older diffusers ('<layer>.lora.down.weight')",
    "prefixless": "the layout of a single model ('<layer>.lora_A.weight', without 'transformer.')",
    "unknown": "an unknown layout",
}
_PREFIXES: dict[str, Layout] = {
    "base_model.model.": "PEFT",
    "diffusion_model.": "ComfyUI",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lora_te": "kohya",
}
_COMPONENT = re.compile(r"(?:transformer|text_encoder|unet)(?:_\d+)?\.")
_OWN_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?)")
_OTHER_PART = re.compile(r"(?P<layer>.+)\.(?:lora[._](?P<part>down|up)\.weight|(?P<alpha>alpha))")
_OWN_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight"}


def find_layout(keys: Collection[str]) -> Layout:
    """
    Find the layout of a LoRA file, by the first of its keys that is not in diffusers' layout.

    Args:
        keys (`Collection[str]`):
            The names of all tensors.
    """
    for key in sorted(keys):
        for prefix, layout in _PREFIXES.items():
            if key.startswith(prefix):
                return layout
        has_component = _COMPONENT.match(key) is not None
        if _OTHER_PART.fullmatch(key):
            return "older diffusers"
        if not _OWN_PART.fullmatch(key):
            return "unknown"
        if not has_component:
            return "prefixless"
    return "diffusers"


def to_diffusers_layout(
    state: Mapping[str, Tensor], config: Mapping[str, Any], layers: Collection[str]
) -> dict[str, Tensor]:
    """
    Convert the weights of a LoRA file of another layout to diffusers' names, multiplied by their scale.

    Only the form of the names is changed: a layer that has another name in the transformer cannot be converted.

    Args:
        state (`Mapping[str, Tensor]`):
            The tensors of the file, in a layout of [`find_layout`] other than `"unknown"`.
        config (`Mapping[str, Any]`):
            The fields of the adapter's configuration, which has the scale where the file itself has no `alpha`.
        layers (`Collection[str]`):
            The names of the pipeline's layers (`"transformer.<layer>"`). Kohya's names, which have no dots, are looked
            up among them.

    Returns:
        `dict[str, Tensor]`: `"transformer.<layer>.lora_A.weight"` and so on, for an alpha equal to the rank.

    Raises:
        `ValueError`: a key is not that of a LoRA, or names no known layer; or the scale in the configuration is not a
            finite number.
    """
    without_dots = {layer.removeprefix("transformer.").replace(".", "_"): layer for layer in layers}
    renamed: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        match = _OWN_PART.fullmatch(key) or _OTHER_PART.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is not a weight of a LoRA")
        layer = match["layer"]
        if key.startswith(("lora_unet_", "lora_transformer_")):
            layer = without_dots.get(re.sub("^lora_(unet|transformer)_", "", layer), "")
            if not layer:
                raise ValueError(f"{key!r} names no layer of the pipeline")
        layer = layer.removeprefix("base_model.model.").removeprefix("diffusion_model.")
        if not _COMPONENT.match(layer):
            layer = f"transformer.{layer}"
        if match.groupdict().get("alpha"):
            if tensor.numel() != 1:
                raise ValueError(f"{key!r} has the shape {tuple(tensor.shape)}, not the shape of one number")
            alphas[layer] = tensor.item()
        else:
            renamed[f"{layer}.{_OWN_NAMES.get(match['part'], match['part'])}"] = tensor
    if len(renamed) + len(alphas) < len(state):
        raise ValueError("two of its keys name the same weight")
    for key in [key for key in renamed if ".lora_B." in key]:
        layer = key.rpartition(".lora_B.")[0]
        factor = renamed.get(f"{layer}.lora_A.weight")
        if factor is None or factor.ndim < 2 or 0 in factor.shape:
            raise ValueError(f"{layer!r} has a `lora_B`, but no usable `lora_A`")
        rank = factor.shape[0]
        own = {"lora_alpha": alphas[layer]} if layer in alphas else config
        renamed[key] = scale_weight(renamed[key], layer_scale(own, layer.partition(".")[2], rank))
    return renamed


def layer_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """
    The factor that a layer's `lora_B(lora_A(x))` is multiplied by.

    Args:
        config (`Mapping[str, Any]`):
            Fields of a peft configuration: `lora_alpha` (by default the rank), `alpha_pattern`, `use_rslora`.
        layer (`str`):
            The layer's name in its model.
        rank (`int`):
            The layer's rank.

    Returns:
        `float`: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA.

    Raises:
        `ValueError`: alpha is not a finite number.
    """
    alpha, pattern = config.get("lora_alpha", rank), config.get("alpha_pattern") or {}
    try:
        alpha = pattern.get(get_pattern_key(list(pattern), layer), alpha)
        usable = math.isfinite(alpha) and not isinstance(alpha, bool)
    except (AttributeError, TypeError, OverflowError, re.error):
        usable = False
    if not usable:
        raise ValueError(f"alpha is {str(alpha)[:80]!r} and the pattern {str(pattern)[:80]!r}")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def scale_weight(weight: Tensor, scale: float) -> Tensor:
    """Multiply a weight by its scale, in fp32 or better; the result has the weight's own dtype."""
    if scale == 1:
        return weight
    return (weight * scale if weight.dtype.itemsize >= 4 else weight.float() * scale).to(weight.dtype)
