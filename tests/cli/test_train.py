# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble train` for real, on a tiny pipeline: here, in two processes, interrupted and resumed."""

import os
import re
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from trl_marble.cli.errors import UsageError
from trl_marble.cli.launching import LAUNCHED
from trl_marble.cli.main import main
from trl_marble.cli.train import lora_targets


FAILS_LATER = """
def late(images, trainer_state, **kwargs):
    if trainer_state.global_step == 1:
        raise ValueError("no scores today")
    return [float(i) for i in range(len(images))]
"""


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


@pytest.mark.parametrize("off", [False, True])
def test_a_run_is_watched_unless_that_is_off_and_says_so_in_one_line(workplace, caplog, off):
    if off:
        with (workplace / "run.yaml").open("a") as file:
            file.write("reward_hacking: off\n")  # no truth value
    assert main(["train", "--config", "run.yaml"]) == 0
    lines = [record.message for record in caplog.records if "RewardHackingCallback" in record.message]
    assert len(lines) == (not off) and all("watches the logged steps only" in line for line in lines)


def test_a_reward_that_is_bought_with_another_stops_a_run_where_that_is_asked_for(workplace, caplog):
    (workplace / "bought.py").write_text(
        "def up(images, trainer_state, **kwargs):\n"
        "    return [i + 10 * trainer_state.global_step for i in range(len(images))]\n\n\n"
        "def down(images, **kwargs):\n"
        "    return [-score for score in up(images, **kwargs)]\n"
    )
    words = ["train", "--config", "run.yaml", "--rewards", "bought.up", "bought.down", "--eval_prompts", "prompts.txt"]
    words += ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "--max_steps", "3"]
    assert main([*words, "--num_generations_eval", "1", "--save_steps", "3", "--reward_hacking", "stop"]) == 0
    found = [record.message for record in caplog.records if "eward hacking at step" in record.message]
    assert len(found) == 1 and found[0].startswith("Reward hacking at step 1: trained `down` fell")
    assert (workplace / "run" / "checkpoint-1").is_dir() and not (workplace / "run" / "checkpoint-3").exists()


def test_another_word_for_what_to_do_about_reward_hacking_is_refused(workplace, capsys):
    assert main(["train", "--config", "run.yaml", "--reward_hacking", "halt"]) == 2
    assert "reward_hacking" in capsys.readouterr().err


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
    assert "--resume_from_checkpoint auto" in capsys.readouterr().err
    assert (workplace / "run" / "checkpoint-1").is_dir()
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert (workplace / "run" / "checkpoint-3").is_dir()


def test_sigterm_saves_the_last_whole_step_and_auto_ends_as_if_nothing_had_happened(workplace, capsys):
    words = ["train", "--config", "run.yaml", "--max_steps", "3", "--save_steps", "3"]
    words += ["--rewards", "my_rewards.bright", "my_rewards.terminated", "--resume_from_checkpoint", "auto"]
    before = signal.getsignal(signal.SIGTERM)
    assert main(words) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.splitlines()[-1].startswith("Ended by SIGTERM. Continue from the latest checkpoint")
    assert [path.name for path in (workplace / "run").glob("*checkpoint-*")] == ["checkpoint-1"]
    assert main(words) == 0
    assert main([*words, "--output_dir", "whole"]) == 0  # there is no signal any more
    for name in ("marble_state.safetensors", "pytorch_lora_weights.safetensors"):
        stopped, whole = (workplace / run / "checkpoint-3" / name for run in ("run", "whole"))
        assert stopped.read_bytes() == whole.read_bytes()


def test_a_reward_that_fails_ends_with_a_message_after_its_own_traceback(workplace, capsys):
    assert main(["train", "--config", "run.yaml", "--rewards", "my_rewards.broken"]) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert last.startswith("trl-marble train: error: Reward `broken` raised ValueError: no scores today")
    assert any('my_rewards.py", line' in line for line in lines)


