# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The plumbing of the benchmark: what it counts is exact, what it times only has to be there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "step_cost.py"


@pytest.mark.slow
def test_every_mode_is_measured(tmp_path):
    options = ["--model", "tiny", "--rewards", "3", "--repeats", "1", "--device", "cpu", "--beta", "0.1"]
    subprocess.run([sys.executable, SCRIPT, *options, "--json", tmp_path / "cost.json"], check=True)
    report = json.loads((tmp_path / "cost.json").read_text())
    assert list(report) == ["3"]
    for num_rewards, modes in report.items():
        assert list(modes) == ["single", "weighted_sum", "naive", "exact", "streaming", "every_10"]
        for row in modes.values():
            assert row["update_ratio"] > 0 and row["loop_ratio"] > 0
            assert 0.5 < row["memory_ratio"] < 3
            # 16 images in batches of 8, 2 timesteps each; trained, old and base policy.
            assert row["forwards"] == 4 * 3
        assert modes["weighted_sum"]["update_ratio"] == modes["weighted_sum"]["loop_ratio"] == 1
        passes = {mode: row["backwards"] for mode, row in modes.items()}
        assert passes["single"] == passes["weighted_sum"] == 4
        assert passes["exact"] == 8  # two a forward pass, whatever the number of rewards
        assert passes["streaming"] == 5  # a quarter of them is measured
        assert passes["every_10"] == 4.4
        assert passes["naive"] > 4 * int(num_rewards)
