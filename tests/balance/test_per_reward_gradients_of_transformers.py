# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The weighted backward pass on the attention layers of real diffusers transformers, against one pass a row."""

import pytest
import tiny
import tiny_families
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

from trl_marble.balance import Objective, SeparateBackward, WeightedBackward
from trl_marble.pipelines import plain_lora_linears


BATCH, TOKENS = 3, 5
times = torch.tensor([0.2, 0.5, 0.9])


def sd3():
    model = tiny.tiny_sd3(dual_attention_layers=(0,)).transformer
    x, text, pooled = torch.randn(BATCH, 4, 8, 8), torch.randn(BATCH, TOKENS, 64), torch.randn(BATCH, 64)
    return model, lambda: model(x, text, pooled, times)[0]


def flux():
    model = tiny.tiny_flux().transformer
    x, text, pooled = torch.randn(BATCH, 16, 16), torch.randn(BATCH, TOKENS, 32), torch.randn(BATCH, 32)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return model, lambda: model(x, text, pooled, times, places, torch.zeros(TOKENS, 3), times)[0]


def qwen_image():
    model = tiny_families.tiny_qwen_image().transformer
    x, text, mask = torch.randn(BATCH, 16, 16), torch.randn(BATCH, TOKENS, 16), torch.ones(BATCH, TOKENS).long()
    return model, lambda: model(x, text, mask, times, [[(1, 4, 4)]] * BATCH)[0]


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    x, text = torch.randn(BATCH, 4, 2, 4, 4), torch.randn(BATCH, TOKENS, 16)
    return model, lambda: model(x, 1000 * times, text)[0]


def sana():
    model = tiny_families.tiny_sana().transformer
    x, text = torch.randn(BATCH, 4, 4, 4), torch.randn(BATCH, TOKENS, 8)
    return model, lambda: model(x, text, 1000 * times)[0]


def lumina2():
    model = tiny_families.tiny_lumina2().transformer
    x, text, mask = torch.randn(BATCH, 4, 4, 4), torch.randn(BATCH, TOKENS, 8), torch.ones(BATCH, TOKENS).bool()
    mask[1, 3:] = False  # a shorter prompt
    return model, lambda: model(x, times, text, mask)[0]


def z_image():
    model = tiny_families.tiny_z_image().transformer
    x, text = torch.randn(BATCH, 4, 1, 4, 4), [torch.randn(length, 16) for length in (5, 3, 7)]
    return model, lambda: torch.stack(model(list(x), times, text)[0])


@pytest.mark.parametrize("make", [sd3, flux, qwen_image, wan, sana, lumina2, z_image], ids=lambda make: make.__name__)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["stored", "checkpointed"])
def test_rows_of_attention_layers(make, checkpointed):
    torch.manual_seed(0)
    model, velocity = make()
    model.requires_grad_(False).train()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointed:
        model.enable_gradient_checkpointing()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    linears = plain_lora_linears(model, trainable)
    assert linears is not None and len(linears) == len(trainable) >= 8
    target = torch.randn_like(velocity())
    coefficients = torch.randn(2, 4, BATCH)
    coefficients[:, 1::2, 0] = 0  # rewards that do not apply to the first sample

    def objectives():
        output = velocity()
        losses = (output - target).square().flatten(1).mean(dim=1), (output * target).flatten(1).mean(dim=1)
        return [Objective(*pair) for pair in zip(losses, coefficients, strict=True)]

    separate = SeparateBackward(4, list(trainable.values()))
    separate.backward(objectives())
    weighted = WeightedBackward(4, linears)
    with weighted.recording(BATCH):
        weighted.backward(objectives())
    assert separate.gradients.norm(dim=1).min() > 0
    difference = (weighted.gradients - separate.gradients).norm(dim=1) / separate.gradients.norm(dim=1)
    assert difference.max() < 1e-5
