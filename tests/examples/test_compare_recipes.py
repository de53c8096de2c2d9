# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The comparison of recipes: equal cost, equal KL, what the composites consist of, and the command to a report."""

import json
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from example_scripts import EXAMPLES
from PIL import Image
from trainer_helpers import small_config

from trl_marble import MarbleConfig
from trl_marble.evaluation import GainPoint
from trl_marble.evaluation.gains import measure_gains
from trl_marble.evaluation.plots import PALETTE


sys.path.append(str(EXAMPLES / "benchmarks"))
import compare_recipes  # noqa: E402
from compare_recipes import (  # noqa: E402
    CANDIDATES,
    NOT_TUNED,
    SCALE,
    Choice,
    choose,
    entries_of,
    finalists,
    tuning_runs,
)
from evidence import methods  # noqa: E402
from evidence.costs import estimate_passes  # noqa: E402
from evidence.parts import Merge, Part, Rescale  # noqa: E402
from evidence.prompt_errors import PromptGains, jackknife_error, leave_out_each_prompt, sum_by_prompt  # noqa: E402
from evidence.recipes_report import RecipeResult, _styles, bounds_table, difference_table, plot_recipes, recipe_table  # noqa: E402
from evidence.runs import MAIN, QUICK_KL, TUNING, Run, base_run  # noqa: E402
from evidence.worlds import WORLDS, World  # noqa: E402


SHAPEWORLD = WORLDS["shapeworld"]


def run_of(entry):
    return Run(MAIN, entry, 1.2e-3, 1, SCALE)


def passes_of(part, world):
    """What a part costs: an image is passed through the transformer by its own teachers only."""
    rewards, teachers = len(part.rewards), len(part.teachers)
    if not teachers:
        return part.steps * estimate_passes(part.settings, rewards)
    of_all = teachers - len(world.sources)
    sources = world.load_prompts("train")["source"]
    taught = of_all + sum(source in part.teachers for source in sources) / len(sources)
    own = {"num_lessons": of_all + 1, "num_teachers": teachers, "taught": taught / (of_all + 1)}
    return part.steps * estimate_passes(part.settings, 0, **own)


# ---- What is compared ----


@pytest.mark.parametrize("name", WORLDS)
def test_all_cost_the_same(name):
    world, scale = WORLDS[name], replace(SCALE, world=name)
    first = Run(MAIN, methods.FIRST_RECIPE, 1.2e-3, 1, scale)
    settings, num_prompts = first.settings, len(world.load_prompts("train"))
    # The base model's four images of each prompt, with their five solver steps, and what decoding and scoring costs.
    base_images = num_prompts * settings.get("progress_base_images", 4) * (5 + 5)
    budget = 150 * estimate_passes(settings, 5) + base_images
    alone = [methods.alone_entry(reward) for reward in world.rewards]
    names = set()
    not_tuned = [entry for own in NOT_TUNED.values() for entry in own]
    for entry in (*methods.RECIPE_ENTRIES, *methods.COMPOSITE_ENTRIES, *alone, *not_tuned):
        run = Run(MAIN, entry, 1.2e-3, 1, scale)
        names.add(run.name)
        parts = [part for part in run.parts if isinstance(part, Part)]
        by_progress = run.settings.get("multi_objective_aggregation") == "progress"
        cost = sum(passes_of(part, world) for part in parts) + (base_images if by_progress else 0)
        # A step is less than a hundredth; of several parts each is rounded.
        assert cost == pytest.approx(budget, rel=0.05 if methods.find_method(entry).composite else 0.005), entry
        for part in parts:
            MarbleConfig("compared", max_steps=part.steps, **part.settings)  # is a possible configuration
            assert set(part.rewards) <= set(world.rewards) and (part.rewards or part.teachers)
    assert len(names) == len(methods.RECIPE_ENTRIES) + len(methods.COMPOSITE_ENTRIES) + 5 + len(not_tuned)
    assert first.steps == 150 and first.name.startswith("" if name == "shapeworld" else name)


def test_worlds_have_folders_of_their_own():
    runs = [Run(MAIN, methods.FIRST_RECIPE, 1.2e-3, 1, replace(SCALE, world=name)) for name in WORLDS]
    assert len({run.name for run in runs} | {base_run(MAIN, run.scale).name for run in runs}) == 2 * len(WORLDS)


