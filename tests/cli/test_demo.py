# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The demo: a step of it with few images always, all of it when slow tests are asked for."""

import inspect
import json

import pytest
from PIL import Image

from trl_marble.cli.demo import DEMO_SETTINGS, run_demo
from trl_marble.cli.main import main


def run(folder, *arguments):
    assert main(["demo", "--output_dir", str(folder), *arguments]) == 0
    return json.loads((folder / "report.json").read_text())


def test_the_demo_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    small = {
        "num_generations": 4,
        "num_generations_eval": 1,
        "per_device_train_batch_size": 32,
        "num_inference_steps": 4,
    }
    for name, value in small.items():
        monkeypatch.setitem(DEMO_SETTINGS, name, value)
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
    assert "Change / SE" in capsys.readouterr().out


def test_the_demo_is_short():
    assert len(inspect.getsource(run_demo).splitlines()) < 40 and len(DEMO_SETTINGS) < 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_every_reward_rises(tmp_path, seed):
    report = run(tmp_path / "demo", "--seed", str(seed))
    for name, reward in report["rewards"].items():
        assert reward["after"] > reward["before"] + 2 * reward["standard_error"], name
    assert report["balance"]["cos_min"] >= 0
    assert report["balance"]["weighted_sum_cos_min"] < 0
