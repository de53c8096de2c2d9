# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The long runs: entries and figures by hand, ways to limit the drift, and the command from nothing to a report."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES

from trl_marble import MarbleConfig
from trl_marble.cli.demo import DEMO_SETTINGS
from trl_marble.evaluation import GainPoint
from trl_marble.losses import FrozenVelocities, StepCounts


sys.path.append(str(EXAMPLES / "benchmarks"))
import long_runs  # noqa: E402
from evidence import drift, long_report, methods  # noqa: E402
from evidence.long_report import LongResult  # noqa: E402
from evidence.runs import LONG, LONG_RATE, MAIN, QUICK_LONG, Run  # noqa: E402


NAN = math.nan


# ---- Entries ----


def test_an_entry_is_a_method_and_a_strength():
    method = methods.find_method("marble@0.2")
    assert method.settings["beta"] == 0.2 and method.drift is None and method.label == "MARBLE, N = 1, beta 0.2"
    held = methods.find_method("weighted_sum@target0.06")
    assert held.drift is None and (held.settings["beta"], held.settings["kl_target"]) == (0.5, 0.06)
    moved = methods.find_method("weighted_sum@move0.05")
    assert moved.drift == ("move", 0.05) and moved.settings["beta"] == 0.1
    with pytest.raises(ValueError, match="`hold`"):
        methods.find_method("weighted_sum@hold0.06")
    assert methods.find_method("gdpo@lag0.1").settings["old_policy_preset"] == 1
    assert methods.find_method("gdpo@average0.1").settings["weight_ema_decay"] == 0.98
    off = methods.find_method("weighted_sum_x10@0.1")
    assert off.settings["reward_weights"] == [1, 1, 1, 1, 10]
    assert methods.find_method("specialist_calm@0.1").rewards == ("calm",)


@pytest.mark.parametrize("entry", ["marble", "nothing@0.1", "marble@", "marble@soon"])
def test_what_is_no_entry_is_said_before_anything_is_run(entry, capsys):
    with pytest.raises(SystemExit):
        long_runs.parse_args(["--entries", entry])
    assert "<method>@<strength>" in capsys.readouterr().err


def test_every_entry_has_its_settings():
    for entry in (*methods.LONG_MAIN, *methods.LONG_ONCE, *methods.LONG_TUNING):
        plan = Run(MAIN, entry, 1.2e-3, 1, LONG).plan()
        assert plan["settings"]["num_inference_steps"] == 5 and plan["scale"]["steps"] == 150
        json.dumps(plan)


def test_the_demo_is_a_long_run_with_its_own_samples():
    demo = MarbleConfig("demo", **DEMO_SETTINGS)
    run = Run(MAIN, methods.DEMO_RECIPE, LONG_RATE, 1, LONG)
    settings = run.plan()["settings"] | {"learning_rate": run.learning_rate, "num_generations_eval": run.scale.images}
    assert settings.pop("rollout_batch_size") >= demo.per_device_train_batch_size  # the same images in one call
    assert {name: getattr(demo, name) for name in settings} == settings
    shared = [Run(MAIN, entry, LONG_RATE, 1, LONG).plan()["settings"] for entry in ("base", "gdpo@0.2")]
    own = {"beta": 0.2, "regularizer_fraction": 1.0, **methods.GDPO}
    assert shared[0] | own == shared[1] and shared[0]["beta"] == 0


def test_how_a_run_is_watched_is_no_part_of_its_plan():
    assert not {"curve_steps", "curve_images"} & Run(MAIN, "marble@0.1", 1.2e-3, 1, LONG).plan()["scale"].keys()


# ---- Figures ----


def point(step, kl, *gains):
    named = {name: (gain, 0.1) for name, gain in zip(methods.REWARDS, gains, strict=True)}
    return GainPoint((kl, 0.0), named, (min(gains), 0.1), (float(np.mean(gains)), 0.1), step=step)


def result(entry, curves):
    history = [
        {"step": step, "balance/cos/calm": 0.4, "balance/heldout_cos/calm": value, "balance/cos/reader": NAN}
        for step, value in enumerate((0.1, 0.3))
    ]
    return LongResult(
        entry=entry,
        seeds=list(range(1, 1 + len(curves))),
        curves=curves,
        ends=[curve[-1] for curve in curves],
        diversity=[0.9] * len(curves),
        histories=[history] * len(curves),
    )


