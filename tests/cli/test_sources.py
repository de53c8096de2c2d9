# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompts, rewards and pipelines by the names that a command line gives them."""

import pytest
import torch

from trl_marble.cli.sources import load_model, load_rewards, load_sources
from trl_marble.data import source_weights
from trl_marble.rewards import PickScore
from trl_marble.shapeworld import ShapeWorldPipeline, reward_funcs


def test_one_source_is_read_as_it_is(workplace):
    prompts = load_sources(["prompts.txt"])
    assert prompts.column_names == ["prompt"] and len(prompts) == 6


def test_several_sources_are_mixed_by_name_and_weight(workplace):
    (workplace / "other.jsonl").write_text('{"caption": "a tower"}\n')
    with pytest.raises(ValueError, match="no column `prompt`"):
        load_sources(["prompts.txt", "other.jsonl"])
    prompts = load_sources(["scenes=prompts.txt", "ocr:3", "compositional:4"], weights=[2, 1, 0.5], seed=1)
    assert source_weights(prompts) == {"scenes": 2.0, "ocr": 1.0, "compositional": 0.5}
    assert [prompts["source"][:].count(name) for name in ("scenes", "ocr", "compositional")] == [6, 3, 4]
    assert source_weights(load_sources(["only=prompts.txt"])) == {"only": 1.0}
    assert load_sources(["other.jsonl"], column="caption")["prompt"][:] == ["a tower"]


def test_a_path_that_exists_is_that_path(workplace):
    (workplace / "cfg=1.txt").write_text("a tower\n")
    (workplace / "1.txt").write_text("a bridge\n")
    prompts = load_sources(["cfg=1.txt"])
    assert prompts["prompt"][:] == ["a tower"] and prompts.column_names == ["prompt"]
    assert load_sources(["a=cfg=1.txt"])["source"][:] == ["a"]


def test_a_t5_encoder_can_be_left_out_only_where_there_is_one(workplace, tiny_flux):
    tiny_flux().save_pretrained(workplace / "flux")
    assert load_model("base", use_t5=False).text_encoder_3 is None
    with pytest.raises(ValueError, match="`use_t5=False` leaves out .* a FluxPipeline has none"):
        load_model("flux", use_t5=False)


@pytest.mark.parametrize("kind", ["ocr", "compositional"])
def test_generated_prompts_for_training_are_never_those_for_evaluation(kind):
    train = load_sources([f"{kind}:1000"], seed=1)["prompt"][:]
    test = load_sources([f"{kind}:300"], split="test", seed=1)["prompt"][:]
    other = load_sources([f"{kind}:300"], split="test", seed=2)["prompt"][:]
    assert (len(set(train)), len(set(test)), len(set(other))) == (1000, 300, 300)
    assert not set(train) & (set(test) | set(other))
    assert test == load_sources([f"{kind}:300"], split="test", seed=1)["prompt"][:] != other


def test_generated_kinds_keep_their_shares():
    for split, number in (("train", 600), ("test", 180)):
        tags = load_sources([f"compositional:{number}"], split=split)["tag"][:]
        assert len(set(tags)) == 6
        for tag in set(tags):
            assert tags.count(tag) == pytest.approx(number / 6, rel=0.5), tag


def test_shapeworld_has_its_own_splits():
    assert (len(load_sources(["shapeworld"])), len(load_sources(["shapeworld"], split="test"))) == (254, 48)


@pytest.mark.parametrize(
    ("sources", "options", "error", "message"),
    [
        (["prompts.txt", "ocr"], {}, ValueError, "does not say how many prompts to make; write `ocr:2000`"),
        (["ocr:many"], {}, ValueError, "write `ocr:2000`"),
        (["ocr:0"], {}, ValueError, "write `ocr:2000`"),
        (["prompts.txt", "prompts.txt"], {}, ValueError, "Two sources are named 'prompts'; tell them apart: `a="),
        (["prompts.txt", "ocr:2"], {"weights": [1.0]}, ValueError, "There are 1 weights .1.0. for .* prompts, ocr"),
        (["nowhere.txt"], {}, FileNotFoundError, "no file or folder 'nowhere.txt'"),
        ([""], {}, ValueError, "A source of prompts is empty"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(workplace, sources, options, error, message):
    with pytest.raises(error, match=message):
        load_sources(sources, **options)


def test_rewards_by_name_by_path_and_by_world(workplace):
    pickscore, bright, *world = load_rewards(["pickscore", "my_rewards.bright", "shapeworld"], offload=True)
    assert isinstance(pickscore, PickScore) and pickscore.offload
    assert bright.__module__ == "my_rewards"
    assert world == reward_funcs()
    assert not load_rewards(["pickscore"])[0].offload


def test_models_by_name(workplace):
    assert isinstance(load_model("shapeworld", bf16=True), ShapeWorldPipeline)
    pipeline = load_model("base", bf16=True, use_t5=False)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.text_encoder_3 is None and pipeline.tokenizer_3 is None
    assert load_model("base").text_encoder_3.dtype == torch.float32
