# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
One process with batches of 8 is two processes with batches of 4, and where one of two fails, both do.

One pair of processes goes through the scenarios of the fast tests, one after the other, and another through those of
the slow ones. That they come to the end after so many failures shows that these leave nothing behind in which the next
exchange would get stuck.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import scenarios
import torch
from safetensors.torch import load_file


TIMEOUT = 400  # seconds, of which about 60 are needed on two cores
# The scenarios of the tests that are not marked slow.
FAST = ("every step", "uninterrupted", "resumed", "reward")

# What has to be the same with one process.
EQUAL = {
    "every step": {"regularizer_fraction": 0.5},
    "every other step": {"balance_every": 2, "balance_on": "loss", "max_steps": 4},
    "weighted sum": {
        "multi_objective_aggregation": "sum_then_normalize",
        "kl_target": 1e-4,
        "regularizer_fraction": 0.5,
    },
    # Steps with three new prompts, one and none, and nine base images for two processes.
    "progress": {
        "multi_objective_aggregation": "progress",
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
        "progress_base_images": 3,
        "max_steps": 3,  # from here on rounding has reached the last bit of some pixels
        "rollout_batch_size": 2,
    },
    # Three prompts a step, the middle one on both processes, and an epoch that is filled up from its beginning.
    "a group on both": {
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
        "max_steps": 4,
        "eval_prompts": 7,
    },
    # The same, with losses that compare the samples of a group.
    "crd": {
        "policy_loss": "crd",
        "old_policy_preset": 4,
        "sampling_policy_preset": 3,
        "reference_guidance_scale": 3.0,
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
        "max_steps": 4,
    },
    "dgpo": {
        "policy_loss": "dgpo",
        "old_policy_preset": 3,
        "dgpo_clip_range": 10.0,  # what is at the clip would be on either side of it by a rounding
        "dgpo_beta": 10.0,  # which multiplies what is rounded
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "prompts": [*scenarios.PROMPTS, "sea"],
    },
    # Rewards that compare images, of groups of which one is on both processes; and other prompts for silent groups.
    "sets": {
        "rewards": ["left", "rank_in_group", "rank_in_batch", "colour_distance"],
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
        "num_generations_eval": 2,
    },
    "sets by progress": {
        "rewards": ["left", "rank_in_group", "rank_in_batch", "colour_distance"],
        "multi_objective_aggregation": "progress",
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
        "progress_base_images": 4,
        "num_generations_eval": 2,
    },
    "other prompts": {
        "rewards": ["left_if_long", "dark_rank_if_long"],
        "resample_silent_prompts": 2,
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
    },
    # Shares of the rewards, of a group that is on both processes, and with other prompts for silent groups.
    "shares": {
        "rewards": ["left_if_long", "dark_rank_if_long"],
        "balance_slider": True,
        "multi_objective_aggregation": "normalize_then_sum",
        "resample_silent_prompts": 2,
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
    },
    # Rewards that learn on the first process, from images and from features.
    "learning": {
        "rewards": ["left", "Novelty", "Unlike", "Dark"],
        "per_device_train_batch_size": 6,
        "prompts": [*scenarios.PROMPTS, "sea"],
    },
    "several updates": {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_prompts": 1},
    "sharded": {
        "shard_base": True,
        "activation_checkpointing": True,
        "per_device_eval_batch_size": 4,
        "eval_prompts": 9,  # more batches on one process than on the other
    },
    "transitions": {
        "policy_loss": "grpo",
        "grpo_clip_range": 0.1,  # far from all ratios: rounding must not decide which samples are clipped
        "timestep_fraction": 0.99,
        "num_inference_steps": 3,
        "num_iterations": 2,
        "kl_target": 1e-4,
        "max_steps": 4,
    },
    # One teacher of two prompts, which may all be on one process, and one of all; beside rewards, and alone.
    "teachers": {"teachers": ["red", "all:style"], "sources": ["red", "", "red", "", "", ""]},
    "teachers alone": {
        "teachers": ["red", "all:style"],
        "sources": ["red", "", "red", "", "", ""],
        "rewards": [],
        "multi_objective_aggregation": "sum_then_normalize",
    },
    "adam": {"optim": "adamw_torch", "learning_rate": 1e-4, "max_grad_norm": 1.0},
}
SAVED = {"optim": "adamw_torch", "learning_rate": 1e-3, "steps_per_generation": 2, "max_steps": 4, "shard_base": True}
ALONE = {
    "streaming": {"balance_fraction": 0.5, "gradient_accumulation_steps": 2, "shard_base": True},
    "masked": {"rewards": ["bright", "raises_on_rank_1"], "reward_failure": "mask"},
    "logging": {
        "rewards": ["bright", "logs"],
        "log_images": True,
        "log_images_steps": 1,
        "max_steps": 1,
        "per_device_eval_batch_size": 3,
    },
    "uninterrupted": {**SAVED, "save_strategy": "steps", "save_steps": 1},
    "resumed": {**SAVED, "resume": "uninterrupted/out/checkpoint-1"},
}
ERRORS = {
    "reward": (
        {"rewards": ["bright", "raises_on_rank_1"]},
        "RewardError: Process 1 of 2 failed with RewardError: Reward `raises_on_rank_1` raised ConnectionError",
    ),
    "reward at once": (
        {"rewards": ["bright", "raises_on_rank_1"], "rollout_batch_size": 1, "per_device_train_batch_size": 8},
        "RewardError: Process 1 of 2 failed with RewardError: Reward `raises_on_rank_1` raised ConnectionError",
    ),
    "nonsense": (
        {"rewards": ["bright", "answers_nonsense_on_rank_1"]},
        "RewardError: Process 1 of 2 failed with RewardError: Reward `answers_nonsense_on_rank_1` returned str",
    ),
    "row": ({"fault": "row"}, "RuntimeError: Process 1 of 2 failed with OSError: row cannot be read"),
    "rollout": ({"fault": "rollout"}, "RuntimeError: Process 1 of 2 failed with OSError: no space left"),
    "update": (
        {"fault": "update", "gradient_accumulation_steps": 2},  # in the first micro-batch, and the other goes on
        "RuntimeError: Process 1 of 2 failed with FloatingPointError: update went wrong",
    ),
    "picture": (
        {"fault": "picture", "log_images": True, "log_images_steps": 1},
        "RuntimeError: Process 0 of 2 failed with AttributeError",
    ),
    "save": ({"fault": "save", "save_strategy": "steps", "save_steps": 2}, "no space left"),
}
# What is not finite on one process, and what both say of it.
NONFINITE = {
    "latent": r"Process 1 of 2 failed with .*latents of 1 of \d images that were sampled together are not finite",
    "loss": r"Step 2: .*; \d+ losses \(of a sample at a timestep\) are not finite, first .* on process 1",
}


def mark(names):
    """The scenarios, those that are not among the fast ones marked."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def two_fast(tmp_path_factory) -> Path:
    return run_on_two(tmp_path_factory.mktemp("two"), lambda name: name in FAST)


@pytest.fixture(scope="module")
def two_slow(tmp_path_factory) -> Path:
    return run_on_two(tmp_path_factory.mktemp("two"), lambda name: name not in FAST)


@pytest.fixture
def two(request) -> Path:
    """The folder that the scenario of a test is in."""
    return request.getfixturevalue("two_slow" if request.node.get_closest_marker("slow") else "two_fast")


def run_on_two(folder: Path, chosen: Callable[[str], bool]) -> Path:
    given = EQUAL | ALONE | {name: settings for name, (settings, _) in ERRORS.items()}
    for name in NONFINITE:
        given |= {name: {"fault": name}, f"{name} skipped": {"fault": name, "on_nonfinite": "skip"}}
    given = {name: {"per_device_train_batch_size": 4} | given[name] for name in given if chosen(name)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launcher, scenarios.__file__, str(folder), json.dumps(given)],
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return folder


def tensors(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((folder / name).glob("rank*.safetensors"))]


def told(folder: Path, name: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((folder / name).glob("rank*.json"))]


def relative_error(a, b):
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", mark(EQUAL))
def test_two_processes_are_one(two, tmp_path, name) -> None:
    size = EQUAL[name].get("per_device_train_batch_size", 4)
    scenarios.run_scenario(tmp_path / "one", **EQUAL[name] | {"per_device_train_batch_size": 2 * size})
    (alone,), (first, second) = tensors(tmp_path, "one"), tensors(two, name)
    assert first.keys() == second.keys() == alone.keys()
    steps = sum(key.startswith("gradient/") for key in alone)
    assert steps >= 3 and alone["change"].norm() > 0 and alone["gradient/2"].norm() > 0
    balances = "multi_objective_aggregation" not in EQUAL[name]
    solved = {"every other step": steps // 2}.get(name, steps) if balances else 0
    assert sum(key.startswith("gram/") for key in alone) == solved
    for step in range(steps):  # each process has its samples, together they are those of one
        both = torch.cat([first[f"advantages/{step}"], second[f"advantages/{step}"]], dim=1)
        assert both.isnan().equal(alone[f"advantages/{step}"].isnan())
        assert relative_error(both, alone[f"advantages/{step}"]) < 1e-5
        for key in (f"sample_ids/{step}", f"first_half/{step}"):
            assert torch.cat([first[key], second[key]]).equal(alone[key])
    # What is learned from rounded features, or computed of sets of them, is rounded twice.
    tolerance = 3e-5 if name in ("learning", "sets") else 1e-5
    for key, value in alone.items():
        if key.split("/")[0] not in ("advantages", "sample_ids", "first_half"):
            assert relative_error(first[key], value) < tolerance, key
            assert first[key].nan_to_num().equal(second[key].nan_to_num()), key

    # What is logged, alpha and cosines included.
    (expected,), (on_first, on_second) = told(tmp_path, "one"), told(two, name)
    assert on_first["evaluation"] == pytest.approx(on_second["evaluation"], rel=0, abs=0, nan_ok=True)
    assert on_first["evaluation"] == pytest.approx(expected["evaluation"], rel=tolerance, abs=1e-6, nan_ok=True)
    assert len(on_first["log"]) == len(expected["log"])
    for found, entry in zip(on_first["log"], expected["log"], strict=True):
        timeless = {
            key: value
            for key, value in entry.items()
            if not key.startswith(("time/", "memory/")) and "runtime" not in key and "second" not in key
        }
        assert ("loss" in entry) == ("time/rollout" in entry) == ("time/rollout" in found)
        assert {key: found[key] for key in timeless} == pytest.approx(timeless, rel=tolerance, abs=1e-6, nan_ok=True)
        rewards = EQUAL[name].get("rewards", ["left"])
        assert not balances or not rewards or "loss" not in entry or f"balance/alpha/{rewards[0]}" in entry
    if name == "every step":  # of two prompts: each is a half, and `red_only` applies to one of them
        solves = [row for row in expected["log"] if "balance/cos_min" in row]
        assert len(solves) == steps
        for kind in ("heldout_cos", "signal"):
            assert all(math.isfinite(row[f"balance/{kind}/left"]) for row in solves)
            assert all(math.isnan(row[f"balance/{kind}/red_only"]) for row in solves)
        assert name != "progress" or "loss" not in entry or 0 < entry["progress/weight/left"] < 1


def test_a_reward_may_apply_on_one_process_only(two) -> None:
    first, second = tensors(two, "every step")
    red = [[part["advantages/0"][2].isfinite().any().item()] for part in (first, second)]
    assert red == [[True], [False]] and first["active/0"][0].any(dim=0).all()


@pytest.mark.slow
def test_a_group_may_be_on_both_processes(two) -> None:
    groups = [set((part["sample_ids/0"] // 4).tolist()) for part in tensors(two, "a group on both")]
    assert groups == [{0, 1}, {1, 2}]


@pytest.mark.slow
def test_an_evaluation_may_have_more_processes_than_images(two) -> None:
    first, second = tensors(two, "accumulated")
    assert first["evaluated"].shape == (4, 1) and first["evaluated"][0].isfinite().all()


@pytest.mark.slow
def test_each_process_holds_its_part_of_a_sharded_base(two) -> None:
    whole, (first, second) = told(two, "weighted sum")[0]["parameters held"], told(two, "sharded")
    adapter = tensors(two, "sharded")[0]["change"].numel()
    held = [part["parameters held"] - adapter for part in (first, second)]
    assert sum(held) == pytest.approx(whole - adapter, rel=1e-3)
    assert held[0] == pytest.approx(held[1], rel=1e-2)


@pytest.mark.slow
def test_a_streaming_step_leaves_both_with_one_direction(two) -> None:
    first, second = tensors(two, "streaming")
    for key in ("change", "old", "gradient/0", "gradient/1", "gradient/2", "gram/0", "gram/1", "gram/2"):
        assert first[key].equal(second[key]) and first[key].isfinite().all() and first[key].norm() > 0, key


def test_two_processes_resume_what_two_have_saved(two) -> None:
    """In the middle of a generation batch, which each of them keeps a part of."""
    whole, resumed = tensors(two, "uninterrupted"), tensors(two, "resumed")
    assert (two / "uninterrupted" / "out" / "checkpoint-1" / "generation_batch_1.safetensors").is_file()
    for rank in (0, 1):
        assert "gradient/0" not in resumed[rank]
        for key in ("gradient/1", "gradient/3", "change", "old", "average", "evaluated"):
            assert resumed[rank][key].nan_to_num().equal(whole[rank][key].nan_to_num()), key


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_is_masked_there(two) -> None:
    first, second = tensors(two, "masked")
    assert first["advantages/0"].isfinite().all() and second["advantages/0"][1].isnan().all()
    assert first["change"].equal(second["change"]) and first["change"].norm() > 0


@pytest.mark.parametrize("name", mark(ERRORS))
def test_both_processes_stop_with_the_error_of_one(two, name) -> None:
    first, second = told(two, name)
    assert first["error"] == second["error"] and ERRORS[name][1] in first["error"]
    failed, other = (first, second) if name in ("picture", "save") else (second, first)
    assert failed["cause"] != "None" and other["cause"] == "None"
    saved = {file.name for file in (two / name / "out").glob("checkpoint-1/*")}
    # In the first step there is nothing to save, and where saving fails nothing can be.
    assert {"marble_state.safetensors", "trainer_state.json"} <= saved or name in (
        "reward",
        "reward at once",
        "nonsense",
        "save",
    )


@pytest.mark.slow
def test_neither_process_samples_on_when_a_reward_of_one_has_failed(two) -> None:
    first, second = told(two, "reward at once")
    assert first["pipeline calls"] == second["pipeline calls"] <= 5  # of 8


@pytest.mark.slow
def test_what_rewards_log_is_averaged_over_both_processes(two) -> None:
    """The evaluation has three images for each process."""
    first, second = told(two, "logging")
    logged = first["log"][0]
    assert {key: logged[key] for key in ("on 0", "on 1", "on both", "a")} == {
        "on 0": 5.0,
        "on 1": 5.0,
        "on both": 4.0,
        "a": 1.5,
    }
    assert first["evaluation"]["eval_a"] == second["evaluation"]["eval_a"] == 1.5
    assert first["evaluation"]["eval_on both"] == 3.0
    (table,) = (two / "logging" / "out" / "images").glob("eval_step_*.csv")
    header, *rows = table.read_text().splitlines()
    assert header == "prompt,image,bright,logs,dark,on 0,on 1" and len(rows) == 4
    for row in rows:  # each image has what its own process logged
        prompt, *_, on_0, on_1 = row.split(",")
        assert sorted([on_0, on_1]) == ["", prompt]


@pytest.mark.slow
@pytest.mark.parametrize("name", NONFINITE)
def test_what_is_not_finite_on_one_process_stops_both_or_is_skipped_by_both(two, name) -> None:
    first, second = told(two, name)
    assert first["error"] == second["error"] and re.search(NONFINITE[name], first["error"])
    assert (two / name / "out" / "checkpoint-1" / "manifest.json").is_file()
    first, second = tensors(two, f"{name} skipped")
    skipped = {"gradient/1"} if name == "loss" else set()  # without the sample there are latents to train on
    for key in {"gradient/0", "gradient/1", "gradient/2", "change", "old", "average"} - skipped:
        assert first[key].equal(second[key]) and first[key].isfinite().all() and first[key].norm() > 0, key
    assert skipped.isdisjoint(first) and skipped.isdisjoint(second)
