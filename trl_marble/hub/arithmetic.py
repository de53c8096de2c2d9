# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Compare and combine adapters, by what they add to the weights.

An adapter adds scale * B @ A to a layer's weight. All results are about this product, since the factors themselves are
arbitrary: B @ A = (B M) @ (M^-1 A) for any invertible M.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from ..pipelines import find_adapter
from .files import LoraLayer, read_layers, write_layers


@dataclass(frozen=True)
class WeightComparison:
    """
    A comparison of two changes of the same weights.

    Args:
        norm_a (`float`): Frobenius norm of the first change.
        norm_b (`float`): Frobenius norm of the second change.
        dot (`float`): Their inner product, the sum of all elementwise products.
    """

    norm_a: float
    norm_b: float
    dot: float

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the changes, in [-1, 1]; NaN if one of them is zero."""
        if self.norm_a == 0 or self.norm_b == 0:
            return math.nan
        return max(-1.0, min(1.0, self.dot / (self.norm_a * self.norm_b)))

    @property
    def relative_norm(self) -> float:
        """Norm of the second change divided by that of the first; infinite if the first is zero, NaN if both are."""
        if self.norm_a == 0:
            return math.nan if self.norm_b == 0 else math.inf
        return self.norm_b / self.norm_a


@dataclass(frozen=True)
class AdapterComparison:
    """
    Two adapters compared by their weight changes.

    Args:
        overall (`WeightComparison`): All layers together, as one long vector.
        layers (`dict[str, WeightComparison]`): Each layer that one of them changes, by its name in the pipeline. The
            norm is 0 for an adapter that does not change the layer.
    """

    overall: WeightComparison
    layers: dict[str, WeightComparison]


def compare_adapters(a: str | os.PathLike, b: str | os.PathLike) -> AdapterComparison:
    """
    Compare the changes of two adapters to the weights of the same base model, from their files alone.

    Args:
        a (`str` or `os.PathLike`):
            The first adapter: Hub id (`"user/name"`), a folder with `pytorch_lora_weights.safetensors`, or a
            `.safetensors` file.
        b (`str` or `os.PathLike`):
            The second adapter. Ranks, alphas and layers may differ.

    Returns:
        `AdapterComparison`: cosine and relative norm overall and of each layer, computed in fp64.

    Raises:
        `OSError`: one of the adapters does not exist.
        `ValueError`: a file is not a plain LoRA, or the two adapters have no layer in common or layers of different
            shapes, as adapters of different base models have.
    """
    layers_a, layers_b = read_layers(a), read_layers(b)
    _check_same_base(layers_a, layers_b)
    names = sorted(layers_a.keys() | layers_b.keys())
    layers = {name: _compare(layers_a.get(name), layers_b.get(name)) for name in names}
    overall = WeightComparison(
        norm_a=math.hypot(*(found.norm_a for found in layers.values())),
        norm_b=math.hypot(*(found.norm_b for found in layers.values())),
        dot=math.fsum(found.dot for found in layers.values()),
    )
    return AdapterComparison(overall, layers)


def combine_adapters(weights: Mapping[str | os.PathLike, float], output_dir: str | os.PathLike) -> Path:
    """
    Write the adapter whose change is the weighted sum of the changes of others: a point between two, or the average
    of many (a soup, https://huggingface.co/papers/2306.04488).

    The sum is exact up to the rounding of fp32: the factors are concatenated, so that a layer's rank is the sum of the
    ranks. Averages of A and of B would have another product.

    Args:
        weights (`Mapping[str | os.PathLike, float]`):
            Adapter, see [`compare_adapters`], -> its weight. Ranks, alphas and layers may differ, and the weights need
            not sum to 1. Those with the weight 0 are left out.
        output_dir (`str` or `os.PathLike`):
            Folder for `pytorch_lora_weights.safetensors`; made if missing. An earlier file of that name is replaced.

    Returns:
        `Path`: the file, an ordinary LoRA for `load_lora_weights`.

    Raises:
        `OSError`: one of the adapters does not exist.
        `ValueError`: no weight differs from 0, or one is not finite; the file would replace one of the adapters; or
            they are of different base models (see [`compare_adapters`]).
    """
    for adapter, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"The weight of {str(adapter)!r} is {weight}; pass a finite number.")
    if not any(weights.values()):
        raise ValueError(f"No weight differs from 0: {list(weights.values())}. Give one adapter a weight.")
    file = Path(output_dir) / LORA_WEIGHT_NAME_SAFE
    for adapter in weights:
        if file.exists() and file.samefile(find_adapter(os.fspath(adapter))):
            raise ValueError(f"{str(output_dir)!r} is the folder of one of the adapters. Pass another `output_dir`.")
    parts: dict[str, list[tuple[float, LoraLayer]]] = {}
    known: dict[str, LoraLayer] = {}  # of all adapters so far
    for adapter, weight in weights.items():
        layers = read_layers(adapter)
        if known:
            _check_same_base(known, layers)
        known |= layers
        if weight:
            for name, layer in layers.items():
                parts.setdefault(name, []).append((weight, layer))
    write_layers({name: _stack(parts[name]) for name in sorted(parts)}, file)
    return file


def _stack(parts: list[tuple[float, LoraLayer]]) -> LoraLayer:
    """One LoRA layer whose change is the weighted sum of the changes of the parts."""
    return LoraLayer(
        lora_A=torch.cat([layer.lora_A.float() for _, layer in parts]),
        lora_B=torch.cat([weight * layer.scale * layer.lora_B.float() for weight, layer in parts], dim=1),
        scale=1.0,
    )


def _compare(a: LoraLayer | None, b: LoraLayer | None) -> WeightComparison:
    return WeightComparison(
        norm_a=0.0 if a is None else math.sqrt(max(0.0, _dot(a, a))),
        norm_b=0.0 if b is None else math.sqrt(max(0.0, _dot(b, b))),
        dot=0.0 if a is None or b is None else _dot(a, b),
    )


def _dot(a: LoraLayer, b: LoraLayer) -> float:
    """The inner product <B_a A_a, B_b A_b> = <B_a^T B_b, A_a A_b^T>, in matrices of the size of the ranks."""
    left = a.lora_B.double().flatten(1).T @ b.lora_B.double().flatten(1)
    right = a.lora_A.double().flatten(1) @ b.lora_A.double().flatten(1).T
    return a.scale * b.scale * (left * right).sum().item()


def _check_same_base(a: Mapping[str, LoraLayer], b: Mapping[str, LoraLayer]) -> None:
    """Raise a `ValueError` if two adapters cannot be of the same base model."""
    common = sorted(a.keys() & b.keys())
    if not common:
        raise ValueError(
            f"The two adapters have no layer in common (the first changes {next(iter(a))!r}, the second "
            f"{next(iter(b))!r}, ...). Pass adapters of the same base model."
        )
    for layer in common:
        if a[layer].shape != b[layer].shape:
            raise ValueError(
                f"The layer {layer!r} has the shape {a[layer].shape} in the first adapter and {b[layer].shape} in the "
                "second. Pass adapters of the same base model."
            )
