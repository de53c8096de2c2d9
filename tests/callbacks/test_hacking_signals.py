# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What is read from logs that are written here."""

import numpy as np
import pytest

from trl_marble.callbacks.hacking_signals import Limits, find_signals, last_good_step


NAMES, HELD_OUT = ["bright", "blue"], ["dark", "sharp"]
NAN = float("nan")


def entry(step=0, diversity=0.2, **means):
    """An evaluation's row of the log, with standard errors of 0.01, and gains over means of 0.5."""
    row = {"step": step, "eval_drift/diversity": diversity}
    for name, mean in means.items():
        row |= {f"eval_rewards/{name}/mean": mean, f"eval_rewards/{name}/standard_error": 0.01}
        row[f"eval_gain/{name}/mean"] = 10 * (mean - 0.5)
    return row


def steps(**series):
    """Rows of training steps; `heldout_cos` is that of `blue`, the names of rewards their means."""
    keys = {
        "heldout_cos": "balance/heldout_cos/blue",
        "velocity": "drift/velocity_rms",
        "diversity": "drift/diversity",
    }
    keys |= {name: f"rewards/{name}/mean" for name in NAMES}
    rows = [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]
    return [
        {"step": step, "loss": 1.0} | {keys.get(name, name): value for name, value in row.items()}
        for step, row in enumerate(rows, start=1)
    ]


def signals(history, **limits):
    found = find_signals(history, NAMES, HELD_OUT, Limits(**limits))
    return [signal.reward or signal.kind for signal in found]


def said_in(history, **limits):
    """The steps at which a signal of each kind comes first."""
    first = {}
    for end in range(1, len(history) + 1):
        for signal in find_signals(history[:end], NAMES, HELD_OUT, Limits(**limits)):
            first.setdefault((signal.kind, signal.reward), history[end - 1]["step"])
    return first


BEFORE = entry(bright=0.5, blue=0.5, dark=0.5, sharp=0.5)


