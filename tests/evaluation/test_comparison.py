# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Changes, wins and composite scores of evaluations of the same images."""

import dataclasses
import json
import math

import pandas as pd
import pytest
from evaluation_helpers import made_results
from rich.console import Console

from trl_marble.evaluation import compare_evaluations, composite_scores


NAN = math.nan


@pytest.fixture
def before(tmp_path):
    rewards = {"calm": [0.0, 0, 0, 0, 1, 1], "reader": [0.5, NAN, 0.5, NAN, NAN, NAN]}
    return made_results(tmp_path / "before", rewards, tag=["colors"] * 4 + ["word"] * 2)


@pytest.fixture
def after(tmp_path):
    rewards = {"calm": [1.0, 1, 1, 0, 0, 3], "reader": [0.5, 0.75, 0.25, NAN, NAN, NAN]}
    made = made_results(tmp_path / "after", rewards, tag=["colors"] * 4 + ["word"] * 2, adapter="me/lora")
    return dataclasses.replace(made, prompt_diversity=[0.2, 0.15, 0.25])


def test_changes_wins_and_diversity(before, after) -> None:
    compared = compare_evaluations({"base": before, "ours": after})
    assert compared.baseline == "base" and compared.reward_names == ["calm", "reader"]
    # Differences 1 1 | 1 0 | -1 2: means of the prompts 1, 0.5, 0.5.
    mean, error = compared.changes["ours"]["calm"]
    assert mean == pytest.approx(2 / 3) and error == pytest.approx(1 / 6)
    wins = compared.win_rates["ours"]["calm"]
    assert (wins.wins, wins.ties, wins.losses, wins.prompts_up, wins.p_value) == (4, 1, 1, 3, 0.25)
    # Only pairs in which both images have a reward count.
    reader = compared.win_rates["ours"]["reader"]
    assert (reader.wins, reader.ties, reader.losses, reader.win_rate) == (0, 1, 1, 0.25)
    assert compared.changes["ours"]["reader"] == pytest.approx((-0.125, 0.125))
    assert compared.diversity["base"] == pytest.approx((0.25, 0))
    assert compared.diversity_changes["ours"][0] == pytest.approx(-0.05)


def test_composite_is_over_all_evaluations(before, after, tmp_path) -> None:
    third = made_results(tmp_path / "third", {"calm": [0.5] * 6, "reader": [1.0] * 6})
    compared = compare_evaluations({"base": before, "ours": after, "third": third})
    means = {
        name: {reward: results.summary()[reward][0] for reward in ("calm", "reader")}
        for name, results in compared.evaluations.items()
    }
    assert compared.composite == composite_scores(means)
    assert sum(compared.composite.values()) == pytest.approx(0)


def test_changes_by_tag(before, after) -> None:
    rows = (
        compare_evaluations({"base": before, "ours": after}).averages("tag").set_index(["evaluation", "tag", "reward"])
    )
    assert rows.loc[("ours", "colors", "calm")].tolist() == [0.75, 0.25, 4]
    assert rows.loc[("ours", "word", "reader"), "num_images"] == 0


def test_genevals_overall_score_is_compared_too(tmp_path) -> None:
    tags = ["colors"] * 4 + ["counting"] * 4
    base, ours = (
        made_results(tmp_path / name, {"GenEval": scores}, tag=tags)
        for name, scores in (("base", [0, 0, 0, 0, 1, 1, 1, 1]), ("ours", [1, 1, 0, 0, 1, 1, 1, 1]))
    )
    console = Console(width=120)
    with console.capture() as captured:
        console.print(compare_evaluations({"base": base, "ours": ours}).to_table())
    lines = captured.get().splitlines()
    place = next(place for place, line in enumerate(lines) if "GenEval, overall" in line)
    first, second = lines[place : place + 2]
    assert "0.5000" in first and "+0.2500 ± 0.2500" in second and "0.7500" in second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` is 0 in 'base' and 1 in 'other'"),
        ({"rewards": ["calm", "writer"]}, r"`rewards` is \['calm', 'reader'\] in 'base' and \['calm', 'writer'\]"),
        ({"prompt": list("abcdef")}, "prompt 0 is 'prompt 0' in 'base' and 'a' in 'other'"),
    ],
)
def test_refuses_evaluations_that_cannot_be_compared(before, tmp_path, change, message) -> None:
    other = made_results(tmp_path / "other", {"calm": [0.0] * 6, "reader": [0.0] * 6}, **change)
    with pytest.raises(ValueError, match=message):
        compare_evaluations({"base": before, "other": other})


def test_one_evaluation_is_not_a_comparison(before) -> None:
    with pytest.raises(ValueError, match="There are 1 evaluations; pass at least two"):
        compare_evaluations({"base": before})


def test_files(before, after, tmp_path) -> None:
    compared = compare_evaluations({"base": before, "ours": after}, tmp_path / "compared")
    assert {file.name for file in (tmp_path / "compared").iterdir()} == {
        "comparison.json",
        "comparison.csv",
        "contact_sheet.html",
    }
    frame = pd.read_csv(tmp_path / "compared" / "comparison.csv").set_index(["reward", "evaluation"])
    assert frame.loc[("calm", "ours"), "change"] == pytest.approx(2 / 3)
    assert frame.loc[("calm", "ours"), "p_value"] == 0.25
    assert math.isnan(frame.loc[("calm", "base"), "change"])
    content = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert content["baseline"] == "base" and content["composite"] == compared.composite
    assert content["evaluations"]["ours"]["adapter"] == "me/lora"
    assert content["rewards"]["calm"][0].keys() == {"evaluation", "mean", "standard_error"}
    assert content["rewards"]["calm"][1]["wins"] == 4
    with pytest.raises(ValueError, match="is the folder of the evaluation 'ours'"):
        compare_evaluations({"base": before, "ours": after}, after.folder)


def test_table(before, after) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(compare_evaluations({"base": before, "ours": after}).to_table())
    text = captured.get()
    assert "+0.6667 ± 0.1667" in text and "75.0%" in text and "0.250" in text
    assert "composite" in text and "…" not in text
