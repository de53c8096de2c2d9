# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The plumbing of the benchmark: what it counts is exact, what it times only has to be there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "step_cost.py"


def run(*options):
    subprocess.run([sys.executable, SCRIPT, *options], check=True)


@pytest.mark.slow
def test_every_mode_is_measured(tmp_path):
    run("--model", "tiny", "--rewards", "3", "--repeats", "1", "--device", "cpu", "--json", tmp_path / "cost.json")
    report = json.loads((tmp_path / "cost.json").read_text())
    assert list(report) == ["3"]
    modes = report["3"]
    for row in modes.values():
        assert row["update_ratio"] > 0 and row["loop_ratio"] > 0
        assert 0.5 < row["memory_less_rows_ratio"] <= row["memory_ratio"] < 3
    assert modes["weighted_sum"]["update_ratio"] == modes["weighted_sum"]["loop_ratio"] == 1
    # 16 images in batches of 8, 2 timesteps each: four micro-steps, two of which have the penalties where sampled.
    passes = {mode: (row["forwards"], row["backwards"]) for mode, row in modes.items()}
    naive = passes.pop("naive")
    assert naive[0] == 4 * 3 and naive[1] > 4 * 3
    assert passes == {
        "single": (12, 4),  # trained, old and base policy
        "weighted_sum": (12, 4),
        "exact": (12, 8),  # two backward passes for a forward pass, whatever the number of rewards
        "streaming": (12, 5),  # a quarter of them is measured
        "every_10": (12, 4.4),
        "weighted_sum_sampled": (10, 4),
        "weighted_sum_on_policy": (8, 4),
        "weighted_sum_on_policy_sampled": (6, 4),
        "exact_sampled": (10, 8),  # the trust region has the second backward pass
        "exact_on_policy": (8, 8),
        "exact_on_policy_sampled": (6, 6),
        "awm": (12, 8),
        "awm_sampled": (8, 6),
        "awm_on_policy": (8, 8),
        "awm_on_policy_sampled": (6, 6),
    }


@pytest.mark.slow
def test_passes_are_counted_at_the_papers_settings(tmp_path):
    run("--paper_passes", "--json", tmp_path / "passes.json")
    passes = json.loads((tmp_path / "passes.json").read_text())
    assert passes == {
        "paper_passes": {
            # 25 solver steps; at 24 timesteps the old, the base and the trained policy, and a backward pass.
            "weighted_sum": 25 + 24 * 4,
            # 10 solver steps; at 9 timesteps a forward and a backward pass, and at two of them both for the KL.
            "exact_nft": 10 + 9 * 2 + 2 * 2,
            # The old policy too, at these two.
            "exact_awm": 10 + 9 * 2 + 2 * 3,
        }
    }


def test_no_penalty_is_sampled_where_there_is_none():
    options = [sys.executable, SCRIPT, "--beta", "0", "--modes", "weighted_sum", "exact_sampled"]
    ended = subprocess.run(options, capture_output=True, text=True)
    assert ended.returncode == 1 and "leave out exact_sampled" in ended.stderr
