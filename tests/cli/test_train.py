# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble train` for real, on a tiny pipeline: here, in two processes, interrupted and resumed."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from trl_marble.cli.launching import LAUNCHED
from trl_marble.cli.main import main
from trl_marble.rewards import RewardError


def test_a_run_leaves_an_adapter_with_a_card_and_says_where(workplace, capsys):
    held_out = ["--eval_prompts", "prompts.txt", "--eval_strategy", "steps", "--eval_steps", "1"]
    assert main(["train", "--config", "run.yaml", *held_out, "--lora_target_modules", "to_q", "to_k"]) == 0
    folder = workplace / "run"
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"to_q", "to_k"}
    assert all(4 in weight.shape for weight in weights.values())
    assert "bright" in (folder / "README.md").read_text()
    assert f"The adapter and its card (README.md) are in {folder}" in capsys.readouterr().out


def test_held_out_rewards_are_measured_and_not_trained_on(workplace):
    held_out = ["--eval_prompts", "prompts.txt", "--eval_rewards", "my_rewards.blue", "--eval_strategy", "steps"]
    words = ["--rewards", "my_rewards.bright", *held_out, "--eval_steps", "1", "--save_steps", "1"]
    assert main(["train", "--config", "run.yaml", *words]) == 0
    state = (workplace / "run" / "checkpoint-1" / "trainer_state.json").read_text()
    assert '"eval_rewards/blue/mean"' in state and '"rewards/blue/mean"' not in state
    assert '"eval_rewards/bright/mean"' in state and '"rewards/bright/mean"' in state


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_run_can_be_continued(workplace, capsys, interruptible):
    words = ["train", "--config", "run.yaml", "--max_steps", "3", "--save_steps", "3"]
    words += ["--rewards", "my_rewards.bright", "my_rewards.interrupted"]
    assert main(words) == 130
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert (workplace / "run" / "checkpoint-1").is_dir()
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert (workplace / "run" / "checkpoint-3").is_dir()


def test_an_error_of_training_keeps_its_traceback(workplace):
    with pytest.raises(RewardError, match="no scores today"):
        main(["train", "--config", "run.yaml", "--rewards", "my_rewards.broken"])


def test_two_processes_are_started_and_train_together(workplace):
    with (workplace / "run.yaml").open("a") as file:
        file.write("num_processes: 2\ncpu: true\n")
    command = [
        sys.executable,
        "-m",
        "trl_marble.cli.main",
        "train",
        "--config",
        "run.yaml",
        "--main_process_port",
        "0",
    ]
    environment = {name: value for name, value in os.environ.items() if name != LAUNCHED} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The adapter and its card") == 1
    card = (workplace / "run" / "README.md").read_text()
    assert "| processes | 2 |" in card.replace("`", "")
