# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Tiny pipelines whose transformer is quantized, on the CPU."""

import pytest
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusion3Pipeline, TorchAoConfig
from tiny import tiny_sd3
from torch import nn

from trl_marble.pipelines import load_pipeline


QUANTIZATIONS = ("nf4", "int8", "torchao")


def quantized_sd3(quantization: str, folder) -> StableDiffusion3Pipeline:
    """The tiny pipeline with a quantized transformer; skips the test where the library is missing."""
    if quantization != "torchao":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        pipeline = tiny_sd3(num_layers=1)
        _use_bitsandbytes(pipeline.transformer, quantization)
        return pipeline
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    tiny_sd3(num_layers=1).save_pretrained(folder)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    return load_pipeline(folder, torch.float32, quantization_config=config)


def _use_bitsandbytes(transformer: nn.Module, quantization: str) -> None:
    """What `from_pretrained` makes of a transformer, which refuses to do it without a GPU."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    for module in [*transformer.transformer_blocks.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) is nn.Linear:
                sizes = child.in_features, child.out_features, child.bias is not None
                if quantization == "nf4":
                    linear = Linear4bit(*sizes, compute_dtype=child.weight.dtype, quant_type="nf4")
                    linear.weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                    linear.support_avx512bf16_for_cpu = False  # packs weights anew, in bf16 and for larger layers only
                else:
                    linear = Linear8bitLt(*sizes, has_fp16_weights=False)
                    linear.weight = Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
                linear.bias = child.bias
                setattr(module, name, linear.to("cpu"))  # which quantizes the weight
    if quantization == "nf4":
        transformer.is_loaded_in_4bit = True
    else:
        transformer.is_loaded_in_8bit = True
    transformer.quantization_method = "bitsandbytes"