def test_all_aim_at_the_kl_or_are_limited_and_all_are_scaled_to_it():
    for entry in methods.RECIPE_ENTRIES:
        part, last = run_of(entry).parts
        assert part.settings["kl_target"] == 0.04 and part.rewards == SHAPEWORLD.rewards
        assert part.settings["old_policy_preset"] == ("published" in entry)
        assert last == Rescale("rescaled", part.name, 0.04, "test", images=48)
    for entry in methods.COMPOSITE_ENTRIES:
        *_, before, last = run_of(entry).parts
        assert last == Rescale("rescaled", before.name, 0.04, "test", images=48)
    part, last = run_of(methods.alone_entry("reader")).parts
    assert part.rewards == ("reader",) and part.source == "glyph" and last.kl == 0.04
    last = replace(run_of(methods.FIRST_RECIPE), phase=TUNING).parts[-1]
    assert (last.split, last.images) == ("train", 16)  # where and on how many images these are scored


def test_a_soup_is_the_mean_of_specialists_on_their_own_prompts():
    *parts, merge, _ = run_of("r_soup@0.2").parts
    assert [part.rewards for part in parts] == [(name,) for name in SHAPEWORLD.rewards]
    assert [part.source for part in parts] == ["compositional", "glyph", None, None, None]
    assert len({part.number for part in parts}) == 5 and {part.settings["beta"] for part in parts} == {0.2}
    assert merge == Merge("soup", {part.name: 0.2 for part in parts})


def test_mapreduce_begins_each_round_with_what_was_merged():
    parts = run_of("r_mapreduce@0.05").parts
    assert [part.on for part in parts if part.name.endswith("/calm")] == [
        (),
        ("round-1/merged",),
        ("round-1/merged", "round-2/merged"),
    ]
    assert parts[-2] == Merge("sum", {f"round-{number}/merged": 1.0 for number in (1, 2, 3)})
    assert len({part.number for part in parts if isinstance(part, Part)}) == 15


def test_a_student_has_teachers_of_its_prompts_and_no_rewards():
    for entry, aggregation in (("r_distilled", "sum_then_normalize"), ("r_distilled_balanced", "marble")):
        *teachers, student, _ = run_of(f"{entry}@0.05").parts
        assert student.teachers == {
            "compositional": "composition",
            "glyph": "reader",
            **{f"all:{name}": name for name in ("coverage", "centring", "calm")},
        }
        assert not student.rewards and student.settings["multi_objective_aggregation"] == aggregation
        assert student.settings["beta"] == 0 and "kl_target" not in student.settings
        own, theirs = passes_of(student, SHAPEWORLD), sum(passes_of(part, SHAPEWORLD) for part in teachers)
        assert own == pytest.approx(theirs, rel=0.05)


def test_three_settings_each_are_tried():
    runs = tuning_runs(list(CANDIDATES), SCALE)
    for name, own in runs.items():
        assert len({(run.method, run.learning_rate) for run in own}) == 3, name
        assert {run.phase for run in own} == {"tuning"} and {run.seed for run in own} == {0}
    assert {run.scale.steps for run in runs["r_gdpo"]} == {50} and {run.scale.steps for run in runs["r_soup"]} == {150}


def test_the_better_two_learning_rates_are_tried_with_the_whole_budget():
    def ends(runs, sums):
        return {
            run: GainPoint((0.04, 0), {}, worst=(0.1, 0), mean=(total - 0.1, 0), joint_gain=(0, 0))
            for run, total in zip(runs, sums, strict=True)
        }

    runs = tuning_runs(["r_gdpo", "r_soup"], SCALE)
    first = {"r_gdpo": ends(runs["r_gdpo"], (0.5, 0.7, 0.6)), "r_soup": ends(runs["r_soup"], (0.5, 0.4, 0.3))}
    second = finalists(first, SCALE)
    assert [run.learning_rate for run in second["r_gdpo"]] == [1.2e-3, 2.4e-3] and list(second) == ["r_gdpo"]
    assert {run.scale for run in second["r_gdpo"]} == {SCALE}
    choice = choose(first, {"r_gdpo": ends(second["r_gdpo"], (0.3, 0.4))})
    # What was best in short runs is not in long ones; and what had less of the budget is not compared.
    assert choice.settings == {"r_gdpo": ("r_gdpo@target0.04", 2.4e-3), "r_soup": ("r_soup@0.05", 1.2e-3)}
    assert choice.best == ["r_soup@0.05", "r_gdpo@target0.04"]
    marked = [line for line in choice.text.splitlines() if line.rstrip(" |").endswith("chosen")]
    assert len(marked) == 2 and "0.0024" in marked[1]
    titles = [line for line in choice.text.splitlines() if line.startswith("### ")]
    assert len(titles) == 2 and "First" in titles[0] and "Second" in titles[1]


