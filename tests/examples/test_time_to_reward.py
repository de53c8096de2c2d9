# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Time to the same rewards: when a target is reached, ratios by hand, and the command from nothing to a report."""

import json
import math
import sys

import pytest
import torch
from example_scripts import EXAMPLES
from torch import nn

from trl_marble import MarbleConfig
from trl_marble.selftest.passes import count_passes


sys.path.append(str(EXAMPLES / "benchmarks"))
import time_to_reward  # noqa: E402
from evidence import methods  # noqa: E402
from evidence.costs import StepCost, StepCosts, read_costs, total_until  # noqa: E402
from evidence.parts import COSTS_FILE  # noqa: E402
from evidence.reaching import (  # noqa: E402
    Target,
    TimedCurve,
    compare_curves,
    known_bounds,
    place_reached,
    ratio_over_seeds,
    timed_curve,
    value_at,
)


# ---- Costs ----


class Halves(nn.Module):
    """Like a transformer: returns a tuple with one row for each image."""

    def __init__(self):
        super().__init__()
        self.transformer = self
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * self.weight,)


def test_passes_are_counted_forward_and_backward_and_by_images():
    model, x = Halves(), torch.ones(3, 2)
    with count_passes(model) as passes:
        with torch.no_grad():
            model(x)  # of a frozen policy
        velocity = model(x)[0]
        velocity.sum().backward(retain_graph=True)
        velocity.sum().backward()
        model(x[:1])  # attached, and not used
    model(x)
    assert (passes.forwards, passes.backwards) == (3, 2)
    assert (passes.images_forward, passes.images_backward) == (3 + 3 + 1, 3 + 3)


def test_a_resumed_run_counts_a_step_once(tmp_path):
    class State:
        global_step = 0

    def step(costs, number, calls):
        costs.on_step_begin(None, None, None, model=model)
        for _ in range(calls):
            model(torch.ones(2, 1))
        State.global_step = number
        costs.on_step_end(None, State, None)

    model, file = Halves().requires_grad_(False), tmp_path / COSTS_FILE
    first = StepCosts(file)
    step(first, 1, calls=1)
    model(torch.ones(2, 1))  # an evaluation
    step(first, 2, calls=5)
    step(StepCosts(file), 2, calls=3)  # from the checkpoint of step 1
    costs = read_costs(file)
    assert {number: cost.passes for number, cost in costs.items()} == {1: 2, 2: 6}
    assert total_until(costs, 1).passes == 2 and total_until(costs, 2).passes == 8
    assert total_until(costs, 2).cpu_seconds > total_until(costs, 1).cpu_seconds > 0


# ---- When a target is reached ----


def test_both_numbers_must_be_there_and_the_later_one_counts():
    means, worsts = [0.0, 0.2, 0.4, 0.5], [0.0, 0.05, 0.1, 0.3]
    # The mean at .3 half way to the third evaluation; the worst at .2 half way to the fourth.
    assert place_reached(means, worsts, Target(0.3, 0.2)) == pytest.approx(2.5)
    assert place_reached(means, worsts, Target(0.3, 0.05)) == pytest.approx(1.5)
    assert place_reached(means, worsts, Target(0.45, 0.1)) == pytest.approx(2.5)
    assert place_reached(means, worsts, Target(0.6, 0.0)) is None
    assert place_reached(means, worsts, Target(0.2, 0.05)) == pytest.approx(1.0)  # exactly at an evaluation


def test_a_single_evaluation_above_the_target_is_noise_except_at_the_end():
    worsts = [1.0] * 5
    assert place_reached([0.0, 0.4, 0.1, 0.3, 0.5], worsts, Target(0.2, 0.1)) == pytest.approx(2.5)
    assert place_reached([0.0, 0.4, 0.1, 0.1, 0.3], worsts, Target(0.2, 0.1)) == pytest.approx(3.5)
    assert place_reached([0.0, 0.4, 0.1, 0.1, 0.1], worsts, Target(0.2, 0.1)) is None
    assert place_reached([0.0, math.nan, 0.3, 0.3, 0.3], worsts, Target(0.2, 0.1)) == pytest.approx(2.0)


def test_a_target_that_the_base_has_is_reached_at_once():
    assert place_reached([0.0, 0.1], [0.0, 0.1], Target(-0.1, 0.0)) == 0.0


def test_costs_between_evaluations_are_linear():
    assert value_at([0.0, 10.0, 40.0], 1.25) == pytest.approx(17.5)
    assert value_at([0.0, 10.0, 40.0], 2.0) == 40.0


# ---- Ratios ----


def test_a_ratio_is_of_runs_of_the_same_seed_with_its_error_over_seeds():
    ratio = ratio_over_seeds([10.0, 30.0], [50.0, 60.0], [40.0, 60.0])
    assert ratio.estimate.mean == pytest.approx((0.25 + 0.5) / 2)
    assert ratio.estimate.seed_error == pytest.approx(0.125)  # two values .25 apart: .25 / sqrt(2) / sqrt(2)
    assert (ratio.reached, ratio.seeds) == (2, 2)


def test_a_seed_that_never_came_there_counts_with_its_whole_run():
    ratio = ratio_over_seeds([10.0, None], [50.0, 60.0], [40.0, 60.0])
    assert ratio.estimate.mean == pytest.approx((0.25 + 1.0) / 2) and ratio.reached == 1
    assert time_to_reward._over(ratio).startswith("over 0.6")
    with pytest.raises(ValueError, match="for every seed"):
        ratio_over_seeds([1.0], [1.0, 2.0], [1.0])


def curve(means, worsts, seconds):
    steps = list(range(0, 2 * len(means), 2))
    return TimedCurve(steps, seconds, [10 * own for own in seconds], means, worsts)


