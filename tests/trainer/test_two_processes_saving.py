# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Two processes write one checkpoint, go on from it as if they had never stopped, and neither waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trl_marble.checkpoint.folder import find_damage


pytestmark = pytest.mark.slow
WORKER = Path(__file__).parents[1] / "support" / "two_processes_saving.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(WORKER), str(folder)]
    done = subprocess.run(
        command, timeout=300, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_parts_of_both_are_in_one_checkpoint(folder) -> None:
    for step, inside in ((1, True), (2, False), (3, True)):
        checkpoint = folder / "whole" / f"checkpoint-{step}"
        assert find_damage(checkpoint) is None
        for process in (0, 1):
            assert (checkpoint / f"random_state_{process}.safetensors").is_file()
            assert (checkpoint / f"generation_batch_{process}.safetensors").is_file() == inside


def test_both_go_on_bit_for_bit(folder) -> None:
    for name in ("marble_state.safetensors", "pytorch_lora_weights.safetensors"):
        first, second = (folder / run / "checkpoint-3" / name for run in ("whole", "resumed"))
        assert first.read_bytes() == second.read_bytes()
    first, second = (load_file(folder / run / "checkpoint-3/optimizer.safetensors") for run in ("whole", "resumed"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_where_one_cannot_write_both_stop_and_nothing_is_left(folder) -> None:
    first, second = ((folder / f"error_{process}.txt").read_text() for process in (0, 1))
    assert "checkpoint-2` could not be written" in first and "File too large" in first
    assert first.split(" (")[0] == second.split(" (")[0]
    assert [path.name for path in (folder / "failing").iterdir()] == ["checkpoint-1"]
    assert find_damage(folder / "failing" / "checkpoint-1") is None
