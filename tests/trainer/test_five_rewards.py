# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The paper's five rewards, the real code on tiny weights, on prompts from three sources."""

import json
import math

import pytest
from datasets import Dataset
from tiny_scorers import five_rewards

from trl_marble.data import compositional_prompts, generators, mix_prompts, ocr_prompts
from trl_marble.rewards import geneval_scoring


NAMES = ["PickScore", "HPSv2", "CLIPScore", "OCRAccuracy", "GenEval"]
ODD = ["", "猫 на 🐈", 'a sign that says ""', "don't stop", "a very long prompt " * 30]


@pytest.fixture
def prompts():
    general = Dataset.from_dict({"prompt": ["a cat", "don't stop", "猫 на крыше", 'a sign that says ""']})
    return mix_prompts({"general": general, "ocr": ocr_prompts(4), "geneval": compositional_prompts(4)})


@pytest.mark.filterwarnings("ignore:The prompt .* has .* tokens:UserWarning")
def test_a_run_with_five_rewards_and_three_sources(tmp_path, make_trainer, prompts):
    rewards = five_rewards(tmp_path, offload=True)
    trainer = make_trainer(
        reward_funcs=rewards,
        train_dataset=prompts,
        eval_dataset=prompts,
        per_device_train_batch_size=12,
        num_generations=2,
        num_generations_eval=1,
        max_steps=2,
        balance_on="advantage",
    )
    assert trainer.scorer.names == NAMES
    before = {name: parameter.detach().clone() for name, parameter in trainer.weights.trained.items()}
    trainer.train()
    assert any(not parameter.equal(before[name]) for name, parameter in trainer.weights.trained.items())
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        # Six prompts a step, two of each source.
        valid = {name: entry[f"rewards/{name}/valid"] for name in NAMES}
        assert valid == pytest.approx(dict.fromkeys(NAMES[:3], 1.0) | {"OCRAccuracy": 1 / 3, "GenEval": 1 / 3})
        assert all(math.isfinite(entry[f"rewards/{name}/mean"]) for name in NAMES)
        assert entry["balance/conflict"] == 0

    trainer.evaluate()
    source = prompts["source"][:]
    for name, row in zip(NAMES, trainer.evaluations[-1].rewards, strict=True):
        expected = {"OCRAccuracy": ["ocr"], "GenEval": ["geneval"]}.get(name, ["general", "ocr", "geneval"])
        assert (~row.isnan()).tolist() == [each in expected for each in source], name
    assert {parameter.device.type for reward in rewards[:3] for parameter in reward.model.parameters()} == {"cpu"}


def test_odd_prompts_have_a_clear_outcome_in_every_reward(tmp_path, pictures):
    columns = {"text": [None] * len(ODD), "include": [None] * len(ODD), "tag": [None] * len(ODD)}
    for reward in five_rewards(tmp_path):
        values = reward(images=pictures[: len(ODD)], prompts=ODD, **columns)
        if reward.applies_to == "every image":
            assert all(math.isfinite(value) for value in values)
        else:
            assert values == [None] * len(ODD)  # no text and no object is asked for


def test_prompts_of_the_generators_are_what_the_scorers_read(tmp_path, pictures):
    rewards = five_rewards(tmp_path)
    asked = ocr_prompts(3)
    values = rewards[3](images=pictures[:3], prompts=asked["prompt"][:], text=asked["text"][:])
    assert values == rewards[3](images=pictures[:3], prompts=asked["prompt"][:]), "column and quotes say the same"
    asked = compositional_prompts(60)
    assert set(asked["tag"][:]) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    columns = {"include": asked["include"][:], "tag": asked["tag"][:]}
    values = rewards[4](images=[pictures[0]] * 60, prompts=asked["prompt"][:], **columns)
    assert all(value is not None and value <= 1 for value in values)
    assert all(json.loads(entry) for entry in columns["include"])


def test_the_generators_name_the_classes_and_colors_of_the_scorer():
    assert set(generators.CLASSES) == set(geneval_scoring.CLASSES)
    assert set(generators.COLORS) == set(geneval_scoring.COLORS)
