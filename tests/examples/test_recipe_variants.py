# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Variants of the recipe: what they change, how many steps they have, and the command."""

import sys

import pytest
from example_scripts import EXAMPLES

from trl_marble import MarbleConfig


sys.path.append(str(EXAMPLES / "benchmarks"))
import recipe_variants  # noqa: E402
from evidence import methods  # noqa: E402
from evidence.costs import estimate_passes  # noqa: E402
from evidence.runs import LONG, LONG_RATE, MAIN, QUICK_LONG, TUNING, Run  # noqa: E402


def run_of(entry):
    return Run(TUNING, entry, LONG_RATE, 0, LONG)


# ---- Entries ----


@pytest.mark.parametrize(
    ("method", "variants"),
    [(methods.RECIPE_METHOD, methods.SAMPLES), (f"{methods.RECIPE_METHOD}_demo", methods.OLD_POLICIES)],
)
def test_a_variant_is_the_recipe_with_its_own_settings(method, variants):
    recipe = run_of(f"{method}@{methods.RECIPE_STRENGTH}")
    for name, (what, settings) in variants.items():
        run = run_of(f"{method}_{name}@{methods.RECIPE_STRENGTH}")
        assert run.settings == {**recipe.settings, **settings} and what in methods.find_method(run.method).label
        assert run.settings != recipe.settings, name
        MarbleConfig("variant", **run.settings)  # is a possible configuration


def test_without_a_kl_there_is_no_part_of_it():
    for entry in methods.OLD_POLICY_NO_KL:
        settings = run_of(entry).settings
        assert settings["beta"] == 0 and "regularizer_fraction" not in settings


def test_variants_of_samples_have_as_many_steps_as_cost_what_the_recipe_costs():
    recipe = run_of(methods.RECIPE)
    steps = {}
    for entry in methods.SAMPLE_ENTRIES:
        run = run_of(entry)
        steps[entry.partition("@")[0].removeprefix(f"{methods.RECIPE_METHOD}_")] = run.steps
        total = run.steps * estimate_passes(run.settings, 5)
        assert total == pytest.approx(recipe.steps * estimate_passes(recipe.settings, 5), rel=0.02)
    assert steps[methods.RECIPE_METHOD] == 150 and steps["group4"] == steps["group16"] == 150
    assert steps["images64"] == 300 and steps["images32"] == 600
    assert steps["solver8"] < 150 < steps["solver4"]
    assert run_of(methods.DEMO_RECIPE).steps == 150


def test_the_cost_of_a_step_by_hand():
    settings = {
        "num_inference_steps": 5,
        "timestep_fraction": 0.8,
        "per_device_train_batch_size": 10,
        "num_generations": 5,
        "gradient_accumulation_steps": 1,
        "old_policy_preset": 0,
        "beta": 0.1,
        "multi_objective_aggregation": "progress",
        "max_steps": 100,
        "regularizer_fraction": 1.0,
    }
    assert estimate_passes(settings, 5) == 10 * (5 + 5 + 4 * 3)
    # In all steps but the first the old policy is another one.
    assert estimate_passes({**settings, "old_policy_preset": 1}, 5) == 10 * (5 + 5 + 4 * (4 - 0.01))
    assert estimate_passes({**settings, "beta": 0.0, "regularizer_fraction": 0.25}, 5) == 10 * (5 + 5 + 4 * 2)
    assert estimate_passes({**settings, "regularizer_fraction": 0.25}, 5) == 10 * (5 + 5 + 4 * 2.25)
    # Two updates share the samples, and the second of them finds an old policy that differs.
    assert estimate_passes({**settings, "num_iterations": 2}, 5) == 10 * (5 + 4 * 3.5)
    assert estimate_passes({**settings, "steps_per_generation": 2}, 5) == 10 * (10 + 4 * 3.5)


def test_the_plans_of_other_runs_have_no_steps_of_their_own():
    assert "steps" not in run_of(methods.RECIPE).plan() and "steps" in run_of(methods.SAMPLE_ENTRIES[1]).plan()


# ---- The command ----


def test_variants_are_listed_and_nothing_is_run(tmp_path, capsys):
    recipe_variants.main(["--list", "--output_dir", str(tmp_path)])
    text = capsys.readouterr().out
    for entry in (*methods.OLD_POLICY_ENTRIES, *methods.OLD_POLICY_NO_KL, *methods.OLD_POLICY_COSINES):
        assert entry in text
    recipe_variants.main(["--dry_run", "--groups", "old_policy", "--output_dir", str(tmp_path)])
    assert "0 of 10 runs are finished" in capsys.readouterr().out  # three entries, three seeds, and the base
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    recipe_variants.main(["--quick", "--groups", "no_kl", "--output_dir", str(tmp_path), "--jobs", "1"])
    text = (tmp_path / "report" / "variants.md").read_text()
    assert "The same without a KL" in text and methods.find_method(methods.OLD_POLICY_NO_KL[1]).label in text
    run = Run(MAIN, methods.OLD_POLICY_NO_KL[1], LONG_RATE, 1, QUICK_LONG)
    assert run.is_finished(tmp_path)
