# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Names of rewards, and the check of what they return."""

import functools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from trl_marble.rewards import FrameReward, RewardError, reward_names, reward_tensor
from trl_marble.rewards.protocol import (
    InfiniteRewardError,
    errors_for_infinite,
    most_common_prompts,
    validate_reward_funcs,
)
from trl_marble.rewards.reward_value import to_number


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


def test_an_unknown_kind_of_images_is_refused() -> None:
    def reward(images, **kwargs):
        return []

    reward.image_type = "tensor"
    for wrapped in (reward, functools.partial(reward)):
        with pytest.raises(ValueError, match="Reward `reward` has the attribute `image_type = 'tensor'`; it must be"):
            validate_reward_funcs(wrapped)
        with pytest.raises(ValueError, match="image_type = 'tensor'"):
            FrameReward(wrapped)


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


def one_of_each(number: int) -> list:
    """The number in every type that has it."""
    scalars = [
        *(np.dtype(code).type(number) for code in "?bBhHiIlLqQefdg"),
        *(np.array(number, code) for code in "?bBQefdgO"),
        *(np.array([[number]], code) for code in "?bd"),
        *(
            torch.tensor(number, dtype=dtype)
            for dtype in (torch.bool, torch.uint8, torch.int8, torch.int64, torch.half, torch.bfloat16, torch.double)
        ),
        torch.tensor([[number]]),
        torch.nn.Parameter(torch.tensor(float(number))),
        *(kind(number) for kind in (bool, int, float, Fraction, Decimal)),
    ]
    return [
        scalar.item() if isinstance(scalar, np.generic) and scalar.dtype.char == "O" else scalar for scalar in scalars
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_every_type_of_number_is_taken(number) -> None:
    for value in one_of_each(number):
        assert to_number(value) == number and type(to_number(value)) is float
    values = one_of_each(number)
    assert reward_tensor(values, "r", ["p"] * len(values)).tolist() == [number] * len(values)
    assert errors_for_infinite(values, "r", ["p"] * len(values)) == values


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_of_bools_are_taken(array) -> None:
    assert reward_tensor(array([True, False, True]), "r", PROMPTS).tolist() == [1.0, 0.0, 1.0]


def test_what_a_masked_array_leaves_out_does_not_apply() -> None:
    masked = np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])
    for values in (masked, list(masked)):
        assert reward_tensor(values, "r", PROMPTS).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "value",
    [
        np.float16("inf"),
        np.longdouble("1e400"),
        np.array(-np.inf),
        torch.tensor(math.inf, dtype=torch.half),
        Fraction(10**400),
        Decimal("-Infinity"),
        Decimal("1e400"),
        10**400,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_infinite_numbers_of_every_type_are_failures(value) -> None:
    (error,) = errors_for_infinite([value], "sharp", ["a cat"])
    assert isinstance(error, InfiniteRewardError) and "`sharp` returned" in str(error)
    with pytest.raises(InfiniteRewardError, match="for the prompt 'a cat'"):
        reward_tensor([value], "sharp", ["a cat"])


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, torch.zeros(2), []])
def test_the_wrong_number_of_values_is_refused(values) -> None:
    with pytest.raises(RewardError, match=f"`sharp` returned {len(values)} values for 3 images; return one for each"):
        reward_tensor(values, "sharp", PROMPTS)


@pytest.mark.parametrize("values", [None, 0.5, "abc", b"abc", torch.tensor(0.5), {"a cat": 1}, (x for x in range(3))])
def test_what_is_no_list_of_values_is_refused(values) -> None:
    with pytest.raises(RewardError, match="`sharp` returned .* for 3 images; return a list with one number"):
        reward_tensor(values, "sharp", PROMPTS)


@pytest.mark.parametrize(
    "value",
    [
        *("0.5", b"1", np.str_("0.5"), np.bytes_("1"), np.array("0.5")),
        *([0.5], (0.5,), {}, torch.zeros(2), torch.zeros(0), np.zeros(2), np.array(None, dtype="m8[s]")),
        *(1j, np.complex64(1), np.array(1j), torch.tensor(1j), np.timedelta64(1, "s"), np.datetime64("2026-01-01")),
        *(object(), Decimal("sNaN"), float),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:9]}",
)
def test_a_value_that_is_no_number_is_refused_with_its_prompt(value) -> None:
    with pytest.raises(RewardError, match=f"(?s)`sharp` returned {type(value).__name__} .* for the prompt 'a dog'"):
        reward_tensor([0.0, value, 0.0], "sharp", PROMPTS)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39, -(10**400)], ids=lambda value: repr(value)[:20])
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
