# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Read the LoRA layers of an adapter's file, and write such a file."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..pipelines.adapters import adapter_metadata, find_adapter
from ..pipelines.lora_layouts import layer_scale, scale_weight


_LORA_KEY = re.compile(
    r"(?P<layer>(?:transformer|unet|text_encoder)(?:_\d+)?\.[\w.]+)\.(?P<part>lora_[AB])\.weight", re.ASCII
)


@dataclass(frozen=True)
class LoraLayer:
    """
    The change that an adapter adds to one layer's weight: `scale * lora_B @ lora_A`.

    Args:
        lora_A (`Tensor` of shape `[r, in_features]`): the second factor; for a convolution `[r, in, height, width]`.
        lora_B (`Tensor` of shape `[out_features, r]`): the first factor; for a convolution `[out, r, 1, 1]`.
        scale (`float`): alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The number of columns of `lora_B`."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's own weight."""
        return (self.lora_B.shape[0], *self.lora_A.shape[1:])


def read_layers(adapter: str | os.PathLike) -> dict[str, LoraLayer]:
    """
    Read an adapter layer by layer.

    Args:
        adapter (`str` or `os.PathLike`):
            Hub id (`"user/name"`), a folder with `pytorch_lora_weights.safetensors`, or a `.safetensors` file.

    Returns:
        `dict[str, LoraLayer]`: the layers by their names in the pipeline (`"transformer.transformer_blocks.0..."`),
        sorted. Tensors have the dtype of the file.

    Raises:
        `OSError`: there is no such adapter.
        `ValueError`: the file is damaged or no safetensors file, or has weights other than plain LoRA in the key
            format of diffusers and peft.
    """
    file = find_adapter(os.fspath(adapter))
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}). Download or save it again.") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{file} has the weight {key!r}, which is not plain LoRA in the key format of diffusers "
                "('transformer.<layer>.lora_A.weight'). Load it with `pipeline.load_lora_weights` and save it with "
                "`trl_marble.hub.save_adapter` first. DoRA and biases are not supported here."
            )
        parts.setdefault(match["layer"], {})[match["part"]] = tensor
    if not parts:
        raise ValueError(f"{file} has no tensors. Pass the file of a trained adapter.")
    config = adapter_metadata(file)
    return {layer: _lora_layer(file, layer, parts[layer], config) for layer in sorted(parts)}


def write_layers(layers: Mapping[str, LoraLayer], file: Path) -> None:
    """
    Write LoRA layers as one file that `load_lora_weights` reads.

    `lora_B` is multiplied by the scale, so that alpha is r everywhere, which loaders without metadata assume.

    Args:
        layers (`Mapping[str, LoraLayer]`):
            The layers, in the form of [`read_layers`].
        file (`Path`):
            The file to write. Its folder is made.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    components: dict[str, dict[str, int]] = {}
    for layer, lora in layers.items():
        tensors[f"{layer}.lora_A.weight"] = lora.lora_A.float().contiguous()
        tensors[f"{layer}.lora_B.weight"] = scale_weight(lora.lora_B.float(), lora.scale).contiguous()
        component, name = layer.split(".", 1)
        components.setdefault(component, {})[name] = lora.rank
    for component, ranks in components.items():
        usual = Counter(ranks.values()).most_common(1)[0][0]
        # Patterns are regular expressions for the end of a name; with `^` they match complete names only.
        unusual = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
        values = {"r": usual, "lora_alpha": usual, "rank_pattern": unusual, "alpha_pattern": unusual}
        values["target_modules"] = sorted(ranks)
        config |= {f"{component}.{key}": value for key, value in values.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    unfinished = file.with_name(f"tmp-{file.name}")  # never half a file, also if the process is killed
    save_file(tensors, unfinished, metadata=header)
    sort_header(unfinished)
    os.replace(unfinished, file)


def sort_header(file: Path) -> None:
    """
    Sort the header of a safetensors file, so that equal adapters are equal files.

    safetensors writes the entries of its metadata in a random order. A file is 8 bytes of header length
    (little-endian), the header in JSON, padded with spaces to a multiple of 8 bytes, and the tensors.
    """
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def _lora_layer(file: Path, layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraLayer:
    """One layer with its scale, which is 1 if the file has none."""
    is_pair = parts.keys() == {"lora_A", "lora_B"} and all(part.ndim in (2, 4) for part in parts.values())
    if not is_pair or parts["lora_A"].shape[0] != parts["lora_B"].shape[1] or 0 in parts["lora_A"].shape:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise ValueError(f"The layer {layer!r} in {file} has {shapes}, which is not a pair of LoRA factors.")
    if not all(tensor.isfinite().all() for tensor in parts.values()):
        raise ValueError(f"The layer {layer!r} in {file} has values that are not finite. Train the adapter again.")
    rank = parts["lora_A"].shape[0]
    component, name = layer.split(".", 1)
    own = {key.removeprefix(f"{component}."): value for key, value in config.items()}
    try:
        scale = layer_scale(own, name, rank)
    except ValueError as error:
        raise ValueError(
            f"The metadata in {file} has no usable scale for the layer {layer!r}: {error}. Save the adapter again."
        ) from error
    return LoraLayer(parts["lora_A"], parts["lora_B"], scale)