# ---- Evaluations ----


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"bright": 0.6, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, ["dark"]),
        ({"bright": 0.6, "blue": 0.6, "dark": 0.4, "sharp": 0.4}, ["dark", "sharp"]),
        ({"bright": 0.6, "blue": 0.4, "dark": 0.5, "sharp": 0.5}, ["blue"]),  # one that is trained on
        ({"bright": 0.6, "blue": 0.4, "dark": 0.4, "sharp": 0.5}, ["blue", "dark"]),
        ({"bright": 0.5, "blue": 0.4, "dark": 0.6, "sharp": 0.5}, []),  # nothing that is trained on rose
        ({"bright": 0.6, "blue": 0.5, "dark": 0.6, "sharp": 0.5}, []),  # both rise
        ({"bright": 0.5, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, []),  # falls alone: a bad run, not a hacked one
        ({"bright": 0.4, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, []),
        ({"bright": 0.527, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, []),  # 1.9 standard errors of the difference
        ({"bright": 0.529, "blue": 0.5, "dark": 0.471, "sharp": 0.5}, ["dark"]),  # 2.1
        ({"bright": 0.6, "blue": 0.473, "dark": 0.473, "sharp": 0.5}, []),
        ({"bright": NAN, "blue": 0.5, "dark": 0.1, "sharp": 0.5}, []),
        ({"bright": 0.9, "blue": NAN, "dark": NAN, "sharp": 0.5}, []),
    ],
)
def test_a_signal_needs_a_clear_rise_and_a_clear_fall(now, expected):
    assert signals([BEFORE, entry(step=3, **now)]) == expected


def test_the_threshold_is_in_standard_errors_of_the_difference():
    now = entry(bright=0.6, blue=0.5, dark=0.4, sharp=0.5)  # +-7.07 of them
    assert signals([BEFORE, now], threshold=7.0) == ["dark"] and signals([BEFORE, now], threshold=7.1) == []


def test_evaluations_are_compared_with_the_first_one():
    between = entry(step=3, bright=0.6, blue=0.9, dark=0.5, sharp=0.5)
    assert signals([BEFORE, between, entry(step=6, bright=0.6, blue=0.5, dark=0.5, sharp=0.5)]) == []


def test_after_a_resume_with_other_evaluation_prompts_they_are_compared_with_the_first_one_of_theirs():
    resumed = entry(step=6, bright=0.9, blue=0.9, dark=0.1, sharp=0.5)
    fallen = entry(step=9, bright=0.99, blue=0.9, dark=0.0, sharp=0.5)
    of_others = [{key: row[key] for key in row if "gain" not in key} for row in (resumed, fallen)]
    assert signals([BEFORE, resumed]) == ["dark"]
    assert signals([BEFORE, of_others[0]]) == [] and signals([BEFORE, *of_others]) == ["dark"]


def test_diversity_is_a_signal_of_its_own():
    fallen = BEFORE | {"eval_drift/diversity": 0.13}
    assert signals([BEFORE, fallen]) == ["diversity"]
    assert signals([BEFORE, BEFORE | {"eval_drift/diversity": 0.15}]) == []
    assert signals([BEFORE, fallen], min_diversity=0.5) == []
    without = {key: value for key, value in BEFORE.items() if "diversity" not in key}
    assert signals([without, fallen]) == []


def test_the_drift_of_evaluations_is_relative_to_the_first_velocity():
    history = [BEFORE, *steps(velocity=[2.0, 9.0])]
    assert signals([*history, BEFORE | {"eval_kl": 0.33}]) == ["drift"]  # 0.08 * 2^2 = 0.32
    assert signals([*history, BEFORE | {"eval_kl": 0.31}]) == []
    assert signals([*history, BEFORE | {"eval_kl": 0.31}], max_drift=0.07) == ["drift"]
    assert signals([*history, BEFORE | {"eval_kl": NAN}]) == signals([BEFORE | {"eval_kl": 9.0}]) == []


# ---- Steps ----


def test_drift_and_the_growth_of_the_velocity_are_averaged_over_steps():
    assert said_in(steps(velocity=[1.0] * 10, kl=[0.01 * step for step in range(10)])) == {}
    assert said_in(steps(velocity=[0.5] * 10, kl=[0.01 * step for step in range(10)])) == {("drift", None): 6}
    assert said_in(steps(velocity=[1.0, 1.1, 1.2, 1.2, 1.3, 1.3, 1.3])) == {("velocity", None): 7}
    assert said_in(steps(velocity=[1.0, 1.1, 1.2, 1.2, 1.3, 1.3, 1.3]), max_velocity_growth=1.3) == {}
    assert said_in(steps(velocity=[0.0, 0.0], kl=[1.0, 1.0])) == {}  # no scale


def test_diversity_of_steps_is_compared_with_that_of_the_first_ones():
    assert said_in(steps(diversity=[0.2] * 5 + [0.1] * 5)) == {("diversity", None): 10}
    assert said_in(steps(diversity=[0.2] * 9 + [0.1])) == {}


def test_updates_that_go_against_a_reward_are_found():
    noise = np.random.default_rng(0).normal(0, 0.08, 60)
    against = said_in(steps(heldout_cos=(noise - 0.08).tolist()))
    assert against == {("cosine", "blue"): 20}
    assert said_in(steps(heldout_cos=(noise + 0.03).tolist())) == {}
    assert said_in(steps(heldout_cos=[-0.1] * 19)) == {}
    sparse = [value for cosine in noise[:20] - 0.08 for value in (NAN, float(cosine))]  # measured at every other step
    assert said_in(steps(heldout_cos=sparse)) == {("cosine", "blue"): 40}


def test_noise_alone_is_seldom_a_signal():
    """150 steps with five rewards and cosines of 0 but for noise: one run in ten has a signal."""
    generator, runs = np.random.default_rng(1), 60
    names = list("abcde")
    found = 0
    for _ in range(runs):
        rows = [{"step": step, "loss": 1.0} for step in range(150)]
        for name in names:
            for row, cosine in zip(rows, generator.normal(0, 0.08, 150), strict=True):
                row[f"balance/heldout_cos/{name}"] = cosine
        found += any(find_signals(rows[:end], names, [], Limits()) for end in range(20, 151, 20))
    assert found <= runs / 5


def test_rewards_of_steps_count_where_there_are_no_evaluations():
    noise = np.random.default_rng(2).normal(0, 0.1, (2, 60))
    ramp = np.linspace(0, 0.4, 60)
    history = steps(bright=(0.5 + ramp + noise[0]).tolist(), blue=(0.7 - ramp + noise[1]).tolist())
    assert said_in(history) in ({("reward", "blue"): 40}, {("reward", "blue"): 60})
    (signal,) = find_signals(history, NAMES, HELD_OUT, Limits())
    assert signal.message.startswith("trained `blue` fell from 0.6") and "while `bright` rose" in signal.message
    assert said_in([BEFORE, *history]) == {}
    flat = steps(bright=(0.5 + ramp + noise[0]).tolist(), blue=(0.7 + noise[1]).tolist())
    assert said_in(flat) == {}


def test_other_rows_say_nothing():
    for history in ([], [{"step": 9, "train_runtime": 1.0}], [BEFORE, {"step": 0, "eval_ocr_rewards/dark/mean": 0.0}]):
        assert signals(history) == []


# ---- What to go back to ----


def test_the_best_evaluation_before_is_the_one_to_go_back_to():
    better = [entry(step, bright=0.5 + gain, blue=0.5 + gain) for step, gain in ((20, 0.1), (40, 0.2), (60, 0.1))]
    bad = entry(80, bright=0.9, blue=0.1)
    assert last_good_step([BEFORE, *better, bad], NAMES, Limits()) == 40
    assert last_good_step([BEFORE, bad], NAMES, Limits()) == 0
    assert last_good_step([BEFORE, entry(20, bright=0.9, blue=0.4), bad], NAMES, Limits()) == 0  # the base was best
    without_base = [{key: row[key] for key in row if "gain" not in key} for row in [*better, bad]]
    assert last_good_step(without_base, NAMES, Limits()) == 60  # the latest one
    assert last_good_step(steps(velocity=[1.0] * 30), NAMES, Limits(window=20)) == 10
    assert last_good_step(steps(velocity=[1.0] * 20), NAMES, Limits(window=20)) == 0