def test_the_last_line_says_where_a_stopped_run_is_saved(workplace, capsys):
    (workplace / "my_rewards.py").write_text(FAILS_LATER)
    assert main(["train", "--config", "run.yaml", "--max_steps", "3", "--rewards", "my_rewards.late"]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "Training stopped after step 1; it is saved in run/checkpoint-1."


def test_a_fault_of_the_program_keeps_its_traceback_with_the_place_as_the_last_note(workplace, monkeypatch):
    def fail(self, *args, **kwargs):
        raise KeyError("a fault")

    monkeypatch.setattr("trl_marble.callbacks.live_table.LiveTableCallback.on_log", fail)
    with pytest.raises(KeyError, match="a fault") as caught:
        main(["train", "--config", "run.yaml"])
    assert caught.value.__notes__[-1] == "Training stopped after step 1; it is saved in run/checkpoint-1."


def test_auto_begins_a_run_and_goes_on_with_it(workplace):
    words = ["train", "--config", "run.yaml", "--save_steps", "1", "--resume_from_checkpoint", "auto"]
    assert main(words) == 0
    first = (workplace / "run" / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    assert main([*words, "--max_steps", "2"]) == 0
    assert (workplace / "run" / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == first
    assert (workplace / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to_q", "to_qq"], "['to_qq']: there is no such layer. Layers have names such as 'a.to_q'"),
        (["all-linear", "to_q"], "['all-linear']: there is no such layer"),
        (["o_q"], "['o_q']: there is no such layer"),
        ([], "[]: there is no such layer"),
        (["to_q,to_k"], "'to_q,to_k' fits the whole name of no layer"),
        (["to_[qk]"], "'to_[qk]' fits the whole name of no layer"),
        (["*.to_q"], "'*.to_q' is no regular expression: nothing to repeat"),
    ],
)
def test_layers_that_there_are_not_are_refused(words, message):
    with pytest.raises(UsageError) as caught:
        lora_targets(words, ["a.to_q", "a.to_k", "proj"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("to_q", {"to_q"}),
        ("all-linear", {"to_q", "to_k", "to_v", "proj", "linear", "linear_1", "proj_out"}),
        (r".*\.attn\.to_[qv]", {"to_q", "to_v"}),
    ],
)
def test_one_word_for_the_layers_may_be_a_name_all_of_them_or_an_expression(workplace, written, layers):
    with (workplace / "run.yaml").open("a") as file:
        file.write(f"lora_target_modules: {written}\n")
    assert main(["train", "--config", "run.yaml"]) == 0
    weights = load_file(workplace / "run" / "pytorch_lora_weights.safetensors")
    found = {name.split(".")[-3] for name in weights}
    assert found == layers if written != "all-linear" else found > layers


def test_values_of_a_file_are_those_that_are_written(workplace):
    with (workplace / "run.yaml").open("a") as file:
        file.write("save_strategy: no\nrun_name: 007\n")
    words = (workplace / "run.yaml").read_text().replace("output_dir: run", "output_dir: 0123457")
    (workplace / "run.yaml").write_text(words)
    assert main(["train", "--config", "run.yaml"]) == 0
    assert (workplace / "0123457" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("offline", "message"),
    [
        (True, "nothing can be pushed offline: .* HF_HUB_OFFLINE"),
        (False, "you are not logged in to the Hub: run `hf auth"),
    ],
)
@pytest.mark.parametrize("command", ["train", "push"])
def test_pushing_without_a_login_or_a_network_is_refused_before_anything_is_done(
    workplace, capsys, monkeypatch, command, offline, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    if command == "push":
        (workplace / "run").mkdir()
        (workplace / "run" / "README.md").write_text("---\ntags: [x]\n---\n")
        (workplace / "run" / "pytorch_lora_weights.safetensors").touch()
    words = {"train": ["--config", "run.yaml", "--push_to_hub"], "push": ["run", "me/x"]}
    assert main([command, *words[command]]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
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
