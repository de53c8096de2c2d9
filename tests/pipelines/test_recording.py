# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Velocities without the pipeline are those through it, whatever has changed since they were recorded."""

import weakref

import pytest
import tiny
import torch
from peft import LoraConfig
from torch import nn

from trl_marble.pipelines import (
    FlowPipeline,
    Policy,
    adapters_disabled,
    add_trainable_adapter,
    lora_config,
    velocities,
)
from trl_marble.pipelines.compilation import compile_blocks
from trl_marble.pipelines.offloading import offload_components
from trl_marble.pipelines.recording import Recorder, Recording
from trl_marble.pipelines.sharding import shard_base


PROMPTS = ["a red cat", "two dogs", "three blue birds"]
TIMES = torch.tensor([0.9, 0.4, 0.6])


def make_flow(**settings) -> FlowPipeline:
    return FlowPipeline(tiny.tiny_flux(), 16, 16, 3.5, 24, **settings)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*(shape or (3, 16, 16)), generator=torch.Generator().manual_seed(seed))


def through_the_pipeline(flow: FlowPipeline, *inputs) -> torch.Tensor:
    """As for a class that is not in the table."""
    flow.is_listed = False
    try:
        return flow.velocity(*inputs)
    finally:
        flow.is_listed = True


def count_pipeline_calls(monkeypatch) -> list[None]:
    calls, own = [], velocities.velocity_by_pipeline
    monkeypatch.setattr(velocities, "velocity_by_pipeline", lambda *args: calls.append(None) or own(*args))
    return calls


def randomize(trainable) -> None:
    for _, parameter in trainable:
        nn.init.normal_(parameter, std=0.3)


def test_the_pipeline_is_called_once_for_a_conditioning(monkeypatch):
    flow = make_flow()
    calls = count_pipeline_calls(monkeypatch)
    conditioning = flow.encode(PROMPTS)
    runs = []
    flow.transformer.register_forward_pre_hook(lambda *_: runs.append(None))
    for seed in range(4):
        flow.velocity(noise(seed=seed), TIMES / (1 + seed), conditioning)
    assert len(calls) == 1 and len(runs) == 4
    flow.velocity(noise(), TIMES, conditioning.select(torch.tensor([2, 0, 1])))
    assert len(calls) == 2


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_new_weights_are_used(variant):
    flow = make_flow()
    names = {"target_modules": list(flow.family.lora_target_modules), "use_dora": variant == "dora"}
    trainable = add_trainable_adapter(flow.pipeline, LoraConfig(r=2, init_lora_weights="gaussian", **names))
    inputs = noise(), TIMES, flow.encode(PROMPTS)
    with torch.no_grad():
        before = flow.velocity(*inputs)
        base = flow.velocity(*inputs)
    randomize(trainable)
    after = flow.velocity(*inputs)
    assert torch.equal(after, through_the_pipeline(flow, *inputs)) and not torch.allclose(after, before, atol=1e-4)
    with adapters_disabled(flow.transformer):
        assert torch.equal(flow.velocity(*inputs), base)
    # Recorded without gradients, repeated with them.
    parameters = [parameter for _, parameter in trainable]
    own = torch.autograd.grad(after.square().sum(), parameters, materialize_grads=True)
    expected = torch.autograd.grad(
        through_the_pipeline(flow, *inputs).square().sum(), parameters, materialize_grads=True
    )
    assert any(gradient.any() for gradient in own)
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_every_precision_is_the_pipelines_own(autocast_dtype, base_dtype):
    flow = make_flow(autocast_dtype=autocast_dtype)
    flow.pipeline.to(dtype=base_dtype)
    randomize(add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=2)))
    conditioning = flow.encode(PROMPTS)
    flow.velocity(noise(), TIMES, conditioning)
    inputs = noise(seed=1), TIMES.flip(0), conditioning
    assert torch.equal(flow.velocity(*inputs), through_the_pipeline(flow, *inputs))
    if autocast_dtype is None:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(flow.velocity(*inputs), through_the_pipeline(flow, *inputs))
        assert torch.equal(flow.velocity(*inputs), through_the_pipeline(flow, *inputs))


