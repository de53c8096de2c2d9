# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One process with batches of 8 is two processes with batches of 4."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


WORKER = Path(__file__).with_name("two_processes.py")
# A small learning rate, because Adam's first step makes a whole one of what is rounding in a gradient.
SETTINGS = {"num_generations": 4, "max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-6, "beta": 0.1}


def run(folder, processes, **settings):
    folder.mkdir()
    settings = SETTINGS | settings | {"per_device_train_batch_size": 8 // processes}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(WORKER), str(folder), json.dumps(settings)]
    subprocess.run(command, check=True, timeout=300, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [load_file(file) for file in sorted(folder.glob("rank*.safetensors"))]


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(
    "settings",
    [
        {"balance_every": 1, "balance_on": "advantage"},
        {"balance_every": 2, "balance_on": "loss"},
        {"multi_objective_aggregation": "sum_then_normalize"},
    ],
    ids=["every step", "every other step", "weighted sum"],
)
def test_two_processes_are_one(tmp_path, settings):
    (alone,) = run(tmp_path / "one", 1, **settings)
    first, second = run(tmp_path / "two", 2, **settings)
    assert {"0", "1", "alpha", "old", "diversity", "evaluation"} == set(alone)
    assert len(alone["diversity"]) == 3 and alone["diversity"].min() > 0 and alone["evaluation"].shape == (4, 24)
    for name, value in alone.items():
        # `bright` and `blue` have nearly one gradient: how they share their weight is up to rounding, their sum not.
        assert relative_error(first[name], value) < (1e-3 if name == "alpha" else 1e-5), name
        assert first[name].equal(second[name]), name


def test_a_streaming_step_of_two_processes_leaves_both_with_one_direction(tmp_path):
    settings = {"balance_every": 1, "balance_fraction": 0.5, "timestep_fraction": 1.0}
    first, second = run(tmp_path / "two", 2, **settings)
    for name, value in first.items():
        assert value.equal(second[name]) and value.isfinite().all(), name
    assert first["1"].norm() > 0


def test_a_reward_that_fails_on_one_process_stops_both_with_the_same_error(tmp_path):
    assert run(tmp_path / "raise", 2, fails=True) == []
    first, second = (file.read_text() for file in sorted((tmp_path / "raise").glob("rank*.txt")))
    assert first == second and "`sees_nothing_on_rank_1` raised ConnectionError: scorer went away" in first


def test_a_reward_that_fails_on_one_process_is_masked_there(tmp_path):
    first, second = run(tmp_path / "mask", 2, fails=True, reward_failure="mask")
    assert first["1"].equal(second["1"]) and first["1"].norm() > 0
