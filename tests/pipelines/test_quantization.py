# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A LoRA on a base of 8 or 4 bits trains, saves and loads as on any other."""

import sys

import pytest
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
from quantized import QUANTIZATIONS, quantized_sd3
from tiny import tiny_sd3
from tiny_families import tiny_flux2
from torch import nn
from trainer_helpers import small_trainer

from trl_marble.balance import Objective, SeparateBackward, WeightedBackward
from trl_marble.checkpoint.run_state import base_fingerprint
from trl_marble.cli.sources import load_model
from trl_marble.extras import MissingExtraError
from trl_marble.pipelines import (
    FlowPipeline,
    add_trainable_adapter,
    load_adapter,
    load_pipeline,
    lora_config,
    plain_lora_linears,
)
from trl_marble.pipelines.quantization import first_values, quantization_config


every_quantization = pytest.mark.parametrize("quantization", QUANTIZATIONS)


@every_quantization
def test_fast_per_reward_gradients_agree_with_slow_ones(quantization, tmp_path):
    pipeline = quantized_sd3(quantization, tmp_path)
    flow = FlowPipeline(pipeline, 16, 16, max_sequence_length=24)
    trainable = dict(add_trainable_adapter(pipeline, lora_config(pipeline, r=4, lora_alpha=8)))
    for parameter in trainable.values():
        torch.nn.init.normal_(parameter, std=0.1)
    linears = plain_lora_linears(pipeline.transformer, trainable)
    assert linears is not None and len(linears) == len(trainable)
    assert flow.dtype == torch.float32

    torch.manual_seed(0)
    conditioning = flow.encode(["a red dog", "a cat"])
    x_t = torch.randn(2, *flow.rollout(conditioning, [0, 1], 1).latents.shape[1:])
    coefficients = torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.3, 0.3]])
    gradients = []
    for rows in (WeightedBackward(3, linears), SeparateBackward(3, list(trainable.values()))):
        with rows.recording(2):
            velocity = flow.velocity(x_t, torch.tensor([0.3, 0.8]), conditioning)
            rows.backward([Objective(velocity.square().flatten(1).mean(dim=1), coefficients)])
        gradients.append(rows.gradients)
    assert gradients[0].norm(dim=1).min() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@every_quantization
def test_training_moves_the_adapter_and_what_is_saved_loads_onto_a_quantized_base(quantization, tmp_path):
    pipeline = quantized_sd3(quantization, tmp_path / "base")
    before = base_fingerprint(pipeline.transformer.requires_grad_(False))
    trainer = small_trainer(tmp_path / "run", pipeline=pipeline, save_strategy="steps", save_steps=1)
    start = {name: parameter.detach().clone() for name, parameter in trainer.weights.trained.items()}
    trainer.train()
    assert any(not torch.equal(parameter, start[name]) for name, parameter in trainer.weights.trained.items())
    assert base_fingerprint(trainer.pipeline.transformer) == before  # the base did not move
    trainer.save_model()

    again = load_adapter(quantized_sd3(quantization, tmp_path / "base"), tmp_path / "run")
    flows = [FlowPipeline(p, 16, 16, max_sequence_length=16) for p in (trainer.pipeline, again)]
    with trainer.weights.averaged.swapped_in():
        images = [flow.rollout(flow.encode(["a cat"]), [0], 2, output_type="pt").images for flow in flows]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)

    resumed = small_trainer(tmp_path / "run", pipeline=quantized_sd3(quantization, tmp_path / "base"), max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 3


@every_quantization
def test_a_checkpoint_of_a_quantized_base_is_not_resumed_on_another(quantization, tmp_path):
    quantized, plain = quantized_sd3(quantization, tmp_path).transformer, tiny_sd3(num_layers=1).transformer
    assert base_fingerprint(quantized) != base_fingerprint(plain)
    for weight in quantized.parameters():
        values = first_values(weight)
        assert values.ndim == 1 and values.dtype == torch.float32 and values.isfinite().all()


def test_the_dtype_is_not_that_of_a_lora_in_front_of_all_other_weights():
    pipeline = tiny_flux2().to(torch.bfloat16)
    transformer = pipeline.transformer
    add_trainable_adapter(pipeline, lora_config(pipeline, r=2, lora_alpha=2))
    for module in transformer.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    assert transformer.dtype == torch.float32  # what diffusers finds first
    assert FlowPipeline(pipeline).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("quantization", "quantizer", "layer"),
    [("nf4", BnB4BitDiffusersQuantizer, "Linear4bit"), ("int8", BnB8BitDiffusersQuantizer, "Linear8bitLt")],
)
def test_the_transformer_alone_is_loaded_quantized(quantization, quantizer, layer, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    # They load onto a GPU only, although bitsandbytes computes on a CPU too.
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    tiny_sd3(num_layers=1).save_pretrained(tmp_path)
    config = quantization_config(quantization, torch.bfloat16)
    pipeline = load_pipeline(str(tmp_path), torch.bfloat16, quantization_config=config)
    layers = [module for module in pipeline.transformer.modules() if type(module).__name__ == layer]
    assert layers and layer not in {type(module).__name__ for module in pipeline.text_encoder.modules()}
    if quantization == "nf4":
        assert layers[0].weight.quant_state.quant_type == "nf4" and layers[0].weight.quant_state.nested
        assert layers[0].compute_dtype == torch.bfloat16


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="'nf4', 'int8'"):
        quantization_config("fp3", torch.bfloat16)
    with pytest.raises(ValueError, match="leave out the quantization 'nf4'"):
        load_model("shapeworld", quantization="nf4")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"'nf4' needs bitsandbytes.*`pip install \"\.\[quantization\]\"`"):
        quantization_config("nf4", torch.bfloat16)
