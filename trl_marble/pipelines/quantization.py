# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Base weights in 8 or 4 bits, with an adapter in full precision."""

from typing import Any, Literal, get_args

import torch
from diffusers import PipelineQuantizationConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..extras import require_extra


Quantization = Literal["nf4", "int8"]


def quantization_config(quantization: Quantization, compute_dtype: torch.dtype) -> PipelineQuantizationConfig:
    """
    A configuration that quantizes the linear layers of a pipeline's transformer with `bitsandbytes`.

    Text encoders and the VAE stay as they are, see [`offload_components`]. For other methods, such as those of
    `torchao`, or other components, make a [`~diffusers.PipelineQuantizationConfig`] yourself.

    Args:
        quantization (`"nf4"` or `"int8"`):
            4-bit normal floats with quantized scales (as in QLoRA), or 8-bit integers.
        compute_dtype (`torch.dtype`):
            The dtype of multiplications by 4-bit weights: the one that the pipeline is loaded in.

    Returns:
        [`~diffusers.PipelineQuantizationConfig`]: for `load_pipeline(..., quantization_config=...)`.

    Raises:
        `ValueError`: there is no such quantization.
        [`~trl_marble.extras.MissingExtraError`]: `bitsandbytes` is not installed.
    """
    if quantization not in get_args(Quantization):
        known = ", ".join(map(repr, get_args(Quantization)))
        raise ValueError(f"There is no quantization {quantization!r}; pass one of {known}.")
    require_extra("quantization", f"The quantization {quantization!r}")
    from trl import ModelConfig, get_quantization_config  # takes seconds

    options: dict[str, Any] = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}[quantization]
    dtype = str(compute_dtype).removeprefix("torch.")
    model_config = ModelConfig(dtype=dtype, use_bnb_nested_quant=True, **options)
    return PipelineQuantizationConfig(quant_mapping={"transformer": get_quantization_config(model_config)})


def lora_linear_classes() -> tuple[type[nn.Module], ...]:
    """The classes of peft's layers that add `lora_B(lora_A(x))` to a linear layer, quantized or not."""
    classes: list[type[nn.Module]] = [LoraLinear]  # that of torchao's layers is a subclass
    if is_bnb_available():
        from peft.tuners.lora.bnb import Linear8bitLt

        classes.append(Linear8bitLt)
    if is_bnb_4bit_available():
        from peft.tuners.lora.bnb import Linear4bit

        classes.append(Linear4bit)
    return tuple(classes)


def base_dtype(transformer: nn.Module) -> torch.dtype:
    """
    The dtype that a transformer computes in.

    Args:
        transformer (`nn.Module`):
            A diffusers model, with or without a LoRA.

    Returns:
        `torch.dtype`: the dtype of the model, unless that is the dtype of its LoRA: then that of the first weight that
        is not a LoRA's and not quantized to integers.
    """
    floating = ((name, weight) for name, weight in transformer.named_parameters() if weight.is_floating_point())
    name, _ = next(floating)
    if ".lora_" not in name:
        return transformer.dtype  # type: ignore[return-value]
    return next(weight.dtype for name, weight in floating if ".lora_" not in name)


def first_values(weight: Tensor, count: int = 64) -> Tensor:
    """
    The first stored numbers of a weight, to recognize it by.

    Args:
        weight (`torch.Tensor`):
            A weight, quantized or not.
        count (`int`, *optional*, defaults to `64`):
            How many numbers of each tensor that the weight consists of.

    Returns:
        `torch.Tensor` of shape `[n]`: float32 on the CPU.
    """
    if is_traceable_wrapper_subclass(weight):  # as the weights of torchao are
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
        return torch.cat([first_values(part, count) for part in parts])
    return weight.detach().as_subclass(Tensor).flatten()[:count].float().cpu()