def test_what_is_not_tuned_has_the_settings_of_another_and_differs_in_one():
    choice = Choice({"r_gdpo": ("r_gdpo@target0.04", 2.4e-3), "r_marble": ("r_marble@target0.04", 6e-4)}, [], "")
    entries = entries_of(choice)
    assert entries[:2] == list(choice.settings.values()) and entries[2:] == [("r_marble_group@target0.04", 6e-4)]
    marble, group = (run_of(f"{name}@target0.04").settings for name in ("r_marble", "r_marble_group"))
    assert group == {**marble, "scale_rewards": "group"} != marble
    assert entries_of(Choice({"r_gdpo": choice.settings["r_gdpo"]}, [], "")) == entries[:1]


# ---- An adapter at a given KL ----


@pytest.mark.slow
def test_an_adapter_is_scaled_to_a_kl(tmp_path):
    from trl_marble import MarbleNFTTrainer
    from trl_marble.evaluation import EvaluationConfig, evaluate_pipeline

    args = small_config(tmp_path / "part", max_steps=4, learning_rate=3e-3, beta=0.0)
    trainer = MarbleNFTTrainer(
        SHAPEWORLD.load_pipeline(),
        SHAPEWORLD.reward_funcs()[-1],
        args=args,
        train_dataset=SHAPEWORLD.load_prompts("train"),
    )
    trainer.train()
    trainer.save_model()
    Rescale("scaled", "part", 0.01, "train", images=4, prompts=3, steps=2).write(tmp_path, SHAPEWORLD)
    pipeline = SHAPEWORLD.load_pipeline()
    pipeline.load_lora_weights(tmp_path / "scaled")
    chosen = SHAPEWORLD.some_prompts("train", 3)
    assert Counter(chosen["source"]) == {"compositional": 3, "glyph": 3, "free": 3}
    config = EvaluationConfig(str(tmp_path / "eval"), num_generations=4, num_inference_steps=2)
    kl, _ = evaluate_pipeline(pipeline, SHAPEWORLD.reward_funcs()[-1:], chosen, config).kl_to_base()
    assert kl == pytest.approx(0.01, rel=0.02)
    content = json.loads((tmp_path / "scaled" / "rescaled.json").read_text())
    assert content["factor"] > 0


# ---- The report ----


def result(label, worst, mean, passes, calm=0.2):
    ends = {
        seed: GainPoint(
            kl=(0.04, 0.001),
            gains={"calm": (calm + 0.1 * seed, 0.1), "reader": (mean, 0.1)},
            worst=(worst + 0.1 * seed, 0.1),
            mean=(mean, 0.1),
            joint_gain=(0.5, 0.1),
        )
        for seed in (1, 2)
    }
    # Four prompts of two images each, of which two prompts have `reader`.
    totals = np.array([[0.2, 0.6, 0.4, 0.8], [mean, 3 * mean, 0.0, 0.0]])
    prompts = PromptGains(totals, np.array([[2, 2, 2, 2], [2, 2, 0, 0]]))
    return RecipeResult(
        label, ends, [0.9, 1.0], [10.0, 12.0], [passes, passes], [1.0, 1.2], dict.fromkeys((1, 2), prompts), 150
    )


def test_errors_over_prompts_are_those_of_a_mean_and_know_that_another_reward_may_be_the_worst():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 4)
    before = {name: generator.normal(size=24) for name in ("a", "b")}
    before["b"][groups > 3] = np.nan  # applies to four of the prompts
    after = {name: values + generator.normal(1.0, 0.5, size=24) for name, values in before.items()}
    sums = sum_by_prompt(before, after, groups)
    point = measure_gains(before, after, groups, (0.04, 0.0))
    gains = sums.totals.sum(axis=1) / sums.counts.sum(axis=1)
    assert dict(zip(before, gains, strict=True)) == pytest.approx(
        {key: gain for key, (gain, _) in point.gains.items()}
    )
    only = PromptGains(sums.totals[:1], sums.counts[:1])
    for error in map(jackknife_error, leave_out_each_prompt([only, only])):
        assert error == pytest.approx(point.gains["a"][1])
    # By hand: two prompts, and without one of them the other reward is the worst.
    by_hand = PromptGains(np.array([[1.0, 3.0], [4.0, 0.5]]), np.ones((2, 2)))
    left_out = leave_out_each_prompt([by_hand])
    assert left_out.tolist() == [[0.5, 1.0], [1.75, 2.5]]
    assert jackknife_error(left_out[0]) == pytest.approx(0.25)
    lonely = PromptGains(np.array([[1.0, 3.0], [4.0, 0.0]]), np.array([[1, 1], [1, 0]]))
    assert np.isnan(leave_out_each_prompt([lonely])[0]).tolist() == [True, False]


