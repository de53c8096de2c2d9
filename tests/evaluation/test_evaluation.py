# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Means, standard errors and changes of evaluated rewards, against figures worked out by hand."""

import math

import pytest
import torch

from trl_marble.evaluation import Evaluation
from trl_marble.evaluation.evaluation import nan_aware_mean


NAN = math.nan


def evaluation(*rows: list[float], names: tuple[str, ...] = ("a", "b"), step: int = 0) -> Evaluation:
    return Evaluation(step, list(names[: len(rows)]), torch.tensor(rows))


def test_mean_and_standard_error_by_hand() -> None:
    # Deviations from 2.5 are ±1.5 and ±0.5: variance 5 / 3, error sqrt(5 / 3 / 4).
    summary = evaluation([1, 2, 3, 4], [7, 7, 7, 7]).summary()
    assert list(summary) == ["a", "b"]
    assert summary["a"] == pytest.approx((2.5, math.sqrt(5 / 12)))
    assert summary["b"] == (7, 0)


def test_images_that_a_reward_does_not_apply_to_do_not_count() -> None:
    assert evaluation([NAN, 1, NAN, 3]).summary()["a"] == pytest.approx((2, math.sqrt(2) / math.sqrt(2)))


def test_one_image_has_no_standard_error_and_none_has_no_mean() -> None:
    summary = evaluation([NAN, 5], [NAN, NAN]).summary()
    assert summary["a"][0] == 5 and math.isnan(summary["a"][1])
    assert all(math.isnan(value) for value in summary["b"])


def test_small_differences_of_large_rewards_are_not_rounded_away() -> None:
    mean, error = evaluation([1e6, 1e6 + 0.5] * 50_000).summary()["a"]
    assert mean == pytest.approx(1e6 + 0.25, abs=1e-6)
    assert error == pytest.approx(0.25 / math.sqrt(100_000), rel=1e-4)


def test_change_is_paired_image_by_image() -> None:
    before = evaluation([1, 10, 100], [0, 1, NAN])
    after = evaluation([2, 12, 103], [NAN, 3, 4], step=5)
    change = after.change_since(before)
    # Differences 1, 2, 3 have deviation 1, however far the images are apart; of `b` only one image is valid in both.
    assert change["a"] == pytest.approx((2, 1 / math.sqrt(3)))
    assert change["b"][0] == 2 and math.isnan(change["b"][1])
    assert before.change_since(after)["a"][0] == -2


@pytest.mark.parametrize(
    "other", [evaluation([1, 2], [3, 4], names=("a", "c")), evaluation([1, 2, 3], [4, 5, 6]), evaluation([1, 2])]
)
def test_evaluations_of_other_rewards_or_images_are_not_compared(other) -> None:
    with pytest.raises(ValueError, match="Cannot compare rewards .*evaluate both on the same prompts"):
        evaluation([1, 2], [3, 4]).change_since(other)


def test_mean_that_leaves_nan_out() -> None:
    assert nan_aware_mean([1.0, NAN, 3.0]) == 2
    assert math.isnan(nan_aware_mean([NAN, NAN]))
    assert math.isnan(nan_aware_mean([]))
