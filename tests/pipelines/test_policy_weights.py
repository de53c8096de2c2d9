# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The weights of a policy: which of them gives a velocity, and what is saved of them."""

import inspect

import pytest
import tiny
import torch
from peft import LoraConfig

from trl_marble.pipelines import FlowPipeline, Policy, PolicyWeights, add_trainable_adapter
from trl_marble.pipelines.policy_weights import _MODELESS
from trl_marble.pipelines.weight_shadow import find_places


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])


def make_weights(seed=0, **config):
    torch.manual_seed(seed)
    flow = FlowPipeline(tiny.tiny_sd3(num_layers=1), max_sequence_length=16)
    settings = {"r": 2, "target_modules": ["to_q", "to_v"]} | config
    trained = dict(add_trainable_adapter(flow.pipeline, LoraConfig(**settings)))
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    return PolicyWeights(Policy(flow), trained)


@torch.no_grad()
def train(weights):
    """As if an optimizer had taken a step."""
    for parameter in weights.parameters:
        parameter.add_(0.05)


def test_each_velocity_is_that_of_its_weights(inputs):
    weights = make_weights()
    bare = FlowPipeline(tiny.tiny_sd3(num_layers=1), max_sequence_length=16)
    conditioning = weights.flow.encode(["a cat", "a dog"])
    first = weights.velocity(*inputs, conditioning)
    assert first.requires_grad and weights.are_on_policy()
    assert weights.old_velocity(*inputs, conditioning).equal(first)
    train(weights)
    assert not weights.are_on_policy()
    old, base = weights.old_velocity(*inputs, conditioning), weights.base_velocity(*inputs, conditioning)
    assert old.equal(first) and not old.requires_grad and not base.requires_grad
    assert base.equal(bare.velocity(*inputs, bare.encode(["a cat", "a dog"])))
    assert not weights.velocity(*inputs, conditioning).isclose(first, atol=1e-4).all()


def test_with_dropout_no_forward_pass_for_training_is_one_of_the_old_policy(inputs):
    weights = make_weights(lora_dropout=0.5)
    conditioning = weights.flow.encode(["a cat", "a dog"])
    assert not weights.are_on_policy()
    old = weights.old_velocity(*inputs, conditioning)
    assert weights.old_velocity(*inputs, conditioning).equal(old)
    assert not weights.velocity(*inputs, conditioning).equal(old)


def test_every_module_that_has_modes_is_in_that_of_its_velocity(inputs):
    weights = make_weights(lora_dropout=0.5)
    modules = [module for module in weights.policy.modules() if type(module) not in _MODELESS]
    assert any(isinstance(module, torch.nn.Dropout) for module in modules)
    assert {weights.policy, weights.policy.transformer, *weights._adapter_layers} < set(modules)
    conditioning = weights.flow.encode(["a cat", "a dog"])
    for velocity, trains in ((weights.velocity, True), (weights.base_velocity, False), (weights.velocity, True)):
        velocity(*inputs, conditioning)
        assert {module.training for module in modules} == {trains}


@pytest.mark.parametrize("kind", sorted(_MODELESS, key=lambda kind: kind.__name__))
def test_modules_that_are_left_alone_do_not_read_the_mode(kind):
    assert "self.training" not in inspect.getsource(kind)


def test_an_old_velocity_leaves_every_parameter_in_its_place(inputs):
    weights = make_weights()
    conditioning = weights.flow.encode(["a cat", "a dog"])
    train(weights)
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in weights.policy.named_parameters()}
    with weights.old.swapped_in():
        expected = weights.detached_velocity(*inputs, conditioning)
    assert weights.old_velocity(*inputs, conditioning).equal(expected)
    with pytest.raises(ValueError, match="one time and one row per sample"):
        weights.old_velocity(*inputs, conditioning.select(torch.tensor([0])))
    after = {name: (id(parameter), parameter.data_ptr()) for name, parameter in weights.policy.named_parameters()}
    assert after == before


def test_a_weight_in_two_modules_is_refused():
    modules = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    modules["other"].bias = modules["one"].bias
    assert len(find_places(modules, [modules["one"].weight])) == 1  # of those that are trained
    with pytest.raises(ValueError, match="Two modules share one trained weight"):
        find_places(modules, [modules["one"].bias])


def test_what_was_saved_is_taken_over_in_place():
    saved, fresh = make_weights(), make_weights(seed=1)
    train(saved)
    saved.averaged.lerp_(0.5)
    places = [parameter.data_ptr() for parameter in fresh.parameters]
    fresh.load_state_dict(saved.state_dict())
    for kind, values in saved.state_dict().items():
        for name, value in values.items():
            assert fresh.state_dict()[kind][name].equal(value)
    assert [parameter.data_ptr() for parameter in fresh.parameters] == places
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in fresh.parameters)


@pytest.mark.parametrize("kind", ["current", "old", "average"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_the_weights_of_another_adapter_are_refused_before_anything_is_taken_over(kind, fault):
    weights, other = make_weights(), make_weights(seed=1)
    before = {name: value.clone() for name, value in weights.trained.items()}
    state = {each: dict(values) for each, values in other.state_dict().items()}
    name = list(before)[-1]
    if fault == "missing":
        del state[kind][name]
    elif fault == "unexpected":
        state[kind]["other"] = torch.ones(2)
    else:
        state[kind][name] = torch.ones(3)
    with pytest.raises(ValueError, match="belong to another adapter.*Use the base model and the `peft_config`"):
        weights.load_state_dict(state)
    for each in (weights.trained, weights.old.state_dict(), weights.averaged.state_dict()):
        assert all(each[name].equal(value) for name, value in before.items())