def test_tables_by_hand(tmp_path):
    first, other = result("ours", 0.2, 0.5, 100), result("theirs", 0.1, 0.6, 90)
    results = {methods.FIRST_RECIPE: first, "r_gdpo@target0.04": other}
    text = recipe_table(results, ("calm", "reader"))
    row = next(line for line in text.splitlines() if line.startswith("| theirs"))
    cells = [cell.strip() for cell in row.split("|")]
    # The worst is `calm`, whose means by prompt are .1, .3, .2 and .4.
    assert cells[2:5] == ["2", "150", "0.040 ± 0.000"]
    assert cells[5] == "0.25 ± 0.05 / 0.06" and cells[6].startswith("0.60 ± 0.00 / ")
    assert row.rstrip(" |").endswith("0.95 | 1.10 | 0.90 | 1.00")
    line = difference_table(results, methods.FIRST_RECIPE).splitlines()[-1]
    cells = [cell.strip() for cell in line.split("|")]
    # `calm` is the same for both, on every prompt.
    assert cells[1:4] == ["theirs", "2", "0.100 ± 0.000 / 0.000"] and cells[4].startswith("-0.100 ± 0.000 / ")
    bounds = {"calm": result("calm alone", 0, 0, 1, calm=0.55), "reader": result("reader alone", 0, 1.0, 1)}
    assert bounds_table(results, bounds, ("calm", "reader")).splitlines()[-1].split("|")[2:6] == [
        " 0.50 ",
        " 0.60 ",
        " 0.55 ",
        " 0.50 (calm) ",
    ]
    assert bounds_table(results, {}, ("calm", "reader")) == ""
    assert height_of(results, tmp_path / "balanced.png") < height_of(
        {**results, "r_soup@0.2": other}, tmp_path / "all.png"
    )


def height_of(results, path):
    """Of the picture for two worlds."""
    plot_recipes({"one": results, "another": results}, path)
    assert path.stat().st_size > 10_000
    with Image.open(path) as picture:
        return picture.height


def test_no_two_entries_look_the_same():
    entries = [*methods.RECIPE_ENTRIES, *(entry for own in NOT_TUNED.values() for entry in own)]
    assert len(set(_styles(entries).values())) == len(entries) > len(PALETTE)


def test_nothing_is_run_without_settings(tmp_path, capsys):
    names = ["r_progress", "r_soup"]
    compare_recipes.main(["--dry_run", "--methods", *names, "--output_dir", str(tmp_path)])
    # Three runs each, and the base.
    assert "0 of 7 runs are finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="6 runs of `tune` are missing"):
        compare_recipes.main(["--stages", "main", "--methods", *names, "--output_dir", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    names = ["r_progress", "r_published", "r_mapreduce", "r_distilled_balanced"]
    compare_recipes.main(["--quick", "--methods", *names, "--output_dir", str(tmp_path), "--jobs", "1"])
    assert (tmp_path / "report" / "recipes.png").is_file()
    for world in WORLDS:
        folder = tmp_path / "report" / world
        text = (folder / "report.md").read_text()
        assert "MapReduce LoRA" in text
        with Image.open(folder / "images.png") as picture:
            assert min(picture.size) > 400
        assert "## Best in tuning, " in text and "## Second in tuning, " in text and ", minus each other" in text
        assert ("## Held-out networks" in text) == (world == "emojiworld")
        content = json.loads((folder / "recipes.json").read_text())
        assert len(content["results"]) == 4 and all(own["passes"][0] > 0 for own in content["results"].values())
        kls = [own["ends"]["1"]["kl"]["mean"] for own in content["results"].values()]
        assert kls == pytest.approx([QUICK_KL] * 4, rel=0.025)  # of the images that are scored


def test_a_world_is_asked_for_its_own_parts():
    assert isinstance(SHAPEWORLD, World) and set(SHAPEWORLD.rewards_by_name()) == set(SHAPEWORLD.rewards)
    assert set(SHAPEWORLD.sources) < set(SHAPEWORLD.rewards)
    assert set(SHAPEWORLD.sources.values()) <= set(SHAPEWORLD.load_prompts("train")["source"])
