# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The demo: a step of it with few images always, all of it when slow tests are asked for."""

import inspect
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from trl_marble.cli.demo import DEMO_SETTINGS, run_demo
from trl_marble.cli.main import main


TABLE_TOOL = Path(__file__).parents[2] / "docs" / "_tools" / "demo_table.py"
REWARDS = {"composition", "reader", "coverage", "centring", "calm"}


def run(folder, *arguments):
    assert main(["demo", "--output_dir", str(folder), *arguments]) == 0
    return json.loads((folder / "report.json").read_text())


def make_small(monkeypatch, **settings):
    small = {
        "num_generations": 2,
        "num_generations_eval": 1,
        "per_device_train_batch_size": 16,
        "num_inference_steps": 3,
        "num_images_to_log": 2,
    }
    for name, value in (small | settings).items():
        monkeypatch.setitem(DEMO_SETTINGS, name, value)


def check_pictures(folder, *names):
    card = (folder / "README.md").read_text()
    for name in names:
        assert min(Image.open(folder / name).size) > 300 and f"({name})" in card
    assert str(folder.parent) not in card


def test_the_demo_leaves_what_it_promises(tmp_path, monkeypatch, capsys):
    make_small(monkeypatch, multi_objective_aggregation="progress")
    folder = tmp_path / "demo"
    report = run(folder, "--max_steps", "1")
    assert report["seconds"] > 0 and set(report["rewards"]) == REWARDS
    for name, reward in report["rewards"].items():
        assert 0 < reward["before"]["mean"] < 1 and reward["change"]["standard_error"] > 0
        change = reward["after"]["mean"] - reward["before"]["mean"]
        assert reward["change"]["mean"] == pytest.approx(change, abs=1e-6), name
    start, end = report["evaluations"]  # the last step is no multiple of `eval_steps`
    assert (start["step"], start["kl"]["mean"], start["worst"]["mean"]) == (0, 0, 0)
    assert end["step"] == 1 and end["kl"]["mean"] > 0 and set(end["gains"]) == REWARDS
    assert end["worst"]["mean"] == min(gain["mean"] for gain in end["gains"].values())
    assert set(report["progress"]["weight"]) == REWARDS and "balance" not in report
    assert (folder / "pytorch_lora_weights.safetensors").stat().st_size > 10_000
    check_pictures(folder, "before_after.png", "gain_against_kl.png", "progress.png")
    printed = capsys.readouterr().out
    assert "Change / SE" in printed and "Gains in standard deviations" in printed
    runpy.run_path(str(TABLE_TOOL))["main"]([str(folder), str(folder)])
    assert f"| {report['rewards']['calm']['change']['mean']:+.4f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_shows_the_balance_where_gradients_are_balanced(tmp_path, monkeypatch):
    make_small(monkeypatch, multi_objective_aggregation="marble", log_images=False)
    report = run(tmp_path / "demo", "--max_steps", "1")
    assert report["balance"]["cos_min"] >= 0 and set(report["balance"]["alpha"]) == REWARDS
    assert "progress" not in report
    check_pictures(tmp_path / "demo", "before_after.png", "gain_against_kl.png", "balance.png")


def test_the_demo_is_short():
    assert len(inspect.getsource(run_demo).splitlines()) < 40 and len(DEMO_SETTINGS) < 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_every_reward_rises(tmp_path, seed):
    report = run(tmp_path / "demo", "--seed", str(seed))
    assert [each["step"] for each in report["evaluations"]] == [0, 30, 60]
    for evaluation in report["evaluations"][1:]:
        for name, gain in evaluation["gains"].items():
            assert gain["mean"] > 0, f"{name} at step {evaluation['step']}"
    for name, reward in report["rewards"].items():
        assert reward["change"]["mean"] > 2 * reward["change"]["standard_error"], name
