# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest
import tiny
import torch

from trl_marble.pipelines import (
    FlowPipeline,
    Policy,
    WeightShadow,
    adapters_disabled,
    add_trainable_adapter,
    lora_config,
)


@pytest.fixture
def flow():
    return FlowPipeline(tiny.tiny_sd3(), max_sequence_length=16)


@pytest.fixture
def trainable(flow):
    torch.manual_seed(0)
    parameters = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=4))
    for _, parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    return parameters


def velocity(flow):
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return flow.velocity(x_t, torch.tensor([0.2, 0.7]), flow.encode(["a cat", "a dog"]))


def values(parameters):
    return [parameter.detach().clone() for _, parameter in parameters]


def all_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# --- policy ----------------------------------------------------------------------------------------------------------


def test_the_transformer_is_the_policys_only_module(flow, trainable):
    policy = Policy(flow)
    assert [name for name, _ in policy.named_children()] == ["transformer"]
    assert not hasattr(policy, "config")
    assert (policy.device, policy.dtype) == (torch.device("cpu"), torch.float32)
    named = [(f"transformer.{name}", parameter) for name, parameter in trainable]
    assert [(n, p) for n, p in policy.named_parameters() if p.requires_grad] == named


def test_calling_the_policy_gives_the_velocity(flow):
    conditioning = flow.encode(["a cat"])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([0.4])
    assert torch.equal(Policy(flow)(x_t, t, conditioning), flow.velocity(x_t, t, conditioning))


def test_checkpointing_is_switched_on_and_off(flow):
    policy = Policy(flow)
    policy.activation_checkpointing_enable({"preserve_rng_state": False})
    assert flow.transformer.is_gradient_checkpointing
    policy.activation_checkpointing_disable()
    assert not flow.transformer.is_gradient_checkpointing


def test_checkpointing_that_would_lose_gradients_is_refused(flow):
    policy = Policy(flow)
    with pytest.raises(ValueError, match="use_reentrant=True gives no gradients"):
        policy.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers=2 and offload=False"):
        policy.activation_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="every_n_layers=1 and offload=True"):
        policy.activation_checkpointing_enable(offload=True)
    assert not flow.transformer.is_gradient_checkpointing


# --- shadow weights --------------------------------------------------------------------------------------------------


def test_swapped_in_weights_act_and_go_again(flow, trainable):
    shadow = WeightShadow(trainable)
    old = velocity(flow)
    pointers = [parameter.data_ptr() for _, parameter in trainable]
    with torch.no_grad():
        for _, parameter in trainable:
            parameter.add_(0.05)
    new, live = velocity(flow), values(trainable)
    assert not torch.allclose(old, new, atol=1e-4)

    with shadow.swapped_in():
        assert torch.equal(velocity(flow), old)
        assert [parameter.requires_grad for _, parameter in trainable] == [True] * len(trainable)
    assert torch.equal(velocity(flow), new) and all_equal(values(trainable), live)
    assert [parameter.data_ptr() for _, parameter in trainable] == pointers, "nothing was copied"


def test_swapped_in_weights_go_again_on_an_exception(flow, trainable):
    shadow = WeightShadow(trainable)
    with torch.no_grad():
        for _, parameter in trainable:
            parameter.zero_()
    with pytest.raises(RuntimeError, match="stop"):
        with shadow.swapped_in():
            assert trainable[0][1].any()
            raise RuntimeError("stop")
    assert not any(parameter.any() for _, parameter in trainable)
    with shadow.swapped_in():
        assert trainable[0][1].any()


def test_the_old_policy_between_forward_and_backward_leaves_gradients_alone(flow, trainable):
    """What a training step does: v_theta with gradients, v_old and v_ref without, then backward."""
    policy = Policy(flow)
    shadow = WeightShadow(trainable)
    with torch.no_grad():
        for _, parameter in trainable:
            parameter.mul_(1.5)

    def gradients(visit_other_policies):
        policy.zero_grad()
        v = velocity(flow)
        if visit_other_policies:
            with torch.no_grad():
                with shadow.swapped_in():
                    velocity(flow)
                with adapters_disabled(flow.transformer):
                    velocity(flow)
        v.square().sum().backward()
        return [parameter.grad.clone() for _, parameter in trainable if parameter.grad is not None]

    expected = gradients(visit_other_policies=False)
    assert all_equal(gradients(visit_other_policies=True), expected)
    policy.activation_checkpointing_enable()
    assert all_equal(gradients(visit_other_policies=True), expected)


def test_an_optimizer_goes_on_as_if_nothing_had_been_swapped():
    def train(swap):
        parameter = torch.nn.Parameter(torch.ones(3))
        shadow = WeightShadow([("weight", parameter)])
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (parameter**3).sum().backward()
            optimizer.step()
            if swap:
                with shadow.swapped_in():
                    assert torch.equal(parameter, torch.ones(3))
        return parameter.detach()

    assert torch.equal(train(swap=True), train(swap=False))