BASE = point(0, 0.0, 0, 0, 0, 0, 0)
FIRST = [BASE, point(10, 0.04, 0.2, 0.1, -0.3, 0.2, 0.2), point(20, 0.08, 0.4, 0.3, 0.5, 0.4, 0.2)]
SECOND = [BASE, point(10, 0.02, 0.2, 0.1, 0.1, 0.2, 0.2), point(20, 0.06, 0.4, 0.3, 0.5, 0.4, 0.4)]


def test_the_lowest_gain_of_any_evaluation_after_the_first():
    assert result("marble@0.1", [FIRST, SECOND]).lowest == (-0.3, "coverage", 10)


def test_values_at_equal_kl_are_between_two_evaluations_and_of_all_seeds():
    found = result("marble@0.1", [FIRST, SECOND])
    worst = found.at_kl(0.06, lambda point: point.worst[0])
    assert worst.mean == pytest.approx(((-0.3 + 0.2) / 2 + 0.3) / 2)
    assert found.at_kl(0.07, lambda point: point.worst[0]) is None  # the second seed never drifted so far


def test_a_mean_curve_has_errors_over_seeds():
    mean = result("marble@0.1", [FIRST, SECOND]).mean_curve
    assert [each.step for each in mean] == [0, 10, 20]
    assert mean[1].kl == pytest.approx((0.03, 0.01)) and mean[1].gains["coverage"] == pytest.approx((-0.1, 0.2))


def test_tables_have_every_entry_and_fractions_of_what_a_reward_reaches_alone():
    alone = {
        f"specialist_{name}@0.1": result(f"specialist_{name}@0.1", [[BASE, point(20, 0.1, 1, 1, 1, 1, 0.4)]])
        for name in methods.REWARDS
    }
    results = {"marble@0.1": result("marble@0.1", [FIRST, SECOND]), **alone}
    table = long_report.end_table(results)
    row = next(line for line in table.splitlines() if line.startswith("| MARBLE"))
    # MARBLE's seeds end at a KL of .07, where the reader alone has .7.
    assert "-0.30 (coverage, 10)" in row and "0.43 (reader)" in row
    assert "calm alone" in table and table.count("\n") == 8
    assert long_report.bounds_table(results).splitlines()[2:] == [
        "| MARBLE, N = 1, beta 0.1 | 0.57 | 0.43 | 0.71 | 0.57 | 1.07 |"
    ]
    # They are known at any strength, but only with all bounds.
    stronger = {"marble@0.4": result("marble@0.4", [FIRST, SECOND]), **alone}
    assert "0.43" in long_report.bounds_table(stronger)
    # Of two strengths the one that reaches more counts.
    better = result("specialist_reader@0.2", [[BASE, point(20, 0.1, 0, 1.2, 0, 0, 0)]])
    assert "| 0.57 | 0.36 |" in long_report.bounds_table({**stronger, "specialist_reader@0.2": better})
    stronger.pop("specialist_calm@0.1")
    assert long_report.bounds_table(stronger) == ""
    cosines = long_report.cosine_table({"marble@0.1": results["marble@0.1"]})
    assert "0.40 / 0.200 ± 0.058" in cosines  # four values of .1 and .3 over two seeds
    assert "–" in cosines  # `reader` was not measured
    assert "KL 0.06" in long_report.equal_kl_table(results)


def test_other_methods_end_beside_the_recipe_at_its_kl_between_their_strengths():
    recipe = [BASE, point(20, 0.06, 0.5, 0.4, 0.4, 0.4, 0.3)]
    weak = [BASE, point(20, 0.10, 0.5, 0.5, 0.5, 0.5, 0.1)]
    strong = [BASE, point(20, 0.02, 0.3, 0.3, 0.3, 0.3, 0.3)]
    far = [BASE, point(20, 2.0, 0.5, 0.5, 0.5, 0.5, -3.0)]
    results = {
        methods.RECIPE: result(methods.RECIPE, [recipe, recipe]),
        "gdpo@0.2": result("gdpo@0.2", [weak, weak]),
        "gdpo@0.4": result("gdpo@0.4", [strong, weak]),  # the second seed drifts too far
        "gdpo@0": result("gdpo@0", [far]),  # without a limit
        "weighted_sum_x10@0.1": result("weighted_sum_x10@0.1", [weak]),
        "weighted_sum@target0.06": result("weighted_sum@target0.06", [strong]),
        "specialist_calm@0.1": result("specialist_calm@0.1", [weak]),
    }
    table = long_report.beside_recipe_table(results)
    assert table.count("\n") == 5
    # Half way between the strengths of the first seed.
    assert "| GDPO, beta 0.2 to 0.4 | 1 (1 outside) | 0.060 | 0.20 ± – | 0.36 ± – | 0.10 ± – | 0.04 ± – |" in table
    # As they are.
    assert "| weighted sum, calm x 10, beta 0.1 | 1 | 0.100 | 0.10 ± – | 0.42 ± – | 0.20 ± – | -0.02 ± – |" in table
    assert "| weighted sum, target 0.06 | 1 | 0.020 | 0.30 ± – |" in table
    alone = long_report.beside_recipe_table({name: results[name] for name in (methods.RECIPE, "gdpo@0.2")})
    assert "| GDPO, beta 0.2 | 2 | 0.100 |" in alone


