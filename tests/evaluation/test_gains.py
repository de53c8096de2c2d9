# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Joint gains, gains in standard deviations, and what a run had gained at a given KL."""

import dataclasses
import json
import math

import numpy as np
import pytest
from evaluation_helpers import made_results
from PIL import Image
from rich.console import Console

from trl_marble.evaluation import (
    EvaluationResults,
    clustered_mean,
    compare_evaluations,
    evaluations_table,
    gain_plot,
    gains_at_kl,
    gains_in_deviations,
    gains_table,
    interpolate_at_kl,
    joint_gain,
    plot_gains,
    run_gains,
)
from trl_marble.evaluation.gains import measure_gains, read_history


NAN = math.nan


def random_rewards(seed=0, prompts=40, images=3, missing=0.3):
    """Three rewards of images of several prompts; the third applies to some prompts only."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(prompts), images)
    before = random.normal(size=(3, len(groups)))
    after = before + random.normal(0.3, 1, size=before.shape) + np.repeat(random.normal(size=prompts), images)
    before[random.random(before.shape) < missing] = NAN
    after[random.random(before.shape) < missing] = NAN
    before[2, groups % 3 > 0] = NAN
    before[:, groups == 7] = NAN  # nothing applies
    return before, after, groups


def test_the_joint_gain_is_what_a_plain_loop_counts():
    before, after, groups = random_rewards()
    rose, fell = [], []
    for prompt in range(40):
        signs = set()
        for k in range(3):
            changes = [
                after[k, i] - before[k, i]
                for i in range(len(groups))
                if groups[i] == prompt and not math.isnan(before[k, i]) and not math.isnan(after[k, i])
            ]
            if changes:
                signs.add(np.sign(np.mean(changes)))
        if signs:
            rose.append(signs == {1})
            fell.append(signs == {-1})
    found = joint_gain(before, after, groups)
    assert found.num_prompts == len(rose) < 40
    assert (found.gain, found.fall) == (pytest.approx(np.mean(rose)), pytest.approx(np.mean(fell)))
    assert 0 < found.fall < found.gain < 1
    share, number = found.gain, found.num_prompts
    assert found.gain_error == pytest.approx(math.sqrt(share * (1 - share) / (number - 1)))
    order = np.random.default_rng(1).permutation(len(groups))
    assert joint_gain(before[:, order], after[:, order], groups[order]) == found
    swapped = joint_gain(after, before, groups)
    assert (swapped.gain, swapped.fall) == (found.fall, found.gain)


def test_a_reward_that_did_not_change_neither_rose_nor_fell():
    groups = np.array([0, 0, 1, 1])
    before = np.zeros((2, 4))
    after = np.array([[1.0, 1, 1, 1], [1, -1, 1, 1]])
    assert joint_gain(before, after, groups).gain == 0.5
    assert joint_gain(before, before, groups).gain == joint_gain(before, before, groups).fall == 0
    assert math.isnan(joint_gain(before * NAN, after, groups).gain)
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        joint_gain(before, after[:, :3], groups)


def test_gains_are_in_deviations_of_the_baseline_whatever_the_scale():
    before, after, groups = random_rewards()
    names = ("a", "b", "c")
    scaled = [
        gains_in_deviations(
            dict(zip(names, before * scale, strict=True)), dict(zip(names, after * scale, strict=True)), groups
        )
        for scale in (1.0, np.array([[1000.0], [0.01], [3.0]]))
    ]
    gains, worst, mean = scaled[0]
    for (name, gain), row, later in zip(gains.items(), before, after, strict=True):
        change, error = clustered_mean(later - row, groups)
        deviation = np.nanstd(row)
        assert gain == pytest.approx((change / deviation, error / deviation))
        assert scaled[1][0][name] == pytest.approx(gain)
    assert worst == min(gains.values()) and mean[0] == pytest.approx(np.mean([gain for gain, _ in gains.values()]))
    assert scaled[1][1] == pytest.approx(worst) and scaled[1][2] == pytest.approx(mean)


def test_the_error_of_the_mean_gain_knows_that_rewards_go_together():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 4)
    before, change = random.normal(size=200), random.normal(size=200)
    base = {"a": before, "b": before}
    _, _, same = gains_in_deviations(base, {"a": before + change, "b": before + change}, groups)
    gains, _, opposite = gains_in_deviations(base, {"a": before + change, "b": before - change}, groups)
    assert same[1] == pytest.approx(gains["a"][1]) and opposite == pytest.approx((0, 0), abs=1e-12)


def test_rewards_without_a_scale_or_an_image_are_not_measured():
    groups = np.array([0, 0, 1, 1])
    before = {"a": np.array([0.0, 1, 0, 1]), "constant": np.full(4, 0.1), "none": np.full(4, NAN)}
    after = {name: values + 1 for name, values in before.items()}
    gains, worst, mean = gains_in_deviations(before, after, groups)
    assert gains["a"][0] == 2 and worst[0] == mean[0] == 2
    assert math.isnan(gains["constant"][0]) and math.isnan(gains["none"][0])
    held_out = measure_gains(before, after, groups, (0.0, 0.0), held_out=["a"])
    assert held_out.gains["a"][0] == 2 and held_out.joint_gain[0] == 1  # that of `constant`
    assert math.isnan(held_out.worst[0]) and math.isnan(held_out.mean[0])


def test_held_out_rewards_have_a_gain_and_do_not_count():
    before, after, groups = random_rewards()
    first, second = (dict(zip("abc", values, strict=True)) for values in (before, after))
    alone = measure_gains({name: first[name] for name in "ac"}, second, groups, (0.1, 0.0))
    found = measure_gains(first, second, groups, (0.1, 0.0), held_out=["b"])
    assert found.gains == measure_gains(first, second, groups, (0.1, 0.0)).gains
    assert dataclasses.replace(found, gains={name: found.gains[name] for name in "ac"}) == alone


# ---- Runs ----


def history(kls=(0.0, 0.04, 0.1), **means):
    """The log of a run with an evaluation every ten steps, training rows between."""
    rows = []
    for place, kl in enumerate(kls):
        gains = {name: 2 * (values[place] - values[0]) for name, values in means.items()}
        pairs = {"kl": kl, "gain_worst": min(gains.values()), "gain_mean": float(np.mean(list(gains.values())))}
        pairs |= {"joint_gain": place / 4, "joint_fall": 0.1 * place}
        row = {"step": 10 * place} | {f"eval_{name}": value for name, value in pairs.items()}
        row |= {f"eval_{name}_standard_error": 0.08 for name in pairs}
        for name, values in means.items():
            row |= {f"eval_rewards/{name}/mean": values[place], f"eval_rewards/{name}/standard_error": 0.03}
            row |= {f"eval_gain/{name}/mean": gains[name], f"eval_gain/{name}/standard_error": 0.05}
        rows += [row, {"step": 10 * place + 1, "loss": 1.0, "kl": 9.0, "rewards/a/std": 1.0}]
    return rows


def test_a_run_is_a_curve_of_its_evaluations():
    points = run_gains(history(a=[0.5, 0.6, 0.8], b=[1.0, 1.1, 0.9]))
    assert [point.step for point in points] == [0, 10, 20]
    assert [point.kl for point in points] == [(0, 0.08), (0.04, 0.08), (0.1, 0.08)]
    assert points[2].gains == {"a": (pytest.approx(0.6), 0.05), "b": (pytest.approx(-0.2), 0.05)}
    assert points[2].worst == (pytest.approx(-0.2), 0.08) and points[2].mean == (pytest.approx(0.2), 0.08)
    assert points[2].joint_gain == (0.5, 0.08) and points[2].joint_fall == (0.2, 0.08)
    assert run_gains(history(a=[0.5, 0.6, 0.8])[2:]) == []  # nobody evaluated the base
    assert run_gains([{"step": 0, "eval_rewards/a/mean": 1.0}]) == []


def test_a_log_without_gains_needs_the_deviations():
    logged = run_gains(history(a=[0.5, 0.6, 0.8], b=[1.0, 1.1, 0.9]))
    rows = [
        {key: value for key, value in row.items() if "gain" not in key and "joint" not in key}
        for row in history(a=[0.5, 0.6, 0.8], b=[1.0, 1.1, 0.9])
    ]
    assert run_gains(rows) == []
    points = run_gains(rows, {"a": 0.5, "b": 0.5})
    for point, expected in zip(points, logged, strict=True):
        assert point.step == expected.step and point.kl[0] == expected.kl[0]
        assert point.worst[0] == pytest.approx(expected.worst[0])
        assert point.mean[0] == pytest.approx(expected.mean[0])
    assert points[0].worst == points[0].mean == (0, 0)
    assert points[2].gains["a"] == pytest.approx((0.6, math.hypot(0.06, 0.06))) and math.isnan(points[2].joint_gain[0])


def test_gains_at_a_kl_lie_between_two_evaluations():
    points = run_gains(history(a=[0.5, 0.6, 0.8], b=[1.0, 1.1, 0.9]))
    found = gains_at_kl(points, 0.07)
    assert found.kl[0] == 0.07 and found.step is None
    assert found.gains["a"][0] == pytest.approx(0.4) and found.gains["b"][0] == pytest.approx(0)
    assert found.worst[0] == pytest.approx((points[1].worst[0] + points[2].worst[0]) / 2)
    assert found.joint_gain[0] == pytest.approx(0.375)
    assert gains_at_kl(points, 0.04).mean == points[1].mean
    assert gains_at_kl(points, 0.11) is None and gains_at_kl([], 0.0) is None


@pytest.mark.parametrize(
    ("kls", "at", "expected"),
    [
        ([0, 1, 2], 0.5, 0.5),
        ([0, 1, 2], 2, 2),
        ([0, 1, 2], 0, 0),
        ([0, 1, 2], 2.1, None),
        ([0.5, 1], 0.4, None),
        ([0, 2, 1], 1.5, 1.5),  # the last time it came by
        ([0, 2, 1, 3], 1.5, 2.25),
        ([0, 1, 1, 2], 1, 2),
        ([0, NAN, 2], 1, None),
        ([], 1, None),
        ([1], 1, 0),
    ],
)
def test_interpolation_is_linear_in_kl(kls, at, expected):
    found = interpolate_at_kl(kls, range(len(kls)), at)
    assert found == (None if expected is None else pytest.approx(expected))


def test_interpolation_needs_a_value_for_each_kl():
    with pytest.raises(ValueError, match="2 values for 1 evaluations"):
        interpolate_at_kl([1], [1, 2], 1)


def test_histories_are_read_from_the_latest_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        content = {"log_history": [{"step": step, "loss": NAN}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(content))
    assert read_history(tmp_path)[0]["step"] == 10
    assert read_history(tmp_path / "checkpoint-9")[0]["step"] == 9
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_history(tmp_path / "nowhere")
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"loss": 1}]}')
    with pytest.raises(ValueError, match="is damaged"):
        read_history(tmp_path)


def show(renderable) -> str:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_pictures_and_tables_show_them(tmp_path):
    curves = {
        "sum": run_gains(history(a=[0.5, 0.6, 0.8], b=[1.0, 1.1, 0.9])),
        "_$other": run_gains(history(kls=(0, 0.02, 0.05), a=[0.5, 0.6, 0.7], b=[1.0, 1.1, 1.2])),
    }
    path = plot_gains(curves, tmp_path / "new" / "gains.png", at_kl=[0.05])
    assert Image.open(path).size[0] > 1000
    text = show(gains_table(curves, [0.05, 0.08]))
    assert "sum, step 20" in text and "-0.20 ± 0.08" in text and "50% ± 8%" in text
    assert "sum at KL 0.08" in text and "_$other at KL 0.08" in text and text.count("not reached") == 1
    with pytest.raises(ValueError, match="No evaluation has a KL"):
        plot_gains({"a": []}, path)


def test_many_runs_have_lines_of_their_own_and_a_legend_inside_of_the_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(gain_plot, "save_figure", lambda figure, path: drawn.append(figure))
    curves = {f"weights by progress, variant {i}": run_gains(history(a=[0.5, 0.6, 0.8])) for i in range(20)}
    plot_gains(curves, tmp_path / "gains.png")
    (figure,) = drawn
    figure.canvas.draw()
    (legend,) = figure.legends
    assert figure.bbox.width >= legend.get_window_extent().x1 and len(legend.get_texts()) == 20
    lines = figure.axes[0].get_lines()[:20]
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 20


def test_every_evaluation_of_a_run_is_a_row():
    points = run_gains(history(a=[0.5, 0.6, 0.8], b=[1.0, 1.1, 0.9]))
    lines = show(evaluations_table(points)).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [["10", "+0.20", "+0.20", "0.04"], ["20", "+0.60", "-0.20", "0.1"]]
    fallen = dataclasses.replace(points[-1], gains={"a": (-0.2, 0.05), "b": (0.2, 0.05), "c": (0.2, 0.15)})
    cells = [cell for column in evaluations_table([fallen]).columns[1:4] for cell in column.cells]
    assert [cell.style for cell in cells] == ["red", "green", ""]


# ---- Evaluations ----


def evaluation(folder, rewards, kl=None, base="b", pipeline="b", adapter=None) -> EvaluationResults:
    made = made_results(folder, rewards)
    made.settings.update(pipeline_digest=pipeline, base_digest=base, adapter_digest=adapter)
    if kl is not None:
        made.table["kl"] = kl
    made.save()
    return EvaluationResults.load(folder)


BASE = {"a": [0.0, 1, 0, 1, 0, 1], "b": [1.0, 3, 1, 3, NAN, NAN]}
OURS = {"a": [1.0, 1, 0, 2, 1, 1], "b": [2.0, 3, 1, 2, NAN, NAN]}


def test_comparisons_have_kl_and_joint_gain(tmp_path):
    base = evaluation(tmp_path / "base", BASE)
    kl = [0.01, 0.03, 0.02, 0.02, NAN, 0.05]
    ours = evaluation(tmp_path / "ours", OURS, kl, adapter="x")
    fused = evaluation(tmp_path / "fused", OURS, base="f", pipeline="f")
    assert ours.kl_to_base() == pytest.approx(clustered_mean(np.array(kl), np.array([0, 0, 1, 1, 2, 2])))
    compared = compare_evaluations({"base": base, "ours": ours, "fused": fused}, tmp_path / "out")
    points = compared.gains
    assert points["base"].kl == (0, 0) and points["base"].worst[0] == points["base"].joint_gain[0] == 0
    assert points["ours"].kl == ours.kl_to_base() and math.isnan(points["fused"].kl[0])
    assert points["ours"].gains["a"][0] == pytest.approx(1.0) and points["ours"].worst[0] == 0
    # Prompt 0: both rose; 1: a rose and b fell; 2: a rose, and b does not apply.
    assert points["ours"].joint_gain[0] == points["fused"].joint_gain[0] == pytest.approx(2 / 3)
    assert list(compared.measured_gains()) == ["base", "ours"]
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())["gains"]
    assert content["ours"]["joint_gain"]["mean"] == pytest.approx(2 / 3) and content["fused"]["kl"]["mean"] is None
    frame = compared.to_frame().set_index(["reward", "evaluation"])
    assert frame.loc[("a", "ours"), "gain"] == pytest.approx(1.0)
    assert frame.loc[("b", "ours"), "joint_gain"] == pytest.approx(2 / 3)
    assert math.isnan(frame.loc[("a", "base"), "gain"]) and frame.loc[("a", "base"), "kl"] == 0
    assert (tmp_path / "out" / "gain_against_kl.png").is_file()
    text = show(compared.to_gains_table())
    assert "67% ± 33%" in text and "not measured" in text and "base" not in text.splitlines()[4]


def test_kls_to_different_bases_are_not_compared(tmp_path):
    base = evaluation(tmp_path / "base", BASE)
    other = evaluation(tmp_path / "other", OURS, [0.1] * 6, base="c", pipeline="c", adapter="x")
    of_text_encoder = evaluation(tmp_path / "text", OURS, adapter="x")
    compared = compare_evaluations({"base": base, "other": other, "text": of_text_encoder}, tmp_path / "out")
    assert math.isnan(compared.gains["other"].kl[0]) and math.isnan(compared.gains["text"].kl[0])
    assert compared.measured_gains() == {} and not (tmp_path / "out" / "gain_against_kl.png").exists()
    # Of the same base, with the adapters before and after as baseline and other.
    first = evaluation(tmp_path / "first", BASE, [0.05] * 6, adapter="y")
    second = evaluation(tmp_path / "second", OURS, [0.1] * 6, adapter="x")
    compared = compare_evaluations({"first": first, "second": second, "base": base})
    assert [point.kl[0] for point in compared.gains.values()] == pytest.approx([0.05, 0.1, 0])
