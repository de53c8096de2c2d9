# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which evaluation has the best worst reward, from logs that are written here."""

import math

import pytest

from trl_marble.evaluation import WorstGain, best_evaluation
from trl_marble.evaluation.worst_gain import reward_gains, worst_gain, worst_gains


def entry(step, std=0.1, **means):
    row = {"step": step}
    for name, mean in means.items():
        row |= {f"eval_rewards/{name}/mean": mean, f"eval_rewards/{name}/std": std}
    return row


HISTORY = [
    entry(0, a=0.5, b=0.2, held=0.9),
    {"step": 1, "loss": 1.0, "rewards/a/mean": 0.1},
    entry(20, a=0.53, b=0.22, held=0.1),
    {"step": 40, "eval_ocr_rewards/a/mean": 9.0},
    entry(40, a=0.54, b=0.25, held=0.1),
    entry(60, a=0.9, b=0.1, held=0.1),
    {"step": 60, "train_runtime": 1.0},
]


def test_the_best_evaluation_has_the_best_worst_reward_of_those_that_are_trained_on():
    found = worst_gains(HISTORY, ["a", "b"])
    assert [(each.step, each.reward) for each in found] == [(20, "b"), (40, "a"), (60, "b")]
    assert [each.gain for each in found] == pytest.approx([0.2, 0.4, -1.0])
    assert best_evaluation(HISTORY, ["a", "b"]) == found[1]
    assert best_evaluation(HISTORY, ["a"]).step == 60


def test_the_first_evaluation_is_never_the_best():
    fallen = [entry(0, a=0.5), entry(20, a=0.4), entry(40, a=0.45)]
    assert best_evaluation(fallen, ["a"]) == WorstGain(40, "a", pytest.approx(-0.5))
    for unmeasured in ([], fallen[:1], [{"step": 1, "loss": 0.0}]):
        assert best_evaluation(unmeasured, ["a"]) is None


def test_gains_are_in_standard_deviations_of_the_first_evaluations_images():
    first = entry(0, std=0.1, a=0.5) | entry(0, std=0.0, solved=1.0, never=0.0, same=1.0)
    now = entry(9, std=0.4, a=0.7, solved=0.8, never=0.0, same=1.0)
    gains = reward_gains(first, now, ["a", "solved", "never", "missing"])
    assert gains["a"] == pytest.approx(2.0)
    assert gains["solved"] == pytest.approx(-0.5)  # in those of the later images, as the first had none
    assert gains["never"] == 0 and math.isnan(gains["missing"])
    assert worst_gain(gains, 9) == WorstGain(9, "solved", gains["solved"])
    assert worst_gain({"missing": math.nan}, 9) is None
