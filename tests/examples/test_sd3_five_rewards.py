# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The recipe's script from its command line, on a tiny pipeline and tiny scorers."""

import functools

import pytest
from example_scripts import as_options, command_in_docstring, load_script, parse
from tiny_scorers import five_rewards


@pytest.fixture
def script():
    return load_script("sd3_five_rewards")


def test_the_command_in_the_docstring_is_the_papers_step(script, tmp_path):
    command = command_in_docstring(script, tmp_path)
    _, args = parse(script, *command, "--use_cpu")
    assert args.generation_batch_size * 8 == 48 * 24  # on eight devices
    assert (args.balance_every, args.balance_on, args.bf16) == (10, "loss", True)
    assert (args.height, args.width) == (512, 512)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The prompt .* has .* tokens:UserWarning")
def test_the_script_trains_and_leaves_an_adapter_with_a_card(script, tmp_path, monkeypatch, tiny_sd3):
    five_rewards(tmp_path)  # leaves the folders that the scorers load
    clip, detector = str(tmp_path / "clip"), str(tmp_path / "detector")
    for name, arguments in {
        "PickScore": {"model": clip, "processor": clip},
        "HPSv2": {"model": clip, "tokenizer": clip},
        "CLIPScore": {"model": clip},
        "GenEval": {"detector": detector, "clip": clip},
    }.items():
        monkeypatch.setattr(script, name, functools.partial(getattr(script, name), **arguments))
    tiny_sd3(num_layers=1).save_pretrained(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("a cat\na street at night\n")
    arguments = {
        "model": tmp_path / "sd3",
        "general_prompts": tmp_path / "prompts.txt",
        "prompt_column": "prompt",
        "num_generated_prompts": 4,
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "num_inference_steps": 2,
        "max_steps": 1,
        "max_sequence_length": 16,
        "report_to": "none",
    }
    command = as_options(arguments)
    script.main(
        *parse(script, *command, "--offload_rewards", "--no_use_t5", "--use_cpu", "--activation_checkpointing")
    )
    card = (tmp_path / "run" / "README.md").read_text()
    for name in ("PickScore", "HPSv2", "CLIPScore", "OCRAccuracy", "GenEval"):
        assert name in card
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
