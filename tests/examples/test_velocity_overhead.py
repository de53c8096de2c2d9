# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The plumbing of the benchmark: the models are as deep as they should be, and no velocity walks through them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "velocity_overhead.py"
MODULES = {"sd3.5m": 4000, "flux": 5000, "qwen-image": 5000}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_velocities_are_far_cheaper_without_the_pipeline(tmp_path, options):
    command = [sys.executable, SCRIPT, "--repeats", "3", "--json", tmp_path / "overhead.json", *options]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "overhead.json").read_text())
    assert list(report) == list(MODULES)
    for name, row in report.items():
        assert row["modules"] > MODULES[name]
        for velocity in ("trained", "old", "base"):
            assert row[velocity]["lowest"] < row["pipeline"]["lowest"] / 4, (name, velocity)
