# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the benchmark computes of models without numbers is what the same models take with them."""

import importlib.util
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from example_scripts import EXAMPLES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile


spec = importlib.util.spec_from_file_location("memory_benchmark", EXAMPLES / "benchmarks" / "memory.py")
memory = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = memory  # where dataclasses look for the module of their annotations
spec.loader.exec_module(memory)

TINY = memory.MODELS["tiny"]
BATCH = 4


def tiny_step(pipeline: DiffusionPipeline, checkpointing: bool) -> memory.Step:
    step = memory.Step(TINY, pipeline, num_rewards=2, device="cpu")
    step.checkpoint(checkpointing)
    return step


def without_values() -> DiffusionPipeline:
    return memory.without_values(TINY, torch.float32)


def saved_bytes(step: memory.Step) -> int:
    """Of what a forward pass saves for the backward one, weights and inputs left out."""
    x_t, t, conditioning = torch.zeros(BATCH, *TINY.latents), torch.full((BATCH,), 0.5), step._conditioning(BATCH)
    known = [*step.policy.parameters(), *step.policy.buffers(), x_t, t, *conditioning.kwargs.values()]
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = step.policy.train()(x_t, t, conditioning)
    for tensor in known:
        storages.pop(id(tensor.untyped_storage()), None)
    assert velocity.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_without_numbers_saves_as_many_bytes_for_the_backward_pass(checkpointing):
    real = saved_bytes(tiny_step(without_values(), checkpointing))
    pipeline = without_values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert saved_bytes(tiny_step(pipeline, checkpointing)) == real
    assert real > 50_000


# Not decoding: convolutions on CPUs work in a memory of their own, which is not that of a GPU either.
@pytest.mark.parametrize("part, checkpointing", [("rollout", False), ("update", False), ("update", True)])
def test_the_computed_peak_is_that_of_the_allocator(part, checkpointing):
    pipeline = without_values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = tiny_step(pipeline, checkpointing)
        with memory.LiveTensors() as tensors:
            getattr(step, part)(BATCH)
    step = tiny_step(without_values(), checkpointing)
    getattr(step, part)(BATCH)  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        getattr(step, part)(BATCH)
    live = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert tensors.peak == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
def test_settings_save_what_they_say():
    settings = memory.settings_in_turn()
    needs = dict(zip(settings, memory.compute(TINY, list(settings.values()), 2), strict=True))
    plain, checkpointed, small_rollouts, offloaded, nf4, single = needs.values()
    assert checkpointed.update < plain.update and checkpointed.rollout == plain.rollout
    assert small_rollouts.decode < checkpointed.decode and small_rollouts.update == checkpointed.update
    texts = 2 * (1001 * 100 + 1001 * 50)
    assert plain.others - texts == sum(p.nbytes for p in without_values().vae.bfloat16().parameters())
    assert offloaded.others == 0
    assert small_rollouts.update - offloaded.update == plain.others
    assert offloaded.encode == offloaded.weights + offloaded.training + 2 * 1001 * 100  # the larger encoder
    assert nf4.weights < 0.6 * offloaded.weights
    assert single.update < nf4.update
    # A LoRA of rank 32 on the attention of two blocks, the last of which gives no text.
    adapter = 4 * 32 * (32 + 32) * (8 + 7)
    # Weights, two copies, two moments; the gradients of two rewards in both halves and of what they share.
    assert plain.training == adapter * (1 + 2 + 2 + 5)
    assert plain.peak == max(plain.encode, plain.rollout, plain.decode, plain.update)


def test_the_models_have_the_published_sizes():
    billions = {}
    for name in ("sd3.5m", "flux", "qwen-image"):
        with torch.device("meta"):
            transformer = memory.MODELS[name].pipeline(None).transformer
        billions[name] = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
    assert billions == pytest.approx({"sd3.5m": 2.24, "flux": 11.9, "qwen-image": 20.43}, abs=0.05)