def test_a_method_is_timed_against_the_end_of_the_baseline():
    baseline = curve([0.0, 0.1, 0.2], [0.0, 0.2, 0.1], [0.0, 50.0, 100.0])
    quick = curve([0.0, 0.4, 0.5], [0.0, 0.2, 0.3], [0.0, 20.0, 40.0])
    ratios = compare_curves([quick, quick], [baseline, baseline])
    # The mean is .2, and the worst .1, half way to the first evaluation.
    assert ratios["cpu_seconds"].estimate.mean == pytest.approx(0.1) and ratios["passes"].estimate.mean == 0.1
    assert ratios["steps"].estimate.mean == pytest.approx(1 / 4) and ratios["steps"].estimate.seed_error == 0


def test_bounds_are_those_that_the_comparison_knows():
    bounds = known_bounds(json.loads(time_to_reward.RESULTS.read_text()))
    # Training on `composition` alone does not raise it by two standard errors.
    assert set(bounds) == {"reader", "coverage", "centring", "calm"}
    assert bounds["calm"] == pytest.approx(0.141, abs=0.001)


def test_a_curve_has_what_its_evaluations_had_cost():
    rows = [(0, 0.0, 0.4, 0.7), (2, 0.3, 0.45, 0.8), (3, 0.5, 0.5, 0.75)]
    history = [{"step": 1, "loss": 1.0}] + [
        {"step": step, "eval_gain_mean": gain, "eval_rewards/calm/mean": calm, "eval_rewards/reader/mean": reader}
        for step, gain, calm, reader in rows
    ]
    costs = {step: StepCost(10.0 + step, 70, 30) for step in (1, 2, 3)}
    found = timed_curve(history, costs, {"calm": 0.2, "reader": 0.1})
    assert found.steps == [0, 2, 3] and found.cpu_seconds == [0, 23.0, 36.0] and found.passes == [0, 200, 300]
    assert found.means == [0.0, 0.3, 0.5] and found.worsts == pytest.approx([0.0, 0.25, 0.5])
    assert found.end == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match=r"steps \[2\]"):
        timed_curve(history, {1: costs[1], 3: costs[3]}, {"calm": 0.2})


# ---- What is run ----


def test_baselines_have_the_settings_of_their_recipes():
    demo, paper = (methods.find_method(name) for name in ("demo_61ec878", "paper"))
    args = time_to_reward.parse_args([])
    plans = {run.method: run.plan() for run in time_to_reward.planned_runs(args)}
    assert len(plans) == 2 + len(methods.TIMED_ENTRIES)
    for plan in plans.values():
        MarbleConfig("timed", **plan["settings"])  # is a possible configuration
    settings = plans["demo_61ec878"]["settings"]
    assert (settings["num_inference_steps"], settings["timestep_fraction"]) == (8, 0.75)
    assert (settings["per_device_train_batch_size"], settings["num_generations"]) == (256, 16)
    assert settings["old_policy_preset"] == 1 and settings["beta"] == 0
    assert "multi_objective_aggregation" not in settings  # balanced at every step, the default
    own = {"balance_every": 10, "balance_on": "loss", "beta": 1e-4, "regularizer_fraction": 1.0}
    assert paper.settings == demo.settings | own
    assert plans["paper"]["scale"]["steps"] == 25
    recipe = plans[methods.DEMO_RECIPE]
    assert recipe["scale"]["steps"] == 75 and recipe["settings"]["num_inference_steps"] == 5
    awm = plans[f"awm_demo@{methods.AWM_STRENGTH}"]["settings"]
    assert awm.pop("policy_loss") == "awm" and awm.pop("beta") == pytest.approx(recipe["settings"]["beta"] / 5)
    assert awm == {name: value for name, value in recipe["settings"].items() if name != "beta"}


def test_tuning_has_a_seed_and_prompts_of_its_own():
    runs = time_to_reward.planned_runs(time_to_reward.parse_args(["--tuning"]))
    assert {(run.phase, run.seed) for run in runs} == {("tuning", 0)} and len({run.name for run in runs}) == len(runs)
    assert [run.method for run in runs if run.learning_rate > 1.2e-3] == list(methods.FAST_ENTRIES)
    label = time_to_reward.label_of(runs[-1])
    assert label.endswith("64 images a step, beta 0.2, learning rate 0.0024")
    assert {run.method for run in runs} == {"demo_61ec878", *methods.SAMPLE_ENTRIES}


@pytest.mark.parametrize("arguments", [["--entries", "nothing@1"], ["--seeds", "1", "1"], ["--jobs", "0"]])
def test_what_cannot_be_run_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        time_to_reward.parse_args(arguments)
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    arguments = ["--quick", "--output_dir", str(tmp_path), "--jobs", "1"]
    time_to_reward.main(arguments)
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("## Until what ") == 2 and "the demo at 61ec878 has after 3 steps" in text
    times = json.loads((tmp_path / "report" / "times.json").read_text())
    labels = [methods.find_method(name).label for name in (*methods.BASELINES, methods.DEMO_RECIPE)]
    assert list(times) == labels
    own = times[labels[2]]["1"]
    assert own["steps"] == [0, 2, 3] and own["cpu_seconds"][0] == 0 < own["cpu_seconds"][1] < own["cpu_seconds"][2]
    # 16 images, 3 solver steps, 2 timesteps: the old demo's first step is on-policy, the others have an old pass.
    assert times[labels[0]]["1"]["passes"] == [0, 16 * (2 * 3 + 4 + 8), 16 * (3 * 3 + 4 + 8 + 8)]
    time_to_reward.main(arguments)  # nothing is repeated, and the report is the same
    assert json.loads((tmp_path / "report" / "times.json").read_text()) == times
