# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The comparison of losses: equal cost, how learning rates are chosen, and the command from nothing to a report."""

import json
import sys

import pytest
from example_scripts import EXAMPLES

from trl_marble import MarbleConfig
from trl_marble.losses import LOSSES


sys.path.append(str(EXAMPLES / "benchmarks"))
import compare_losses  # noqa: E402
from compare_losses import SCALE, TUNING_SCALE, best_rate, rates_beyond, tuning_runs  # noqa: E402
from evidence import methods  # noqa: E402
from evidence.costs import estimate_passes  # noqa: E402
from evidence.runs import MAIN, Run  # noqa: E402


def run_of(aggregation, loss):
    return Run(MAIN, methods.loss_entry(aggregation, loss), 1.2e-3, 1, SCALE)


def test_every_loss_is_compared():
    assert {run_of("gdpo", name).settings.get("policy_loss", "nft") for name in methods.LOSSES} == set(LOSSES)


def test_entries_differ_in_the_loss_and_in_what_it_needs():
    first = run_of("gdpo", "nft").settings
    for name, (label, own, beta, kl) in methods.LOSSES.items():
        for aggregation in methods.LOSS_AGGREGATIONS:
            run = run_of(aggregation, name)
            held = {"beta": 0.5 * beta, "kl_target": pytest.approx(0.03 * kl)}
            assert {key: run.settings[key] for key in held} == held
            assert label in methods.find_method(run.method).label
            MarbleConfig("compared", **run.settings)  # is a possible configuration
            same = set(first) - set(held) - set(own) - {"multi_objective_aggregation", "scale_rewards"}
            assert {key: run.settings[key] for key in same} == {key: first[key] for key in same}


def test_all_cost_the_same():
    cost = 60 * estimate_passes(run_of("gdpo", "nft").settings, 5)
    assert cost == 60 * 64 * (5 + 5 + 4 * (1 + 1 + 0.25))
    steps = {}
    for aggregation in methods.LOSS_AGGREGATIONS:
        for name in methods.LOSSES:
            run = run_of(aggregation, name)
            steps[aggregation, name] = run.steps
            assert run.steps * estimate_passes(run.settings, 5) == pytest.approx(cost, rel=0.02)
    # The pass over groups, and the base model in it, cost a third of the steps.
    assert steps["gdpo", "nft"] == steps["gdpo", "awm"] == 60 and steps["gdpo", "dgpo"] == 42


def test_the_rule_for_learning_rates():
    low, middle, high = tuning_runs(["awm"], TUNING_SCALE)
    assert (low.seed, low.phase) == (0, "tuning")
    scores = {low: (0.3, 0.2), middle: (0.4, 0.15), high: (0.5, 0.0)}
    assert best_rate(scores, "awm") == 1.2e-3 and rates_beyond(scores, ["awm"], TUNING_SCALE) == []
    (beyond,) = rates_beyond(scores | {low: (0.4, 0.3)}, ["awm"], TUNING_SCALE)
    assert beyond.learning_rate == 3e-4
    (beyond,) = rates_beyond(scores | {high: (0.5, 0.1)}, ["awm"], TUNING_SCALE)
    assert beyond.learning_rate == 4.8e-3
    assert best_rate(scores | {beyond: (0.9, 0.9)}, "awm") == 4.8e-3
    # What is beyond is not gone beyond again.
    assert rates_beyond(scores | {high: (0.5, 0.1), beyond: (0.9, 0.9)}, ["awm"], TUNING_SCALE) == [beyond]


def test_without_learning_rates_nothing_else_is_run(tmp_path, capsys):
    compare_losses.main(["--dry_run", "--losses", "nft", "crd", "--output_dir", str(tmp_path)])
    assert "0 of 7 runs are finished" in capsys.readouterr().out  # three rates each, and the base
    with pytest.raises(SystemExit, match="6 runs of `tune` are missing"):
        compare_losses.main(["--stages", "main", "--losses", "nft", "crd", "--output_dir", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    compare_losses.main(["--quick", "--losses", "nft", "grpo", "--output_dir", str(tmp_path), "--jobs", "1"])
    folder = tmp_path / "report"
    text = (folder / "report.md").read_text()
    assert "## Learning rates" in text and "## Minus DiffusionNFT" in text and (folder / "marble.png").is_file()
    results = json.loads((folder / "losses.json").read_text())
    entries = [methods.loss_entry(name, loss) for loss in ("nft", "grpo") for name in methods.LOSS_AGGREGATIONS]
    assert list(results) == entries and all(len(own["ends"]) == 1 for own in results.values())
