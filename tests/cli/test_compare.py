# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble compare` of training runs."""

import json

import pytest
from PIL import Image

from trl_marble.cli.main import main


@pytest.fixture
def runs(tmp_path):
    """Two runs, the second of which drifts twice as far."""
    for name, scale in (("sum", 1.0), ("marble", 2.0)):
        rows = []
        for step in (0, 50, 100):
            pairs = {"kl": scale * step / 1000, "gain_worst": step / 100, "gain_mean": step / 100}
            pairs |= {"joint_gain": step / 200, "joint_fall": 0.0}
            row = {"step": step, "eval_gain/calm/mean": step / 100, "eval_gain/calm/standard_error": 0.1}
            row |= {f"eval_{name}": value for name, value in pairs.items()}
            rows.append(row | {f"eval_{name}_standard_error": 0.1 for name in pairs})
        folder = tmp_path / name / "checkpoint-100"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    return tmp_path


def test_runs_are_compared_at_equal_kl(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["compare", str(runs / "sum"), f"ours={runs / 'marble'}", "--at_kl", "0.05", "0.15"]
    assert main([*words, "--output_dir", str(runs / "out")]) == 0
    shown = capsys.readouterr().out
    assert "ours, step 100" in shown and "sum at KL 0.15" in shown and "not reached" in shown
    assert Image.open(runs / "out" / "gain_against_kl.png").width > 1000
    content = json.loads((runs / "out" / "gains.json").read_text())
    assert [point["step"] for point in content["sum"]["evaluations"]] == [0, 50, 100]
    gains = {name: [each["gains"] for each in content[name]["at_kl"]] for name in ("sum", "ours")}
    # At equal KL the second run has come half as far.
    assert gains["sum"][0]["worst"]["mean"] == pytest.approx(0.5) and gains["sum"][1] is None
    assert [found["mean"]["mean"] for found in gains["ours"]] == pytest.approx([0.25, 0.75])


def test_runs_of_different_rewards_are_told_apart(runs, capsys):
    words = ["compare", str(runs / "sum"), str(runs / "marble")]
    assert main(words) == 0
    assert "different rewards" not in capsys.readouterr().out
    state = runs / "marble" / "checkpoint-100" / "trainer_state.json"
    state.write_text(state.read_text().replace("eval_gain/calm/", "eval_gain/reader/"))
    assert main(words) == 0
    assert "different rewards (calm in 'sum'; reader in 'marble')" in capsys.readouterr().out