def check_velocities_and_gradients(flow: FlowPipeline, trainable, sizes: tuple[int, ...] = (3, 2)) -> None:
    """Those without the pipeline are those through it, also for other latents, times and numbers of rows."""
    conditioning = flow.encode(PROMPTS)
    parameters = [parameter for _, parameter in trainable]
    for rows in ([2, 0, 1][:size] for size in sizes):
        selected = conditioning.select(torch.tensor(rows))
        with torch.no_grad():
            flow.velocity(noise()[rows], TIMES[rows], selected)
        inputs = noise(seed=1)[rows], TIMES.flip(0)[rows], selected
        assert selected.derived()[Recording][1] is not None
        velocities = [flow.velocity(*inputs), through_the_pipeline(flow, *inputs)]
        assert torch.equal(*velocities)
        first, second = (
            torch.autograd.grad(velocity.square().sum(), parameters, materialize_grads=True) for velocity in velocities
        )
        assert any(gradient.any() for gradient in first)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_gradients_are_the_same_with_checkpointing(autocast_dtype):
    flow = make_flow(autocast_dtype=autocast_dtype)
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=2))
    randomize(trainable)
    Policy(flow).activation_checkpointing_enable()
    check_velocities_and_gradients(flow, trainable)


@pytest.mark.slow
def test_compiled_blocks_are_called_directly():
    flow = make_flow()
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=2))
    randomize(trainable)
    compile_blocks(flow.transformer, "eager")
    check_velocities_and_gradients(flow, trainable, sizes=(3,))
    torch.compiler.reset()


def test_a_sharded_base_is_called_directly():
    flow = make_flow()
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=2))
    randomize(trainable)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard_base(flow.transformer, [parameter for _, parameter in trainable], torch.device("cpu"))
        check_velocities_and_gradients(flow, trainable)
    finally:
        torch.distributed.destroy_process_group()


def test_components_that_are_offloaded_are_called_directly():
    flow = make_flow()
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=2))
    randomize(trainable)
    offload_components(flow.pipeline, "cpu")
    check_velocities_and_gradients(flow, trainable)


def test_nothing_of_a_call_is_kept_but_what_is_repeated(monkeypatch):
    """The noisy latents and the activations of the first call would hold memory as long as the conditioning."""
    flow = make_flow()
    recorders: list[weakref.ref] = []
    monkeypatch.setattr(velocities, "Recorder", lambda *args: _note_reference(Recorder(*args), recorders))
    conditioning, x_t = flow.encode(PROMPTS), noise()
    velocity = flow.velocity(x_t, TIMES, conditioning)
    kept = weakref.ref(x_t), weakref.ref(velocity)
    del x_t, velocity
    assert len(recorders) == 1 and all(reference() is None for reference in (*recorders, *kept))


def _note_reference(recorder: Recorder, references: list[weakref.ref]) -> Recorder:
    references.append(weakref.ref(recorder))
    return recorder


