# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The script to copy, from its command line."""

import json

import pytest
from example_scripts import command_in_docstring, load_script, parse


@pytest.fixture
def script():
    return load_script("shapeworld")


@pytest.mark.slow
def test_the_command_in_the_docstring_trains_and_measures_what_is_held_out(script, tmp_path):
    command = command_in_docstring(script, tmp_path)
    small = ["--max_steps", "2", "--eval_steps", "2", "--num_eval_prompts", "2", "--num_generations_eval", "2"]
    small += ["--num_generations", "4", "--per_device_train_batch_size", "8", "--num_inference_steps", "2"]
    script.main(*parse(script, *command, *small, "--use_cpu", "--report_to", "none", "--save_strategy", "no"))
    card = (tmp_path / "README.md").read_text()
    inputs = json.loads((tmp_path / "model_card.json").read_text())
    held_out = {row["name"]: row["held_out"] for row in inputs["rewards"]}
    assert held_out == {
        "composition": False,
        "reader": False,
        "coverage": False,
        "warmth": False,
        "centring": True,
        "calm": True,
    }
    assert all(name in card for name in held_out)
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
