# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""An adapter with parts, each sample with its own shares of them: against diffusers' `set_adapters` on the parts."""

from contextlib import nullcontext

import pytest
import torch
from adapter_helpers import TARGETS
from peft import LoraConfig
from tiny import tiny_flux, tiny_sd3

from trl_marble.hub import save_adapter
from trl_marble.hub.slider import part_file, part_names, split_adapter
from trl_marble.pipelines import FlowPipeline, Policy
from trl_marble.pipelines.mixing import add_mixed_adapter, mixing


NAMES = ["bright", "<lambda>", "type"]
SHARES = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.1, 0.9], [1 / 3, 1 / 3, 1 / 3]])
PROMPTS = ["a cat", "tree", "sky", "a red dog"]


def flow_of(pipeline, **settings):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"max_sequence_length": 16} | settings
    return FlowPipeline(pipeline, **settings)


def sd3_flow(**settings):
    return flow_of(tiny_sd3(num_layers=2), **settings)


def flux_flow(**settings):
    return flow_of(tiny_flux(), height=16, width=16, guidance_scale=3.5, **settings)


def config(**changes):
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "gaussian"}
    return LoraConfig(**(settings | changes))


def add_parts(flow, **changes):
    """An adapter with three parts that do something."""
    trained = add_mixed_adapter(flow, config(**changes), parts=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return trained


def inputs(flow):
    x_t = flow.rollout(flow.encode(PROMPTS), range(4), 1).latents
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    return noise, torch.tensor([0.2, 0.4, 0.6, 0.8]), flow.encode(PROMPTS)


def load_parts(flow, folder):
    """As a user does, with diffusers alone."""
    names = part_names(NAMES)
    for name in names:
        flow.pipeline.load_lora_weights(str(folder), weight_name=part_file(name), adapter_name=name)
    return names


@pytest.mark.parametrize("make_flow", [sd3_flow, flux_flow])
def test_each_sample_has_the_velocity_that_set_adapters_gives_with_its_shares(tmp_path, make_flow):
    mixed, fresh = make_flow(), make_flow()
    # Of two ranks, and an alpha that is neither.
    add_parts(mixed, target_modules=["to_q", "to_k", "to_v", "to_out.0"], rank_pattern={"to_k": 3})
    files = split_adapter(save_adapter(mixed.pipeline, tmp_path), NAMES)
    assert [file.stem for file in files] == ["bright", "lambda", "type_"]
    names = load_parts(fresh, tmp_path)
    x_t, t, conditioning = inputs(mixed)
    with torch.no_grad():
        base = make_flow().velocity(x_t, t, conditioning)
        with mixing(mixed, SHARES):
            velocity = mixed.velocity(x_t, t, conditioning)
            again = mixed.velocity(x_t, t, conditioning)  # as it was recorded
        for sample, shares in enumerate(SHARES):
            fresh.pipeline.set_adapters(names, shares.tolist())
            own = fresh.velocity(x_t, t, conditioning)[sample]
            assert (velocity[sample] - own).norm() < 2e-6 * own.norm()
            assert (own - base[sample]).norm() > 0.01 * base.norm()  # they do something
        assert again.equal(velocity)
        # Without shares: all parts alike.
        fresh.pipeline.set_adapters(names, [1 / 3] * 3)
        expected = fresh.velocity(x_t, t, conditioning)
        assert (mixed.velocity(x_t, t, conditioning) - expected).norm() < 2e-6 * expected.norm()
        with mixing(mixed, SHARES[1:2]):  # one row for all
            velocity = mixed.velocity(x_t, t, conditioning)
        fresh.pipeline.set_adapters(names, SHARES[1].tolist())
        expected = fresh.velocity(x_t, t, conditioning)
        assert (velocity - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_of_a_rollout_are_those_of_set_adapters(tmp_path, guidance_scale):
    mixed, fresh = (sd3_flow(guidance_scale=guidance_scale) for _ in range(2))
    add_parts(mixed)
    split_adapter(save_adapter(mixed.pipeline, tmp_path), NAMES)
    names, conditioning = load_parts(fresh, tmp_path), fresh.encode(PROMPTS)
    with mixing(mixed, SHARES):
        latents = mixed.rollout(conditioning, range(4), 3).latents
    for sample, shares in enumerate(SHARES):
        fresh.pipeline.set_adapters(names, shares.tolist())
        own = fresh.rollout(conditioning, range(4), 3).latents[sample]
        assert (latents[sample] - own).norm() < 1e-5 * own.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_adapters_of_their_own(checkpointing):
    mixed, apart = sd3_flow(), sd3_flow()
    trained = add_parts(mixed)
    parts = [f"part_{k}" for k in range(3)]
    for name in parts:
        apart.transformer.add_adapter(config(), adapter_name=name)
    own = dict(apart.transformer.named_parameters())
    for name, whole in trained.items():
        for part, block in zip(parts, whole.chunk(3, dim=0 if ".lora_A." in name else 1), strict=True):
            own[name.replace(".default.", f".{part}.")].data = block.clone()
    x_t, t, conditioning = inputs(mixed)
    target = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
    if checkpointing:
        Policy(mixed).activation_checkpointing_enable()
        mixed.transformer.train()
    with mixing(mixed, SHARES):
        (mixed.velocity(x_t, t, conditioning) - target).square().sum().backward()
    for sample, shares in enumerate(SHARES):
        apart.transformer.set_adapters(parts, shares.tolist())
        for name, parameter in own.items():
            parameter.requires_grad_(".part_" in name)
        velocity = apart.velocity(x_t, t, conditioning)[sample]
        (velocity - target[sample]).square().sum().backward()
    for name, whole in trained.items():
        blocks = whole.grad.chunk(3, dim=0 if ".lora_A." in name else 1)
        for part, block in zip(parts, blocks, strict=True):
            expected = own[name.replace(".default.", f".{part}.")].grad
            unused = name.startswith("transformer_blocks.1.attn.add_q")  # the last layer drops the text
            assert (block - expected).norm() <= 1e-4 * expected.norm() and (expected.norm() > 0 or unused), name


def test_what_a_part_has_no_share_of_does_not_reach_it():
    flow = sd3_flow()
    trained = add_parts(flow)
    with mixing(flow, torch.tensor([[0.0, 1.0, 0.0]])):
        flow.velocity(*inputs(flow)).square().sum().backward()
    for name, whole in trained.items():
        norms = [block.norm() for block in whole.grad.chunk(3, dim=0 if ".lora_A." in name else 1)]
        assert norms[0] == norms[2] == 0 and (norms[1] > 0 or "1.attn.add_q" in name)


def test_parts_begin_as_adapters_of_their_own_would():
    flow = sd3_flow()
    trained = add_mixed_adapter(flow, config(r=16, rank_pattern={"to_k": 8}), parts=3)
    for name, weight in trained.items():
        rank = 8 if ".to_k." in name else 16
        assert 3 * rank in weight.shape
        if ".lora_B." in name:
            assert weight.abs().max() == 0
        else:
            assert weight.std().item() == pytest.approx(1 / rank, rel=0.15)
    layer = flow.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling["default"] == pytest.approx(6 / (3 * 16))
    default = add_mixed_adapter(sd3_flow(), None, parts=2)
    assert {min(weight.shape) for weight in default.values()} <= {32, 64}


def test_the_context_leaves_nothing_behind():
    flow = sd3_flow()
    add_parts(flow)
    x_t, t, conditioning = inputs(flow)
    with torch.no_grad():
        before = flow.velocity(x_t, t, conditioning)
        with pytest.raises(KeyError), mixing(flow, SHARES):
            assert not flow.velocity(x_t, t, conditioning).equal(before)
            raise KeyError("an error")
        assert flow.velocity(x_t, t, conditioning).equal(before)
        with mixing(flow, None):
            assert flow.velocity(x_t, t, conditioning).equal(before)
    assert not any(module._forward_hooks for module in flow.transformer.modules())


def test_layers_without_a_row_for_each_sample_are_refused():
    flow = sd3_flow()
    add_parts(flow)
    x_t, t, conditioning = inputs(flow)
    few = torch.tensor([0, 1])
    for rows, context in ((SHARES[:3], nullcontext()), (SHARES[:2], nullcontext()), (SHARES, torch.no_grad())):
        with pytest.raises(RuntimeError, match="a row for each of the . samples, and one has . rows"), context:
            part = (x_t, t, conditioning) if len(rows) < 4 else (x_t[few], t[few], conditioning.select(few))
            with mixing(flow, rows):
                flow.velocity(*part)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"lora_bias": True, "init_lora_weights": True},
    ],
)
def test_other_adapters_than_plain_ones_are_refused(changes):
    flow = sd3_flow()
    with pytest.raises(ValueError, match="`balance_slider=True` trains plain LoRAs.*Set use_"):
        add_mixed_adapter(flow, config(**changes), parts=2)
    assert add_mixed_adapter(flow, config(), parts=2)  # the same pipeline can be tried again