CHANGES = {
    "guidance": lambda flow, conditioning: setattr(flow, "guidance_scale", 1.5),
    "conditioning, written into": lambda flow, conditioning: conditioning.kwargs["prompt_embeds"].mul_(-1),
    "conditioning, replaced": lambda flow, conditioning: conditioning.kwargs.update(
        pooled_prompt_embeds=-conditioning.kwargs["pooled_prompt_embeds"]
    ),
    "transformer": lambda flow, conditioning: setattr(
        flow.pipeline, "transformer", tiny.tiny_flux(seed=1).transformer
    ),
    "scheduler": lambda flow, conditioning: flow.pipeline.scheduler.register_to_config(num_train_timesteps=500),
    "dtype": lambda flow, conditioning: (
        flow.pipeline.to(dtype=torch.bfloat16)
        and conditioning.kwargs.update({name: rows.bfloat16() for name, rows in conditioning.kwargs.items()})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_nothing_that_was_recorded_outlives_a_change(change):
    flow = make_flow()
    conditioning = flow.encode(PROMPTS)
    inputs = noise(), TIMES, conditioning
    before = [flow.velocity(*inputs) for _ in range(2)]
    assert torch.equal(*before)
    CHANGES[change](flow, conditioning)
    after = flow.velocity(*inputs)
    assert torch.equal(after, through_the_pipeline(flow, *inputs)) and not torch.equal(after, before[0])


@torch.no_grad()
def test_every_size_is_recorded_anew():
    flow = make_flow()
    conditioning = flow.encode(PROMPTS)
    flow.velocity(noise(), TIMES, conditioning)
    flow.height = 32
    inputs = noise(3, 32, 16), TIMES, conditioning
    assert torch.equal(flow.velocity(*inputs), through_the_pipeline(flow, *inputs))
    # Other strides are no other values.
    transposed = noise(3, 16, 32).transpose(1, 2)
    assert torch.equal(flow.velocity(transposed, *inputs[1:]), flow.velocity(transposed.contiguous(), *inputs[1:]))
    with pytest.raises(ValueError, match=r"x_t is of shape \(3, 16, 16\)"):
        flow.velocity(noise(), TIMES, conditioning)


def test_after_the_inference_mode_gradients_work():
    flow = make_flow()
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=2))
    with torch.inference_mode():
        conditioning = flow.encode(PROMPTS)
        flow.velocity(noise(), TIMES, conditioning)
    conditioning = flow.encode(PROMPTS)
    with torch.inference_mode():
        flow.velocity(noise(), TIMES, conditioning)
    flow.velocity(noise(), TIMES, conditioning).square().sum().backward()
    assert trainable[1][1].grad is not None


def test_a_failed_call_leaves_nothing_behind():
    flow = make_flow()
    conditioning = flow.encode(PROMPTS)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = flow.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        flow.velocity(noise(), TIMES, conditioning)
    hook.remove()
    assert torch.overrides._get_current_function_mode_stack() == []
    inputs = noise(), TIMES, conditioning
    for _ in range(2):
        assert torch.equal(flow.velocity(*inputs), through_the_pipeline(flow, *inputs))


# --- what cannot be repeated -----------------------------------------------------------------------------------------

weight, kept, layer = nn.Parameter(torch.ones(4)), torch.ones(4), nn.Linear(4, 4)


def twice(x, t):
    return layer(x * t) + layer(x)


def takes_a_number(x, t):
    return layer(x * t.sum().item())


def writes(x, t):
    return layer((x * t).mul_(2))


def writes_into_what_is_kept(x, t):
    velocity = layer(x * t + kept)
    kept.add_(1)
    return velocity


def uses_a_weight_outside(x, t):
    return layer(x * t) * weight


def draws(x, t):
    return layer(torch.bernoulli(x * t * 0 + 0.5, generator=torch.Generator().manual_seed(0)))


def forgets_the_time(x, t):
    return layer(x)


def changes_precision(x, t):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x * t)


def is_fine(x, t):
    first, *_ = (x * t)[:, None].unbind(1)
    return -layer(first + kept)[:, :4]


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (twice, "not called once"),
        (takes_a_number, "something else than tensors"),
        (writes, "writes into a tensor"),
        (writes_into_what_is_kept, "is written into"),
        (uses_a_weight_outside, "a weight outside of the transformer"),
        (draws, "an argument is a Generator"),
        (forgets_the_time, "does not depend on x_t and t"),
        (changes_precision, "under a mode that the pipeline sets"),
        (is_fine, None),
    ],
)
def test_what_cannot_be_repeated_is_noticed(function, fault):
    x, t = torch.rand(2, 4), torch.rand(2, 1)
    recorder = Recorder(x, t)
    with recorder.recording(layer, layer):
        velocity = function(x, t)
    recording = recorder.finish(velocity)
    if fault is None:
        assert recorder.fault is None
        other = torch.rand(2, 4), torch.rand(2, 1)
        assert torch.equal(recording.velocity(*other), is_fine(*other))
    else:
        assert recording is None and fault in recorder.fault
