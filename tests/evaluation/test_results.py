# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Means, errors and tables of results, and saving and loading them."""

import json
import math

import pandas as pd
import pytest
from evaluation_helpers import made_results
from rich.console import Console

from trl_marble.evaluation import EvaluationResults, clustered_mean


NAN = math.nan
NASTY = [
    "NA",
    "007",
    'says "hi, there"',
    "two\nlines",
    "carriage\r\nreturn",
    " spaces ",
    "<b>",
    "ελληνικά 🎨",
    "nan",
    "1e3",
]


def test_saved_results_are_loaded_again(tmp_path) -> None:
    prompts = [prompt for prompt in NASTY for _ in range(2)]
    values = [1 / 3 * k if k % 3 else NAN for k in range(20)]
    made = made_results(tmp_path, {"reader": values, "calm": [1e-12 * k for k in range(20)]}, prompt=prompts)
    made.table["tag"] = pd.Series(["007", "NA", None, "x"] * 5, dtype="object")
    made.save()
    found = EvaluationResults.load(tmp_path)
    pd.testing.assert_frame_equal(found.table, made.table, check_exact=True)
    assert found.table["prompt"].tolist() == prompts
    assert found.summary() == made.summary() and found.diversity() == made.diversity()
    assert (found.settings, found.failed, found.reward_names) == (made.settings, made.failed, made.reward_names)


def test_the_summary_is_standard_json(tmp_path) -> None:
    made_results(tmp_path, {"reader": [NAN, NAN], "calm": [0.25, 0.75]}).save()

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert content["rewards"]["reader"] == {"mean": None, "standard_error": None, "num_valid": 0}
    assert content["rewards"]["calm"] == {"mean": 0.5, "standard_error": None, "num_valid": 2}


def test_means_and_errors_are_over_prompts(tmp_path) -> None:
    made = made_results(tmp_path, {"calm": [1, 3, 4, 6, NAN, 8]})
    assert made.summary()["calm"] == clustered_mean(
        made.table["calm"].to_numpy(), made.table["prompt_index"].to_numpy()
    )


def test_rows_of_the_same_text_are_one_prompt(tmp_path) -> None:
    made = made_results(tmp_path, {"calm": [1, 3, 4, 6.0]}, prompt=["b", "b", "b", "b"])
    assert made.groups.tolist() == [0, 0, 0, 0] and math.isnan(made.summary()["calm"][1])


def test_averages_by_tag(tmp_path) -> None:
    tags = ["colors"] * 4 + [None] * 2
    made = made_results(tmp_path, {"calm": [1, 3, 4, 6, 8, 8], "reader": [NAN] * 4 + [1, 2]}, tag=tags)
    averages = made.averages("tag")
    assert list(averages) == ["tag", "reward", "mean", "standard_error", "num_images"]
    rows = averages.set_index(["tag", "reward"])
    assert rows.loc[("colors", "calm")].tolist() == [3.5, 1.5, 4]
    assert rows.loc[("colors", "reader"), "num_images"] == 0
    assert rows.loc[("(none)", "reader"), "mean"] == 1.5
    with pytest.raises(ValueError, match=r"no averages by 'source'; the prompt set has \['tag'\]"):
        made.averages("source")


def test_geneval_has_its_overall_score_the_mean_over_tasks(tmp_path) -> None:
    # colors 0.5 of four images of two prompts, counting 1, and a prompt that is of no task and not scored.
    tags = ["colors"] * 4 + ["counting"] * 4 + [None] * 2
    scores = [0, 0, 1, 1, 1, 1, 1, 1, NAN, NAN]
    made = made_results(tmp_path, {"GenEval": scores, "calm": list(range(10))}, tag=tags)
    assert made.geneval_overall() == {"GenEval": (0.75, pytest.approx(0.5 / 2))}
    # Of unequal tasks it is not the mean over images.
    made.table["tag"] = pd.Series(["colors"] * 2 + ["counting"] * 6 + [None] * 2, dtype="object")
    assert made.geneval_overall()["GenEval"][0] == pytest.approx((0 + 1) / 2) != made.summary()["GenEval"][0]
    assert math.isnan(made.geneval_overall()["GenEval"][1])  # of one prompt
    console = Console(width=100)
    with console.capture() as captured:
        console.print(made.to_table())
    assert "GenEval, overall (mean over tasks)" in captured.get() and "0.5000" in captured.get()
    made.save()
    assert json.loads((tmp_path / "evaluation.json").read_text())["geneval_overall"] == {
        "GenEval": {"mean": 0.5, "standard_error": None}
    }
    assert made_results(tmp_path / "untagged", {"GenEval": [1.0, 0.0]}).geneval_overall() == {}


def test_the_table_has_the_numbers_of_failed_images(tmp_path) -> None:
    made = made_results(tmp_path, {"calm": [1, 3, 4, 6], "reader": [NAN, NAN, NAN, 2]})
    console = Console(width=100)
    with console.capture() as captured:
        console.print(made.to_table())
    assert "3.500 ± 1.500" in captured.get() and "Failed" not in captured.get()
    made.failed["reader"] = 3
    with console.capture() as captured:
        console.print(made.to_table())
    assert "Failed" in captured.get() and "diversity within a prompt" in captured.get()


def test_refuses_folders_without_a_finished_evaluation(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="Pass the `output_dir` of one"):
        EvaluationResults.load(tmp_path)
    made_results(tmp_path / "out", {"calm": [1, 3, 4, 6]}).save()
    csv = tmp_path / "out" / "scores.csv"
    whole = csv.read_text()
    csv.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="has 3 images of 2 prompts, but .* has 4 of 2"):
        EvaluationResults.load(tmp_path / "out")
    csv.write_text(whole.replace("calm", "storm"))
    with pytest.raises(ValueError, match="has no column 'calm'"):
        EvaluationResults.load(tmp_path / "out")
    csv.write_text(whole)
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged: 'reward_names'"):
        EvaluationResults.load(tmp_path / "out")
