# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Variants of the recipe: what they change, how many steps they have, the rule by hand, and the command."""

import sys

import pytest
from example_scripts import EXAMPLES

from trl_marble import MarbleConfig


sys.path.append(str(EXAMPLES / "benchmarks"))
import recipe_variants  # noqa: E402
from evidence import methods  # noqa: E402
from evidence.choosing import End, at_equal_kl, choose, second_strength  # noqa: E402
from evidence.costs import estimate_passes  # noqa: E402
from evidence.runs import LONG, LONG_RATE, QUICK_LONG, TUNING, Run  # noqa: E402


def run_of(entry):
    return Run(TUNING, entry, LONG_RATE, 0, LONG)


# ---- Entries ----


def test_a_variant_is_the_recipe_with_its_own_settings():
    recipe = run_of(methods.RECIPE)
    for variants in (methods.OLD_POLICIES, methods.SAMPLES):
        for name, (what, settings) in variants.items():
            run = run_of(f"{methods.RECIPE_METHOD}_{name}@{methods.RECIPE_STRENGTH}")
            assert run.settings == {**recipe.settings, **settings} and what in methods.find_method(run.method).label
            assert run.settings != recipe.settings, name
            MarbleConfig("variant", **run.settings)  # is a possible configuration


def test_variants_of_samples_have_as_many_steps_as_cost_what_the_recipe_costs():
    recipe = run_of(methods.RECIPE)
    steps = {}
    for entry in methods.SAMPLE_ENTRIES:
        run = run_of(entry)
        steps[entry.partition("@")[0].removeprefix(f"{methods.RECIPE_METHOD}_")] = run.steps
        total = run.steps * estimate_passes(run.settings)
        assert total == pytest.approx(recipe.steps * estimate_passes(recipe.settings), rel=0.02)
    assert steps[methods.RECIPE_METHOD] == 150 and steps["group4"] == steps["group16"] == 150
    assert steps["images64"] == 300 and steps["images256"] == 75
    assert steps["solver8"] < 150 < steps["solver4"]
    assert run_of(f"{methods.RECIPE_METHOD}_preset1@{methods.RECIPE_STRENGTH}").steps == 150


def test_the_cost_of_a_step_by_hand():
    settings = {
        "num_inference_steps": 5,
        "timestep_fraction": 0.8,
        "per_device_train_batch_size": 10,
        "gradient_accumulation_steps": 1,
        "old_policy_preset": 0,
        "beta": 0.1,
    }
    assert estimate_passes(settings) == 10 * (5 + 5 + 4 * 3)
    assert estimate_passes({**settings, "old_policy_preset": 1}) == 10 * (5 + 5 + 4 * 4)
    assert estimate_passes({**settings, "beta": 0.0}) == 10 * (5 + 5 + 4 * 2)
    assert estimate_passes({**settings, "regularizer_fraction": 0.25}) == 10 * (5 + 5 + 4 * 2.25)
    # Two updates share the samples, and the second of them finds an old policy that differs.
    assert estimate_passes({**settings, "num_iterations": 2}) == 10 * (5 + 4 * 3.5)
    assert estimate_passes({**settings, "steps_per_generation": 2}) == 10 * (10 + 4 * 3.5)


def test_the_plans_of_other_runs_have_no_steps_of_their_own():
    assert "steps" not in run_of(methods.RECIPE).plan() and "steps" in run_of(methods.SAMPLE_ENTRIES[1]).plan()


# ---- The rule ----


def test_a_run_is_repeated_at_another_strength_if_it_drifted_otherwise():
    assert second_strength("0.1", kl=0.065, wanted=0.07) is None
    assert second_strength("0.1", kl=0.105, wanted=0.07) == "0.15"
    assert second_strength("0.2", kl=0.035, wanted=0.07) == "0.1"
    assert second_strength("0.2", kl=70, wanted=0.07) == "200" and second_strength("0.1", 7e-6, 0.07) == "0.00001"


def test_ends_are_compared_at_the_recipes_kl():
    near, far = End(0.06, 0.4, 0.05, 0.5, 100.0), End(0.10, 0.5, 0.05, 0.7, 90.0)
    assert at_equal_kl([far, near], 0.07) == pytest.approx((0.07, 0.425, 0.05, 0.55, 100.0))
    assert at_equal_kl([far, near], 0.12) == far  # the nearer one as it is
    assert at_equal_kl([near], 0.07) == near


RECIPE = End(0.07, 0.40, 0.05, 0.5, 100.0)


def test_the_simplest_of_the_best_replaces_the_recipe():
    def variant(worst, seconds=100.0):
        return RECIPE._replace(worst=worst, cpu_seconds=seconds)

    assert choose(RECIPE, {"first": variant(0.44), "second": variant(0.3)}) is None  # within the error
    assert choose(RECIPE, {"first": variant(0.46), "second": variant(0.49), "third": variant(0.3)}) == "first"
    assert choose(RECIPE, {"first": variant(0.46), "second": variant(0.6)}) == "second"
    assert choose(RECIPE, {"first": variant(0.46), "second": variant(0.6, seconds=111.0)}) == "first"


# ---- The command ----


def test_variants_are_listed_and_nothing_is_run(tmp_path, capsys):
    recipe_variants.main(["--list", "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    for entry in (*methods.SAMPLE_ENTRIES, *methods.OLD_POLICY_ENTRIES, *methods.OLD_POLICY_COSINES):
        assert entry in text
    recipe_variants.main(["--dry_run", "--groups", "old_policy", "--output_dir", str(tmp_path)])
    assert "0 of 13 runs are finished" in capsys.readouterr().out  # six entries, two seeds, and the base
    assert not any(tmp_path.iterdir())


def test_samples_are_compared_in_a_table_with_the_chosen_one():
    variant, again = methods.SAMPLE_ENTRIES[1], f"{methods.SAMPLE_ENTRIES[1].partition('@')[0]}@0.9"
    ends = {
        methods.RECIPE: RECIPE,
        variant: End(0.10, 0.7, 0.05, 0.6, 105.0),
        again: End(0.06, 0.5, 0.05, 0.5, None),
    }
    rows = recipe_variants.sample_table(ends).splitlines()
    assert rows[2].split(" | ")[1:] == ["1.00x", "0.070", "0.40 ± 0.05", "0.50 |"]
    assert rows[3].split(" | ")[1:] == ["–", "0.070", "0.55 ± 0.05", "0.53 |"] and "(chosen)" in rows[3]
    assert len(rows) == 4
    second = recipe_variants.second_runs(ends, LONG)
    # By the inverse of the drift.
    assert [run.method.partition("@")[2] for run in second][0] == f"{float(methods.RECIPE_STRENGTH) / 0.7:.2g}"


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    recipe_variants.main(["--quick", "--groups", "samples", "--output_dir", str(tmp_path), "--jobs", "1"])
    text = (tmp_path / "report" / "variants.md").read_text()
    assert "(chosen)" in text and methods.find_method(methods.SAMPLE_ENTRIES[1]).label in text
    run = Run(TUNING, methods.SAMPLE_ENTRIES[1], LONG_RATE, 0, QUICK_LONG)
    assert run.is_finished(tmp_path)
