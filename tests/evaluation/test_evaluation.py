# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Means, standard errors and changes of evaluated rewards, against figures worked out by hand."""

import math

import pytest
import torch

from trl_marble.evaluation import Evaluation
from trl_marble.metrics import nan_aware_mean


NAN = math.nan


def evaluation(
    *rows: list[float], names: tuple[str, ...] = ("a", "b"), step: int = 0, groups: list[int] | None = None
) -> Evaluation:
    """Each image is of a prompt of its own where nothing else is said."""
    prompts = torch.arange(len(rows[0])) if groups is None else torch.tensor(groups)
    return Evaluation(step, list(names[: len(rows)]), torch.tensor(rows), prompts)


def test_mean_and_standard_error_by_hand() -> None:
    # Deviations from 2.5 are ±1.5 and ±0.5: variance 5 / 3, error sqrt(5 / 3 / 4).
    summary = evaluation([1, 2, 3, 4], [7, 7, 7, 7]).summary()
    assert list(summary) == ["a", "b"]
    assert summary["a"] == pytest.approx((2.5, math.sqrt(5 / 12)))
    assert summary["b"] == (7, 0)


def test_errors_are_taken_over_prompts() -> None:
    # Means of the prompts 2, 5 and 8: deviation 3, error 3 / sqrt(3). Of `b` two prompts have 2 and 1 valid images:
    # mean 4, sums of deviations -4 and 4, sqrt(2 / 1 * 32) / 3.
    rows = [1, 3, 4, 6, 8, 8.0], [1, 3, 8, NAN, NAN, NAN]
    summary = evaluation(*rows, groups=[0, 0, 1, 1, 2, 2]).summary()
    assert summary["a"] == pytest.approx((5, math.sqrt(3)))
    assert summary["b"] == pytest.approx((4, 8 / 3))


def test_more_images_of_the_same_prompts_do_not_make_a_change_certain() -> None:
    before, after = [0.1, 0.5, 0.9, 0.3], [0.4, 0.5, 1.3, 0.2]
    once = evaluation(after).change_since(evaluation(before))
    groups = [prompt for prompt in range(4) for _ in range(50)]
    many = [evaluation([row[prompt] for prompt in groups], groups=groups) for row in (before, after)]
    assert many[1].change_since(many[0])["a"] == pytest.approx(once["a"])


def test_images_that_a_reward_does_not_apply_to_do_not_count() -> None:
    assert evaluation([NAN, 1, NAN, 3]).summary()["a"] == pytest.approx((2, math.sqrt(2) / math.sqrt(2)))


def test_one_prompt_has_no_standard_error_and_no_image_has_no_mean() -> None:
    summary = evaluation([NAN, 5, 6], [NAN, NAN, NAN], groups=[0, 1, 1]).summary()
    assert summary["a"][0] == 5.5 and math.isnan(summary["a"][1])
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


def test_evaluations_of_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="images of other prompts"):
        evaluation([1, 2, 3], groups=[0, 0, 1]).change_since(evaluation([1, 2, 3], groups=[0, 1, 1]))


def test_mean_that_leaves_nan_out() -> None:
    assert nan_aware_mean([1.0, NAN, 3.0]) == 2
    assert math.isnan(nan_aware_mean([NAN, NAN]))
    assert math.isnan(nan_aware_mean([]))
