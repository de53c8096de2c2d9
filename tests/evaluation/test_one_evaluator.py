# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The same weights, prompts, seeds and batches give the same numbers to the last bit, whoever evaluates them."""

import one_evaluator
import pytest


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"batch_size": 12, "seed": 7}, id="one batch"),
        pytest.param({"bf16": True}, id="autocast"),
        pytest.param({"bf16": True, "bf16_base": True}, id="bf16 base and autocast"),
        pytest.param({"bf16_base": True}, id="bf16 base and fp32 adapter"),
        pytest.param({"lora": LORA | {"lora_dropout": 0.5}}, id="dropout"),
        pytest.param({"lora": LORA | {"use_dora": True}, "bf16_base": True}, id="DoRA"),
    ],
)
def test_the_trainer_and_the_file_say_the_same(tmp_path, settings) -> None:
    trainer, file = one_evaluator.evaluate_both(tmp_path, **settings)
    one_evaluator.assert_same(trainer, file)
    for name in ("bright", "partly"):
        assert trainer["standard_error"][name] > 0
    assert trainer["diversity"] > 0
    assert min(trainer["kl"]) > 0
    assert sum(value != value for value in trainer["rewards"]["partly"]) > 0
    assert trainer["groups"] == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3
