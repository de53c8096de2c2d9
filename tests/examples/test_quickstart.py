# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The demo: one step of it always, all of it when slow tests are asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), "--output_dir", str(folder), *arguments]
    subprocess.run(command, check=True, timeout=1800, capture_output=True, cwd=folder.parent)
    return json.loads((folder / "report.json").read_text())


def test_the_demo_leaves_what_it_promises(tmp_path):
    report = run(tmp_path / "demo", "--max_steps", "1")
    assert set(report["rewards"]) == {"composition", "reader", "coverage", "centring", "calm"}
    assert all(0 < value < 1 for reward in report["rewards"].values() for value in reward.values())
    assert report["seconds"] > 0 and report["balance"]["cos_min"] >= 0
    folder = tmp_path / "demo"
    assert (folder / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
    for picture in ("before_after.png", "balance.png"):
        assert min(Image.open(folder / picture).size) > 300
        assert picture in (folder / "README.md").read_text()
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_the_demo_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_every_reward_rises(tmp_path, seed):
    report = run(tmp_path / "demo", "--seed", str(seed))
    for name, reward in report["rewards"].items():
        assert reward["after"] > reward["before"] + 2 * reward["standard_error"], name
    assert report["balance"]["cos_min"] >= 0
    assert report["balance"]["weighted_sum_cos_min"] < 0