def test_lerp():
    parameter = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    shadow = WeightShadow([("weight", parameter)])
    with torch.no_grad():
        parameter.copy_(torch.tensor([1.0, 3.0]))
    shadow.lerp_(0.75)
    assert torch.equal(shadow.state_dict()["weight"], torch.tensor([0.25, 1.5]))
    shadow.lerp_(1.0)
    assert torch.equal(shadow.state_dict()["weight"], torch.tensor([0.25, 1.5]))
    shadow.lerp_(0.0)
    assert torch.equal(shadow.state_dict()["weight"], parameter)
    assert shadow.state_dict()["weight"].data_ptr() != parameter.data_ptr()
    assert torch.equal(parameter, torch.tensor([1.0, 3.0]))


def test_lerp_with_zero_decay_is_a_copy_even_of_a_broken_shadow():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    shadow = WeightShadow([("weight", parameter)])
    shadow.load_state_dict({"weight": torch.tensor([float("nan")])})
    shadow.lerp_(0.0)
    assert torch.equal(shadow.state_dict()["weight"], parameter)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_lerp_refuses_decay_outside_the_unit_interval(decay):
    with pytest.raises(ValueError, match=rf"\[0, 1\], got {decay}"):
        WeightShadow([("weight", torch.nn.Parameter(torch.ones(1)))]).lerp_(decay)


def test_shadow_state_round_trip(trainable):
    shadow = WeightShadow(trainable)
    saved = {name: tensor.clone() for name, tensor in shadow.state_dict().items()}
    assert list(saved) == [name for name, _ in trainable]
    with torch.no_grad():
        for _, parameter in trainable:
            parameter.zero_()
    shadow.lerp_(0.0)
    shadow.load_state_dict(saved)
    assert all_equal(shadow.state_dict().values(), saved.values())
    assert not any(parameter.any() for _, parameter in trainable), "the live parameters are not touched"


def test_shadow_refuses_the_state_of_another_adapter():
    shadow = WeightShadow([("a", torch.nn.Parameter(torch.ones(2))), ("b", torch.nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match=r"Missing: \['b'\]. Unexpected: \['c'\].*a: \(3,\) instead of \(2,\)"):
        shadow.load_state_dict({"a": torch.zeros(3), "c": torch.zeros(2)})
    assert torch.equal(shadow.state_dict()["a"], torch.ones(2)), "nothing was loaded"


def test_swapped_in_weights_cannot_be_changed():
    shadow = WeightShadow([("weight", torch.nn.Parameter(torch.ones(2)))])
    with shadow.swapped_in():
        with pytest.raises(RuntimeError, match="lerp_ was called while these weights are swapped in"):
            shadow.lerp_(0.5)
        with pytest.raises(RuntimeError, match="load_state_dict"):
            shadow.load_state_dict({"weight": torch.zeros(2)})
        with pytest.raises(RuntimeError, match="swapped_in"):
            with shadow.swapped_in():
                pass
    shadow.lerp_(0.5)


# --- reference policy ------------------------------------------------------------------------------------------------


def test_adapters_disabled_is_the_pipeline_before_lora(flow):
    before = velocity(flow)
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=4))
    for _, parameter in trainable:
        torch.nn.init.normal_(parameter, std=0.1)
    frozen = trainable[3][1]
    frozen.requires_grad_(False)  # the caller's own choice, which must survive
    flags = [parameter.requires_grad for parameter in flow.transformer.parameters()]
    adapted = velocity(flow)
    assert not torch.allclose(adapted, before, atol=1e-4)

    with adapters_disabled(flow.transformer):
        assert torch.equal(velocity(flow), before)
    assert torch.equal(velocity(flow), adapted)
    assert [parameter.requires_grad for parameter in flow.transformer.parameters()] == flags

    with pytest.raises(RuntimeError, match="stop"):
        with adapters_disabled(flow.transformer):
            raise RuntimeError("stop")
    assert torch.equal(velocity(flow), adapted)
    assert [parameter.requires_grad for parameter in flow.transformer.parameters()] == flags
    assert flow.transformer.active_adapters() == ["default"]


def test_adapters_that_were_disabled_before_stay_so(flow, trainable):
    flow.transformer.disable_adapters()
    with adapters_disabled(flow.transformer):
        inside = velocity(flow)
    assert torch.equal(velocity(flow), inside)


def test_adapters_disabled_without_adapters(flow):
    before = velocity(flow)
    with adapters_disabled(flow.transformer):
        assert torch.equal(velocity(flow), before)
