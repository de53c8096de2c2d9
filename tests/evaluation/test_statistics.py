# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Standard errors over prompts, win counts and composite scores, against figures worked out by hand or otherwise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_marble.evaluation import clustered_mean, composite_scores, count_wins
from trl_marble.evaluation.statistics import number_prompts


NAN = math.nan


def test_error_of_equal_groups_is_that_of_their_means() -> None:
    # Means of the prompts 2, 5 and 8: deviation 3, error 3 / sqrt(3).
    mean, error = clustered_mean(np.array([1, 3, 4, 6, 8, 8.0]), np.array([0, 0, 1, 1, 2, 2]))
    assert mean == 5
    assert error == pytest.approx(3 / math.sqrt(3))


def test_prompts_weigh_as_many_images_as_are_valid() -> None:
    # Mean (1 + 3 + 8) / 3 = 4; residual sums (4 - 2 * 4) = -4 and 8 - 4 = 4; sqrt(2 / 1 * 32) / 3.
    mean, error = clustered_mean(np.array([1, 3, NAN, 8.0]), np.array([7, 7, 2, 2]))
    assert mean == 4
    assert error == pytest.approx(8 / 3)


def test_copies_of_an_image_do_not_make_the_mean_more_certain() -> None:
    values = np.array([0.1, 0.5, 0.9, 0.3])
    once = clustered_mean(values, np.arange(4))
    assert clustered_mean(np.repeat(values, 10), np.repeat(np.arange(4), 10)) == pytest.approx(once)
    assert clustered_mean(np.repeat(values, 10), np.arange(40))[1] < once[1] / 3


def test_error_is_the_spread_of_means_over_repeated_draws() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 4)
    draws = [
        clustered_mean(generator.normal(size=30)[groups] + generator.normal(size=120), groups) for _ in range(400)
    ]
    means, errors = np.array(draws).T
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(means.std(), rel=0.1)


@pytest.mark.parametrize("values", [[NAN, NAN], []])
def test_nothing_has_no_mean(values) -> None:
    assert all(math.isnan(figure) for figure in clustered_mean(np.array(values), np.arange(len(values))))


def test_one_prompt_has_no_error() -> None:
    mean, error = clustered_mean(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1]) * 0)
    assert mean == 3 and math.isnan(error)


def test_a_prompt_is_a_text_and_of_instructions_for_edits_a_row() -> None:
    prompts, rows = ["b", "b", "a", "b", "a"], [0, 0, 1, 2, 3]
    assert number_prompts(prompts, rows).tolist() == [0, 0, 1, 0, 1]
    assert number_prompts(prompts, rows, edits_images=True).tolist() == [0, 0, 1, 2, 3]


def test_values_and_groups_must_pair_up() -> None:
    with pytest.raises(ValueError, match="2 values for 3 groups"):
        clustered_mean(np.zeros(2), np.zeros(3))


def test_wins_are_counted_by_image_and_tested_by_prompt() -> None:
    before = np.array([0, 0, 0, 0, 1, 1, NAN, 5, 5.0])
    after = np.array([1, 1, 1, 0, 0, 2, 3, NAN, 5.0])
    counted = count_wins(before, after, np.array([0, 0, 1, 1, 2, 2, 3, 3, 3]))
    assert (counted.wins, counted.ties, counted.losses) == (4, 2, 1)
    assert counted.win_rate == pytest.approx(5 / 7)
    # Prompts 0 and 1 rose, prompt 2 fell and rose by the same, prompt 3 has only a tie.
    assert (counted.prompts_up, counted.prompts_down) == (2, 0)
    assert counted.p_value == pytest.approx(0.5)


def test_many_images_of_few_prompts_prove_little() -> None:
    groups = np.repeat(np.arange(3), 100)
    counted = count_wins(np.zeros(300), np.ones(300), groups)
    assert counted.win_rate == 1 and counted.p_value == pytest.approx(2 * 0.5**3)


def test_without_pairs_there_is_no_win_rate() -> None:
    counted = count_wins(np.array([NAN]), np.array([1.0]), np.array([0]))
    assert math.isnan(counted.win_rate) and math.isnan(counted.p_value)


def test_composite_by_hand() -> None:
    # z of `a`: (-1, 0, 1) * sqrt(3 / 2); z of `b`, which is the other way round: (2, -1, -1) / sqrt(2).
    means = {"x": {"a": 1, "b": 9}, "y": {"a": 2, "b": 0}, "z": {"a": 3, "b": 0}}
    scores = composite_scores(means)
    assert scores["x"] == pytest.approx((-math.sqrt(1.5) + math.sqrt(2)) / 2)
    assert scores["z"] == pytest.approx((math.sqrt(1.5) - math.sqrt(0.5)) / 2)


def test_composite_does_not_depend_on_the_rewards_scales_and_leaves_out_what_was_not_measured() -> None:
    means = {"x": {"a": 1.0, "b": 0.25, "c": 7}, "y": {"a": 2, "b": 0.5, "c": NAN}, "z": {"a": 5, "b": 0.25, "c": 9}}
    scaled = {name: {"a": 1000 * row["a"] - 7, "b": row["b"]} for name, row in means.items()}
    assert composite_scores(means) == pytest.approx(composite_scores(scaled))


def test_equal_pipelines_have_the_composite_score_0() -> None:
    assert composite_scores({"x": {"a": 0.1 + 0.2}, "y": {"a": 0.3}}) == {"x": 0, "y": 0}
    assert math.isnan(composite_scores({"x": {"a": NAN}, "y": {"a": 1}})["y"])


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=30), st.randoms())
def test_order_of_images_does_not_matter(images, random) -> None:
    shuffled = random.sample(images, len(images))
    first, second = (clustered_mean(*map(np.array, zip(*order, strict=True))) for order in (images, shuffled))
    assert first == pytest.approx(second, abs=1e-9, nan_ok=True)
