# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Names of rewards, and the check of what they return."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from trl_marble.rewards import RewardError, reward_names, reward_tensor
from trl_marble.rewards.protocol import most_common_prompts, validate_reward_funcs


PROMPTS = ["a cat", "a dog", "a tree"]


def sharpness(images, **kwargs):
    return [0.0] * len(images)


class Aesthetics:
    def __call__(self, images, **kwargs):
        return [0.0] * len(images)


def test_names_come_from_functions_partials_and_classes() -> None:
    twice = functools.partial(functools.partial(sharpness, a=1), b=2)
    assert reward_names([sharpness, Aesthetics(), twice]) == ["sharpness", "Aesthetics", "sharpness_1"]


def test_names_stay_unique_where_a_suffixed_name_is_taken() -> None:
    def sharpness_1(images, **kwargs):
        return []

    names = reward_names([sharpness_1, sharpness, sharpness, sharpness])
    assert names == ["sharpness_1", "sharpness", "sharpness_2", "sharpness_3"]


def test_one_callable_or_several_make_a_new_list() -> None:
    given = [sharpness]
    checked = validate_reward_funcs(given)
    assert checked == given and checked is not given
    assert validate_reward_funcs(sharpness) == [sharpness]


@pytest.mark.parametrize("empty", [None, [], ()])
def test_no_rewards_are_refused(empty) -> None:
    with pytest.raises(ValueError, match="`reward_funcs` is empty; pass at least one callable"):
        validate_reward_funcs(empty)


def test_what_cannot_be_called_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"`reward_funcs\[1\]` is 3; every reward must be a callable"):
        validate_reward_funcs([sharpness, 3])


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, -2],
        (1.0, 0.5, -2.0),
        np.array([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2]),
        torch.tensor([1, 0.5, -2], dtype=torch.bfloat16),
        torch.tensor([1, 0.5, -2], requires_grad=True),
        [torch.tensor(1.0), torch.tensor([0.5]), np.float32(-2)],
        [True, Fraction(1, 2), np.int64(-2)],
    ],
    ids=["list", "tuple", "array", "tensor", "bfloat16", "with gradient", "scalar tensors", "kinds of numbers"],
)
def test_numbers_of_all_kinds_are_taken(values) -> None:
    result = reward_tensor(values, "r", PROMPTS)
    assert result.dtype == torch.float32
    assert not result.requires_grad
    assert result.tolist() == [1.0, 0.5, -2.0]


@pytest.mark.parametrize(
    "values", [[None, 0.0, math.nan], np.array([math.nan, 0, math.nan]), torch.tensor([math.nan, 0, math.nan])]
)
def test_none_and_nan_mean_does_not_apply_and_zero_does_not(values) -> None:
    result = reward_tensor(values, "r", PROMPTS)
    assert result.isnan().tolist() == [True, False, True]
    assert result[1] == 0


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, torch.zeros(2), []])
def test_the_wrong_number_of_values_is_refused(values) -> None:
    with pytest.raises(RewardError, match=f"`sharp` returned {len(values)} values for 3 images; return one for each"):
        reward_tensor(values, "sharp", PROMPTS)


@pytest.mark.parametrize("values", [None, 0.5, "abc", b"abc", torch.tensor(0.5), {"a cat": 1}, (x for x in range(3))])
def test_what_is_no_list_of_values_is_refused(values) -> None:
    with pytest.raises(RewardError, match="`sharp` returned .* for 3 images; return a list with one number"):
        reward_tensor(values, "sharp", PROMPTS)


@pytest.mark.parametrize(
    "value", ["0.5", [0.5], torch.zeros(2), 1j, object()], ids=["text", "list", "tensor of two", "complex", "object"]
)
def test_a_value_that_is_no_number_is_refused_with_its_prompt(value) -> None:
    with pytest.raises(RewardError, match=f"`sharp` returned {type(value).__name__} .* for the prompt 'a dog'"):
        reward_tensor([0.0, value, 0.0], "sharp", PROMPTS)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39, -(10**400)])
def test_what_is_not_finite_in_float32_is_refused_with_its_prompt(value) -> None:
    with pytest.raises(RewardError, match="`sharp` returned .* for the prompt 'a tree'; a reward must be finite"):
        reward_tensor([0.0, None, value], "sharp", PROMPTS)


def test_a_long_answer_is_cut_short_in_the_message() -> None:
    with pytest.raises(RewardError) as caught:
        reward_tensor(["x" * 10_000, 0, 0], "sharp", PROMPTS)
    assert len(str(caught.value)) < 400


def test_prompts_of_a_batch_in_a_message() -> None:
    assert most_common_prompts(["b", "a", "b"]) == "'b', 'a'"
    assert most_common_prompts(list("aabcde")) == "'a', 'b', 'c' and 2 more"