def test_a_run_shorter_than_the_early_step_has_no_change_since_then():
    assert result("marble@0.1", [FIRST]).least_rise is None
    early = point(long_report.EARLY_STEP, 0.04, 0.2, 0.1, 0.3, 0.2, 0.2)
    late = point(40, 0.04, 0.3, 0.0, 0.4, 0.3, 0.3)
    assert result("marble@0.1", [[BASE, early, late], [BASE, early, early]]).least_rise == (-0.1, "reader")


# ---- Ways to limit the drift ----


def loss_parts(kind, strength, **attributes):
    """The loss's gradient with respect to the velocity, of that part that limits the drift."""
    torch.manual_seed(0)
    loss = kind(nft_beta=0.1, advantage_clip=5.0, balance_on="loss", beta=strength)
    for name, value in attributes.items():
        object.__setattr__(loss, name, value)
    velocity, base = torch.randn(4, 2, 3, requires_grad=True), torch.randn(4, 2, 3)
    counts = StepCounts(torch.tensor([4]), torch.tensor(4), 8)
    shared = loss.shared(velocity, (), FrozenVelocities(None, base), torch.ones(4, dtype=torch.bool), counts)
    shared.sum().backward()
    return velocity, base


def test_a_hinge_acts_only_where_the_velocity_is_longer_than_the_bases():
    velocity, base = loss_parts(drift._NormLimited, 0.5)
    size, own = velocity.detach().flatten(1).square().mean(1), base.flatten(1).square().mean(1)
    expected = 0.5 / 8 * 2 * velocity.detach() / 6 * (size > own)[:, None, None]
    assert (size > own).any() and not (size > own).all()
    torch.testing.assert_close(velocity.grad, expected)


def test_a_gate_takes_the_mean_over_the_samples_inside():
    from types import SimpleNamespace

    trainer = SimpleNamespace(
        layout=SimpleNamespace(
            samples_of=lambda micro_batch: slice(0, 4), locate=lambda step: SimpleNamespace(micro_batch=0)
        ),
        _micro_step=0,
        _batch=SimpleNamespace(sample_ids=torch.tensor([3, 1, 0, 2])),
    )
    gated, base = loss_parts(drift._Gated, 0.5, trainer=trainer, gated={1, 2})
    plain = 0.5 / 8 * 2 / 6 * (gated.detach() - base)  # of the KL
    inside = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    torch.testing.assert_close(gated.grad, 2 * plain * inside)  # half of the samples


def test_rewards_disagree_where_their_ranks_differ():
    rewards = torch.tensor([[1.0, 2.0, 3.0, NAN], [10.0, 30.0, 20.0, 5.0]])
    # Ranks in [0, 1]: 0, 1/2, 1 and 1/3, 1, 2/3, 0.
    expected = [1 / 6, 1 / 4, 1 / 6, 0]
    assert drift.rank_disagreement(rewards).tolist() == pytest.approx(expected)


# ---- The command ----


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    arguments = ["--quick", "--output_dir", str(tmp_path), "--jobs", "2"]
    long_runs.main(arguments)
    report = tmp_path / "report"
    text = (report / "report.md").read_text()
    assert text.count("| weights by progress, beta 0.2 |") == 4
    content = json.loads((report / "results.json").read_text())
    assert set(content) == {"main", "tuning"} and len(content["main"]["progress@0.2"]["curves"][0]) == 3
    assert (report / "main_gain_against_kl.png").is_file() and (report / "main_steps.png").is_file()
    before = (tmp_path / Run(MAIN, "progress@0.2", 1.2e-3, 1, QUICK_LONG).name / "report.json").stat().st_mtime_ns
    long_runs.main(arguments)  # nothing is repeated
    after = (tmp_path / Run(MAIN, "progress@0.2", 1.2e-3, 1, QUICK_LONG).name / "report.json").stat().st_mtime_ns
    assert after == before
