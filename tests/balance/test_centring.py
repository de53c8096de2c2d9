# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that are centred on the batch, and groups on which a reward does not tell samples apart."""

import math

import pytest
import torch

from trl_marble.balance import aggregate_advantages, group_advantages, mask_silent_groups, zero_std_fractions


NAN = math.nan
GROUPS = torch.tensor([7, 7, 3, 3, 3])
REWARDS = torch.tensor([[1.0, 3.0, 2.0, NAN, 8.0], [5.0, 5.0, 1.0, 1.0, 3.0]])
FIRST = torch.tensor([True, False])
SECOND = torch.tensor([False, True])


def test_the_mean_of_the_batch_is_subtracted() -> None:
    advantages = group_advantages(REWARDS, GROUPS, "none", 100.0, FIRST)
    expected = torch.tensor([[-2.5, -0.5, -1.5, NAN, 4.5], [0, 0, -2 / 3, -2 / 3, 4 / 3]])
    torch.testing.assert_close(advantages, expected, equal_nan=True)
    torch.testing.assert_close(advantages[1], group_advantages(REWARDS, GROUPS, "none", 100.0)[1])


@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
def test_its_scale_is_always_that_of_the_batch(scale_rewards) -> None:
    centred = group_advantages(REWARDS, GROUPS, "none", 100.0, SECOND)[1]
    found = group_advantages(REWARDS, GROUPS, scale_rewards, 100.0, SECOND)
    torch.testing.assert_close(found[1], centred / (REWARDS[1].std(correction=0) + 1e-4))
    torch.testing.assert_close(found[0], group_advantages(REWARDS, GROUPS, scale_rewards, 100.0)[0], equal_nan=True)


def test_each_part_of_a_sum_is_centred_in_its_own_way() -> None:
    weights = torch.tensor([2.0, 1.0])
    for scale in ("none", "batch", "group"):
        found = aggregate_advantages(REWARDS, GROUPS, weights, "sum_then_normalize", scale, 100.0, SECOND)
        on_group = group_advantages(REWARDS[:1], GROUPS, "none", 100.0)[0].nan_to_num()
        on_batch = group_advantages(REWARDS[1:], GROUPS, "none", 100.0, torch.tensor([True]))[0]
        total = (2 * REWARDS[0].nan_to_num() + REWARDS[1]).std(correction=0) + 1e-4
        torch.testing.assert_close(found[0], (2 * on_group + on_batch) / (1 if scale == "none" else total))


def test_a_sum_of_normalized_advantages_has_mean_zero() -> None:
    for mode in ("normalize_then_sum", "progress"):
        found = aggregate_advantages(REWARDS, GROUPS, torch.tensor([1.0, 3.0]), mode, "group", 100.0, SECOND)
        assert found.mean().item() == pytest.approx(0, abs=1e-6) and found.std(correction=0) == pytest.approx(
            1, abs=1e-3
        )


def test_a_constant_reward_has_no_advantage_wherever_it_is_centred() -> None:
    rewards = torch.full((1, 5), 0.1)
    assert (group_advantages(rewards, GROUPS, batch_centred=torch.tensor([True])) == 0).all()


def test_one_bool_per_reward_is_needed() -> None:
    with pytest.raises(ValueError, match=r"batch_centred has shape \(1,\) and torch.bool for 2 rewards"):
        group_advantages(REWARDS, GROUPS, batch_centred=torch.tensor([True]))


def test_a_group_without_a_signal_counts_as_one_that_the_reward_does_not_apply_to() -> None:
    advantages = group_advantages(REWARDS, GROUPS, "none", 100.0)
    masked = mask_silent_groups(advantages, GROUPS)
    assert masked.isnan().tolist() == [[False, False, False, True, False], [True, True, False, False, False]]
    assert masked[~masked.isnan()].equal(advantages[~masked.isnan()])
    # Centred on the batch, the same group has one: it differs from the others.
    on_batch = group_advantages(REWARDS, GROUPS, "none", 100.0, SECOND)
    assert not mask_silent_groups(on_batch, GROUPS)[1].isnan().any()


def test_a_single_valid_sample_of_a_group_is_no_signal() -> None:
    advantages = group_advantages(torch.tensor([[1.0, NAN, 2.0, 3.0, 4.0]]), GROUPS)
    assert mask_silent_groups(advantages, GROUPS)[0].isnan().tolist() == [True, True, False, False, False]


def test_the_fraction_of_such_groups_is_among_those_that_a_reward_applies_to() -> None:
    rewards = torch.tensor([[0.1, 0.1, 1, 2, 2], [NAN, NAN, 0.3, NAN, 0.3], [1, 2, 1, 2, 1], [NAN] * 5])
    assert zero_std_fractions(rewards, GROUPS).tolist() == pytest.approx([0.5, 1, 0, NAN], nan_ok=True)
