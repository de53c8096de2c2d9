# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which evaluation has the best worst reward, from logs that are written here."""

import math

from trl_marble.evaluation import WorstGain, best_evaluation
from trl_marble.evaluation.worst_gain import worst_gains


def entry(step, prefix="eval", **gains):
    return {"step": step} | {f"{prefix}_gain/{name}/mean": gain for name, gain in gains.items()}


HISTORY = [
    entry(0, a=0.0, b=0.0, held=0.0),
    {"step": 1, "loss": 1.0, "rewards/a/mean": 0.1},
    entry(20, a=0.3, b=0.2, held=-0.8),
    entry(40, prefix="eval_ocr", a=9.0),
    entry(40, a=0.4, b=0.5, held=-0.8),
    entry(60, a=4.0, b=-1.0, held=-0.8),
    {"step": 60, "train_runtime": 1.0},
]


def test_the_best_evaluation_has_the_best_worst_reward_of_those_that_are_trained_on():
    assert worst_gains(HISTORY, ["a", "b"]) == [
        WorstGain(20, "b", 0.2),
        WorstGain(40, "a", 0.4),
        WorstGain(60, "b", -1),
    ]
    assert best_evaluation(HISTORY, ["a", "b"]) == WorstGain(40, "a", 0.4)
    assert best_evaluation(HISTORY, ["a"]).step == 60


def test_the_base_is_never_the_best_and_what_was_not_measured_takes_no_part():
    fallen = [entry(0, a=0.0), entry(20, a=-1.0, constant=math.nan), entry(40, a=-0.5, constant=math.nan)]
    assert best_evaluation(fallen, ["a", "constant", "missing"]) == WorstGain(40, "a", -0.5)
    assert best_evaluation(fallen, ["constant"]) is best_evaluation(fallen[:1], ["a"]) is None
