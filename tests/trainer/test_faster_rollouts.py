# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rollouts that are sampled faster, and evaluations that are sampled in another way than rollouts."""

import contextlib
import json

import pytest
import torch
from tiny import tiny_flux, tiny_sd3
from trainer_helpers import prompt_set, small_config, small_trainer

from trl_marble import MarbleConfig
from trl_marble.cli.parsing import ConfigParser
from trl_marble.cli.yaml_settings import Plain
from trl_marble.evaluation import EvaluationConfig
from trl_marble.pipelines import Acceleration


CACHE = {"type": "FirstBlockCacheConfig", "threshold": 100.0}
STEPS = 3


def flux_trainer(folder, **settings):
    settings |= {"height": 16, "width": 16, "num_inference_steps": STEPS, "max_steps": 1}
    return small_trainer(folder, pipeline=tiny_flux(), eval_dataset=prompt_set().select([0]), **settings)


def test_a_cache_is_in_rollouts_and_nowhere_else(tmp_path, monkeypatch):
    plain = flux_trainer(tmp_path / "plain")
    cached = flux_trainer(tmp_path / "cached", rollout_cache=CACHE, rollout_attention_backend="_native_math")
    assert cached.sampler.acceleration == Acceleration("_native_math", CACHE)
    assert cached.evaluator.sampler.acceleration is None
    first, second = plain.evaluate(), cached.evaluate()
    kept = {name for name in first if "runtime" not in name and "per_second" not in name}
    assert {name: first[name] for name in kept} == {name: second[name] for name in kept}

    inside: list[bool] = []
    velocity = cached.flow.velocity

    def watched(*args, **kwargs):
        inside.append(cached.flow.transformer.is_cache_enabled)
        return velocity(*args, **kwargs)

    cached.flow.velocity = watched
    plain.train()
    cached.train()
    assert inside and not any(inside)
    assert not torch.equal(plain._batch.latents, cached._batch.latents)  # rollouts differ

    # All but what the rollouts themselves do is as without the settings.
    without = flux_trainer(tmp_path / "without", rollout_cache=CACHE, rollout_attention_backend="_native_math")
    monkeypatch.setattr(Acceleration, "applied", lambda *_: contextlib.nullcontext())
    without.train()
    assert torch.equal(plain._batch.latents, without._batch.latents)
    for mine, theirs in zip(plain.weights.parameters, without.weights.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_the_update_on_equal_images_is_the_same_bit_for_bit(tmp_path):
    """Two trainers update on the same batch: one after rollouts with a cache, one that never had any."""
    plain, cached = flux_trainer(tmp_path / "plain"), flux_trainer(tmp_path / "cached", rollout_cache=CACHE)
    cached.train()
    sample = plain._sample

    def sample_theirs(rows, generation):
        sample(rows, generation)
        return cached._batch

    plain._sample = sample_theirs
    plain.train()
    for mine, theirs in zip(plain.weights.parameters, cached.weights.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_what_the_transformer_cannot_do_is_refused_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"`rollout_cache` needs a transformer .* SD3Transformer2DModel"):
        small_trainer(tmp_path, rollout_cache=CACHE)
    with pytest.raises(ValueError, match="would have no effect: SD3Transformer2DModel computes attention by itself"):
        small_trainer(tmp_path, rollout_attention_backend="native")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rollout_cache": {"type": "No"}}, "one of the types"),
        ({"rollout_cache": "FirstBlockCacheConfig"}, "must be a mapping"),
        ({"rollout_attention_backend": "flush"}, "must be one of flash"),
        ({"rollout_cache": CACHE, "shard_base": True}, "`rollout_cache` and `shard_base=True` do not work together"),
        ({"rollout_cache": CACHE, "torch_compile": True}, "and `torch_compile=True` do not work together"),
        ({"eval_num_inference_steps": 0}, "must be at least 1"),
        ({"eval_height": 64.0}, "must be an integer"),
        ({"eval_width": -8}, "leave it out to use `width`"),
    ],
)
def test_settings_are_checked(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=reason):
        small_config(tmp_path, **settings)


def test_a_cache_may_be_given_as_json(tmp_path):
    args = small_config(tmp_path, rollout_cache='{"type": "FirstBlockCacheConfig", "threshold": 0.1}')
    assert args.build_acceleration() == Acceleration(None, {"type": "FirstBlockCacheConfig", "threshold": 0.1})
    assert args.to_dict()["rollout_cache"] == {"type": "FirstBlockCacheConfig", "threshold": 0.1}
    words = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--rollout_cache", json.dumps(CACHE)]
    parser = ConfigParser((MarbleConfig,))
    parser.take(words, {})
    assert parser.build(words)[0].build_acceleration() == Acceleration(None, CACHE)
    parser.take(
        words[:4], {"rollout_cache": {"type": Plain("MagCacheConfig"), "mag_ratios": [Plain("1.5"), Plain("1")]}}
    )
    assert parser.build(words[:4])[0].rollout_cache == {"type": "MagCacheConfig", "mag_ratios": [1.5, 1]}
    assert MarbleConfig(str(tmp_path), use_cpu=True).build_acceleration() is None


def test_evaluations_have_steps_and_a_size_of_their_own(tmp_path):
    sizes, calls = {"rollout": set(), "evaluation": set()}, []
    where = "evaluation"

    def note(images, **kwargs):
        sizes[where].add(images[0].size)
        return [0.1 * i for i in range(len(images))]

    pipeline = tiny_sd3(num_layers=1)
    prompts = prompt_set().select([0])
    trainer = small_trainer(
        tmp_path,
        [note],
        pipeline,
        eval_dataset=prompts,
        height=16,
        width=16,
        eval_num_inference_steps=4,
        eval_height=24,
        eval_width=32,
        num_generations_eval=1,
        max_steps=1,
        beta=0.0,
    )
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.evaluate()
    assert len(calls) == 4 + 2  # and the two velocities of the KL
    where = "rollout"
    trainer.train()
    assert sizes == {"evaluation": {(32, 24)}, "rollout": {(16, 16)}}
    settings = trainer.summarize().settings
    assert (settings["eval_num_inference_steps"], settings["eval_height"], settings["eval_width"]) == (4, 24, 32)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=1.0, height=24, width=32" in card

    same = small_trainer(tmp_path / "same", [note], eval_dataset=prompts, num_generations_eval=1)
    more = small_trainer(
        tmp_path / "more", [note], eval_dataset=prompts, num_generations_eval=1, eval_num_inference_steps=4
    )
    assert same.evaluator.sampler.flow is same.flow
    digests = []
    for each in (same, more):
        each.evaluate()
        digests.append(each.evaluations[0].digest)
    assert digests[0] != digests[1]  # such evaluations are not paired


def test_the_commands_configuration_takes_the_evaluations_of_a_training():
    args = EvaluationConfig(
        "out", num_inference_steps=5, height=32, width=32, eval_num_inference_steps=8, eval_width=64
    )
    assert (args.num_inference_steps, args.height, args.width) == (8, 32, 64)
    with pytest.raises(ValueError, match="`eval_height` is 0"):
        EvaluationConfig("out", eval_height=0)
