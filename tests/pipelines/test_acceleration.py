# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Faster sampling: it takes effect inside its context only, and is refused with the reason where it cannot."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from tiny import tiny_flux, tiny_sd3
from tiny_families import tiny_chroma

from trl_marble.pipelines import Acceleration, FlowPipeline, verify_acceleration


STEPS = 4
# Far above what a tiny model changes by: every step but the first takes over what the one before it found.
FIRST_BLOCK = {"type": "FirstBlockCacheConfig", "threshold": 100.0}
BROADCAST = {
    "type": "PyramidAttentionBroadcastConfig",
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_timestep_skip_range": [-1, 1001],
}
TAYLOR = {"type": "TaylorSeerCacheConfig", "cache_interval": 2, "disable_cache_before_step": 1}


@pytest.fixture(scope="module")
def flow():
    return FlowPipeline(tiny_flux(), 16, 16, max_sequence_length=16)


def sample(flow, **options):
    return flow.rollout(flow.encode(["a cat"]), [3], STEPS, **options).latents


def hooks(module):
    registries = [vars(each).get("_diffusers_hook") for each in module.modules()]
    return [name for registry in registries if registry is not None for name in registry.hooks]


def backends(flow):
    found = [getattr(module, "processor", None) for module in flow.transformer.modules()]
    return [vars(processor).get("_attention_backend") for processor in found if processor is not None]


@pytest.mark.parametrize("cache", [FIRST_BLOCK, BROADCAST, TAYLOR], ids=lambda cache: cache["type"])
def test_a_cache_changes_rollouts_and_leaves_nothing_behind(flow, cache):
    before = sample(flow)
    cached = sample(flow, acceleration=Acceleration(cache=cache))
    assert cached.isfinite().all() and not torch.equal(cached, before)
    assert not hooks(flow.transformer) and not flow.transformer.is_cache_enabled
    assert torch.equal(sample(flow), before)
    again = sample(flow, acceleration=Acceleration(cache=cache))
    assert torch.equal(again, cached)  # it begins empty each time


def test_fewer_layers_run_with_a_cache(flow):
    runs = []
    handle = flow.transformer.single_transformer_blocks[-1].attn.register_forward_hook(lambda *_: runs.append(1))
    sample(flow)
    without = len(runs)
    sample(flow, acceleration=Acceleration(cache=FIRST_BLOCK))
    handle.remove()
    assert without == STEPS and len(runs) - without == 1


def test_everything_is_as_before_after_an_error(flow):
    before = sample(flow)

    def fail(*args):
        raise RuntimeError("out of order")

    handle = flow.transformer.norm_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        sample(flow, acceleration=Acceleration("_native_math", FIRST_BLOCK))
    handle.remove()
    assert not hooks(flow.transformer) and not flow.transformer.is_cache_enabled
    assert set(backends(flow)) == {None}
    assert torch.equal(sample(flow), before)


def test_an_attention_backend_is_used_inside_only(flow, monkeypatch):
    used = []
    for backend in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        function = _AttentionBackendRegistry._backends[backend]

        def record(*args, _backend=backend, _function=function, **kwargs):
            used.append(_backend.value)
            return _function(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, record)
    before = sample(flow)
    assert set(used) == {"native"}
    used.clear()
    verify_acceleration(flow, Acceleration("_native_math"), STEPS)
    math = sample(flow, acceleration=Acceleration("_native_math"))
    torch.testing.assert_close(math, before, rtol=1e-4, atol=1e-4)
    assert set(used) == {"_native_math"}
    used.clear()
    assert torch.equal(sample(flow), before) and set(used) == {"native"}
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_a_backend_of_the_user_is_given_back(flow):
    flow.transformer.set_attention_backend("_native_efficient")
    try:
        sample(flow, acceleration=Acceleration("_native_math"))
        assert set(backends(flow)) == {AttentionBackendName._NATIVE_EFFICIENT}
    finally:
        flow.transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.mark.parametrize(
    ("acceleration", "reason"),
    [
        (Acceleration("native"), "computes attention by itself"),
        (Acceleration(cache=FIRST_BLOCK), "a transformer that diffusers has caches for, and SD3Transformer2DModel"),
    ],
)
def test_stable_diffusion_3_has_neither(acceleration, reason):
    with pytest.raises(ValueError, match=reason):
        verify_acceleration(FlowPipeline(tiny_sd3(num_layers=1)), acceleration, 2)


def test_what_does_not_work_is_refused_with_the_reason(flow):
    with pytest.raises(ValueError, match="`rollout_attention_backend='flash'` cannot be used: .*flash-attn"):
        verify_acceleration(flow, Acceleration("flash"), STEPS)
    chroma = FlowPipeline(tiny_chroma(), 16, 16, max_sequence_length=24)
    with pytest.raises(ValueError, match="ChromaPipeline cannot sample with .*FirstBlockCacheConfig"):
        verify_acceleration(chroma, Acceleration(cache=FIRST_BLOCK), STEPS)
    assert not hooks(chroma.transformer) and not chroma.transformer.is_cache_enabled
    nowhere = BROADCAST | {"spatial_attention_block_identifiers": ["no_such_block"]}
    with pytest.raises(ValueError, match="has no effect: it fits no layer of FluxTransformer2DModel"):
        verify_acceleration(flow, Acceleration(cache=nowhere), STEPS)
    assert not hooks(flow.transformer) and set(backends(flow)) == {None}
    flow.transformer._cache_config = object()
    try:
        with pytest.raises(ValueError, match="has a cache already"):
            verify_acceleration(flow, Acceleration(cache=FIRST_BLOCK), STEPS)
    finally:
        flow.transformer._cache_config = None
    with pytest.raises(ValueError, match="classifier-free guidance"):
        Acceleration(cache=BROADCAST).check(flow.transformer, guided=True)
    verify_acceleration(flow, Acceleration(cache=FIRST_BLOCK), STEPS)


def test_trying_it_draws_no_random_numbers(flow):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    verify_acceleration(flow, Acceleration("native", FIRST_BLOCK), STEPS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("FirstBlockCacheConfig", "it must be a mapping such as"),
        ({"threshold": 0.1}, "one of the types FirstBlockCacheConfig"),
        ({"type": "FirstBlock"}, "one of the types FirstBlockCacheConfig"),
        ({"type": "SeaCacheConfig"}, "one of the types FirstBlockCacheConfig"),
        ({"type": "FirstBlockCacheConfig", "treshold": 0.1}, "'treshold', which is no setting .* it has threshold"),
        ({"type": "MagCacheConfig"}, "diffusers refuses: .*mag_ratios"),
        ({"type": "MagCacheConfig", "num_inference_steps": 4}, "'num_inference_steps', which is no setting"),
        ({"type": "FasterCacheConfig", "attention_weight_callback": "print"}, "which is no setting"),
        ({"type": "TaylorSeerCacheConfig", "taylor_factors_dtype": "float33"}, "must be a dtype of PyTorch"),
    ],
)
def test_settings_of_caches_are_checked(settings, reason):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        Acceleration(cache=settings)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"`rollout_attention_backend` is 'flush'; it must be one of flash, "):
        Acceleration("flush")
