# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run goes on with another number of processes, or with other micro-batches, and ends as it would have."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import scenarios
import torch
from safetensors.torch import load_file

from trl_marble.checkpoint.settings import load_settings


# Each generation batch has two optimizer steps and is used twice. Checkpoint 1 is inside the first use of a batch,
# checkpoint 3 inside its second use, and checkpoint 4 is between two batches. Two processes share a prompt's images.
WHOLE = {
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 6,
    "kl_target": 1e-4,
    "balance_every": 2,
    "prompts": [*scenarios.PROMPTS, "sea"],
}
SAVED = {**WHOLE, "save_strategy": "steps", "save_steps": 1}
HALVES = {"per_device_train_batch_size": 3}
DIVIDED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "steps_per_generation": 6}
# A generation batch that has steps of rollouts beside its images.
GRPO = {
    **WHOLE,
    "policy_loss": "grpo",
    "grpo_clip_range": 0.1,  # far from all ratios: rounding must not decide which samples are clipped
    "timestep_fraction": 0.99,
    "num_inference_steps": 3,
}
STEPS = (1, 3, 4)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The folder of the uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    scenarios.run_scenario(folder / "one", **SAVED)
    return folder


def assert_ends_like(found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], step: int) -> None:
    steps = [int(key.rpartition("/")[2]) for key in found if key.startswith("gradient/")]
    assert steps == list(range(step, WHOLE["max_steps"])) and whole["change"].norm() > 0
    names = [*(f"gradient/{number}" for number in steps), "change", "old", "average", "evaluated"]
    for name in names:
        value, expected = (tensors[name].double().nan_to_num() for tensors in (found, whole))
        assert (value - expected).norm() < 1e-5 * expected.norm(), name


def assert_logs_alike(found: Path, whole: Path) -> None:
    """The losses, rewards, KL and its coefficient of all steps."""
    logs = [json.loads((folder / "rank0.json").read_text())["log"] for folder in (found, whole)]
    rows, expected = ([row for row in log if "loss" in row] for log in logs)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [*range(1, WHOLE["max_steps"] + 1)]
    for row, other in zip(rows, expected, strict=True):
        names = [name for name in other if not name.startswith(("time/", "memory/")) and "second" not in name]
        assert {"kl", "beta", "loss"} <= set(names)
        assert {name: row[name] for name in names} == pytest.approx(
            {name: other[name] for name in names}, rel=1e-4, abs=1e-6, nan_ok=True
        )


@pytest.mark.parametrize("step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 4))])
def test_smaller_micro_batches_go_on_with_the_run(one, step) -> None:
    folder = one / f"divided after {step}"
    scenarios.run_scenario(folder, resume=f"one/out/checkpoint-{step}", **WHOLE | DIVIDED)
    assert_ends_like(load_file(folder / "rank0.safetensors"), load_file(one / "one" / "rank0.safetensors"), step)
    assert_logs_alike(folder, one / "one")


@pytest.fixture(scope="module")
def grpo(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of one process on steps of rollouts."""
    folder = tmp_path_factory.mktemp("grpo")
    scenarios.run_scenario(folder / "one", **GRPO, save_strategy="steps", save_steps=1)
    return folder


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_of_rollouts_are_gone_on_with_in_smaller_micro_batches(grpo, step) -> None:
    folder = grpo / f"divided after {step}"
    scenarios.run_scenario(folder, resume=f"one/out/checkpoint-{step}", **GRPO | DIVIDED)
    assert_ends_like(load_file(folder / "rank0.safetensors"), load_file(grpo / "one" / "rank0.safetensors"), step)
    assert_logs_alike(folder, grpo / "one")


@pytest.mark.slow
def test_steps_of_rollouts_are_divided_among_two_processes(grpo) -> None:
    run = on_two_processes(
        grpo, {f"two after {n}": {**GRPO, **HALVES, "resume": f"one/out/checkpoint-{n}"} for n in (1, 3)}
    )
    assert run.returncode == 0, run.stderr[-5000:]
    for step in (1, 3):
        found = load_file(grpo / f"two after {step}" / "rank0.safetensors")
        assert_ends_like(found, load_file(grpo / "one" / "rank0.safetensors"), step)
        assert_logs_alike(grpo / f"two after {step}", grpo / "one")


def on_two_processes(folder: Path, given: dict[str, dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Scenarios on two processes, one after the other."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, scenarios.__file__, str(folder), json.dumps(given)],
        timeout=400,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def two(one) -> Path:
    """The same folder, where two processes have gone on with the run of one, and had a run of their own."""
    given = {f"two after {step} on one": {**WHOLE, **HALVES, "resume": f"one/out/checkpoint-{step}"} for step in STEPS}
    given |= {"two": {**SAVED, **HALVES}}
    given["two after 3 on one"] |= {"save_strategy": "steps", "save_steps": 4}
    run = on_two_processes(one, given)
    assert run.returncode == 0, run.stderr[-5000:]
    assert "Resuming from" in run.stderr and "num_processes 1 -> 2" in run.stderr
    return one


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_two_processes_go_on_with_the_run_of_one(two, step) -> None:
    folder = two / f"two after {step} on one"
    first, second = (load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1))
    assert_ends_like(first, load_file(two / "one" / "rank0.safetensors"), step)
    assert all(first[name].equal(second[name]) for name in ("change", "old", "average"))
    assert_logs_alike(folder, two / "one")


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_one_process_goes_on_with_the_run_of_two(two, step) -> None:
    folder = two / f"one after {step} on two"
    scenarios.run_scenario(folder, resume=f"two/out/checkpoint-{step}", **WHOLE)
    whole = load_file(two / "one" / "rank0.safetensors")
    assert_ends_like(load_file(folder / "rank0.safetensors"), whole, step)
    assert_ends_like(load_file(folder / "rank0.safetensors"), load_file(two / "two" / "rank0.safetensors"), step)
    assert_logs_alike(folder, two / "two")


@pytest.mark.slow
def test_a_checkpoint_says_on_how_many_processes_it_was_trained_and_when(two) -> None:
    history = load_settings(two / "two after 3 on one" / "out" / "checkpoint-4")
    assert [(each.step, each.settings["num_processes"]) for each in history] == [(0, 1), (3, 2)]


def test_a_step_of_other_images_is_refused_with_what_to_set(one) -> None:
    folder = one / "refused"
    scenarios.run_scenario(folder, resume="one/out/checkpoint-1", **WHOLE | {"per_device_train_batch_size": 4})
    error = json.loads((folder / "rank0.json").read_text())["error"]
    assert "6 images per optimizer step" in error and "this run has 4 images" in error
    assert error.endswith(
        "Set `per_device_train_batch_size=3` and `gradient_accumulation_steps=2` and `steps_per_generation=4`."
    )
