# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""MapReduce LoRA's loop, with one step for each adapter on a tiny model."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from example_scripts import command_in_docstring, load_script, parse
from tiny import tiny_sd3
from trainer_helpers import small_config

from trl_marble.hub import compare_adapters


@pytest.fixture
def script(monkeypatch):
    script = load_script("mapreduce_lora")
    monkeypatch.setattr(script, "load_pipeline", lambda: tiny_sd3(num_layers=1))
    return script


def weights(pipeline):
    return torch.cat([weight.detach().flatten() for weight in pipeline.transformer.parameters()])


def test_each_round_adds_the_mean_of_its_adapters_to_the_base_model(script, tmp_path):
    names = ["coverage", "calm", "centring"]
    args = small_config(tmp_path, max_steps=1, balance_every=1, learning_rate=1e-2, weight_ema_decay=0.0)
    script.main(script.ScriptArguments(reward_names=names, rounds=2), args)
    merged = [tmp_path / f"round-{number}" / "merged" for number in (1, 2)]
    parts = [[compare_adapters(tmp_path / "round-1" / name, own) for name in names] for own in merged]
    # Cosines with the first round's adapters: of its own mean, and of that of the second round.
    norms = [part.overall.norm_a for part in parts[0]]
    mean = parts[0][0].overall.norm_b
    assert 0 < mean <= np.mean(norms) + 1e-6
    # <a_i, mean> summed over i is 3 |mean|^2.
    assert sum(part.overall.dot for part in parts[0]) == pytest.approx(3 * mean**2, rel=1e-4)
    base, first = weights(tiny_sd3(num_layers=1)), weights(script.merged_pipeline(merged[:1]))
    both = weights(script.merged_pipeline(merged))
    assert (first - base).norm() == pytest.approx(mean, rel=1e-3) and not both.equal(first)
    saved = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert weights(saved).equal(both)


def test_the_command_in_the_docstring_is_one(script, tmp_path):
    script_args, args = parse(script, *command_in_docstring(script, tmp_path), "--use_cpu", "--report_to", "none")
    assert script_args.rounds == 3 and len(script_args.reward_names) == 5 and args.max_steps == 4
