# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_marble.balance import aggregate_advantages, group_advantages, reward_stds


nan = float("nan")
GROUPS = torch.tensor([7, 7, 3, 3, 3])


@st.composite
def reward_batches(draw):
    """Rewards with holes and the groups they belong to."""
    num_rewards, batch = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    value = st.one_of(st.floats(-10, 10, width=32), st.just(nan))
    rows = draw(st.lists(st.lists(value, min_size=batch, max_size=batch), min_size=num_rewards, max_size=num_rewards))
    groups = draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
    return torch.tensor(rows), torch.tensor(groups)


def test_by_hand_over_the_batch():
    rewards = torch.tensor([[1.0, 3.0, 2.0, nan, 4.0]])
    std = np.std([1, 3, 2, 4])  # population: the reference uses np.std
    expected = np.array([-1, 1, -1, nan, 1]) / (std + 1e-4)
    advantages = group_advantages(rewards, GROUPS)
    assert advantages.dtype == torch.float32
    np.testing.assert_allclose(advantages[0].numpy(), expected, rtol=1e-6)


def test_by_hand_over_the_group_and_unscaled():
    rewards = torch.tensor([[1.0, 3.0, 2.0, nan, 8.0]])
    by_group = group_advantages(rewards, GROUPS, scale_rewards="group")
    np.testing.assert_allclose(
        by_group[0].numpy(), np.array([-1, 1, -3, nan, 3]) / ([1.0001] * 2 + [3.0001] * 3), 1e-6
    )
    unscaled = group_advantages(rewards, GROUPS, scale_rewards="none", advantage_clip=2.5)
    np.testing.assert_array_equal(unscaled[0].numpy(), [-1, 1, -2.5, nan, 2.5])


@pytest.mark.parametrize("scale_rewards", ["batch", "group", "none"])
@settings(deadline=None, derandomize=True)
@given(batch=reward_batches())
def test_invariants(scale_rewards, batch):
    rewards, groups = batch
    clip = 1e6
    advantages = group_advantages(rewards, groups, scale_rewards, clip)
    assert torch.equal(advantages.isnan(), rewards.isnan())
    for group in groups.unique():
        of_group = advantages[:, groups == group]
        mean = of_group.double().nanmean(dim=1).nan_to_num()
        assert (mean.abs() <= 1e-6 * of_group.nan_to_num().abs().amax(dim=1).clamp_min(1)).all()
        alone = (~of_group.isnan()).sum(dim=1) == 1
        assert (of_group[alone].nan_to_num() == 0).all()
    assert group_advantages(rewards, groups, scale_rewards, 0.5).nan_to_num().abs().max() <= 0.5


@settings(deadline=None, derandomize=True)
@given(batch=reward_batches(), fill=st.floats(-5, 5, width=32))
def test_masked_samples_influence_nobody(batch, fill):
    rewards, groups = batch
    dropped = rewards[0].isnan()
    kept = group_advantages(rewards[:1, ~dropped], groups[~dropped]) if not dropped.all() else torch.empty(1, 0)
    torch.testing.assert_close(group_advantages(rewards, groups)[:1, ~dropped], kept)
    # Nor does one reward influence another.
    changed = rewards.clone()
    changed[1:] = fill
    assert torch.equal(
        group_advantages(changed, groups)[0].nan_to_num(9), group_advantages(rewards, groups)[0].nan_to_num(9)
    )


@settings(deadline=None, derandomize=True)
@given(batch=reward_batches(), scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_affine_invariance_over_the_batch(batch, scale, shift):
    rewards, groups = batch[0].double(), batch[1]
    std = reward_stds(rewards)[:, None]
    before = group_advantages(rewards, groups, advantage_clip=1e6)
    after = group_advantages(rewards * scale + shift, groups, advantage_clip=1e6)
    # Exact up to the 1e-4 beside the standard deviation.
    torch.testing.assert_close(
        after * (scale * std + 1e-4) / scale, before * (std + 1e-4), equal_nan=True, rtol=1e-4, atol=1e-4
    )


def test_group_ids_are_only_labels():
    rewards = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    relabelled = torch.tensor([-(2**40), -(2**40), 2**62, 2**62, 2**62])
    assert torch.equal(group_advantages(rewards, GROUPS), group_advantages(rewards, relabelled))


@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
def test_a_constant_reward_has_no_signal_at_all(scale_rewards):
    # The mean of 0.1 over three samples is not 0.1; normalized to a unit gradient, the difference would count fully.
    rewards = torch.tensor([[0.1, 0.1, 0.1]], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.zeros(3, dtype=torch.long), scale_rewards)
    assert torch.equal(advantages, torch.zeros(1, 3))


def test_one_sample_and_no_sample():
    assert torch.equal(group_advantages(torch.tensor([[2.0]]), torch.tensor([0])), torch.zeros(1, 1))
    assert group_advantages(torch.tensor([[nan, nan]]), torch.tensor([0, 1])).isnan().all()


def test_bad_input_is_refused():
    rewards = torch.tensor([[1.0, 2.0], [3.0, float("inf")]])
    groups = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="Reward 1 is inf for sample 1"):
        group_advantages(rewards, groups)
    with pytest.raises(ValueError, match="Reward 1 is inf"):
        aggregate_advantages(rewards, groups, torch.ones(2), "sum_then_normalize")
    with pytest.raises(ValueError, match="scale_rewards 'sample'.*batch, group, none"):
        group_advantages(rewards[:1], groups, "sample")
    with pytest.raises(ValueError, match="advantage_clip must be positive and finite, got 0"):
        group_advantages(rewards[:1], groups, advantage_clip=0)
    with pytest.raises(ValueError, match="one group id per sample"):
        group_advantages(rewards[:1], groups[:1])
    with pytest.raises(ValueError, match="groups must be integers"):
        group_advantages(rewards[:1], groups.float())
    with pytest.raises(ValueError, match=r"shape \(rewards, samples\)"):
        group_advantages(rewards[0], groups)
    with pytest.raises(ValueError, match="multi_objective_aggregation 'sum'.*marble"):
        aggregate_advantages(rewards[:1], groups, torch.ones(1), "sum")
    with pytest.raises(ValueError, match="one weight per reward"):
        aggregate_advantages(rewards[:1], groups, torch.ones(2), "marble")
    with pytest.raises(ValueError, match="reward_weights must be finite"):
        aggregate_advantages(rewards[:1], groups, torch.tensor([nan]), "marble")


@pytest.mark.parametrize("mode", ["marble", "equal"])
def test_balanced_modes_keep_rewards_apart_and_ignore_weights(mode):
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    advantages = aggregate_advantages(rewards, GROUPS, torch.tensor([1.0, 100.0, 0.0]), mode, "group", 1.0)
    assert torch.equal(advantages, group_advantages(rewards, GROUPS, "group", 1.0))


def test_sum_then_normalize_by_hand():
    rewards = torch.tensor([[1.0, 3.0, 2.0, nan, nan], [10.0, nan, 20.0, 30.0, nan]])
    advantages = aggregate_advantages(rewards, GROUPS, torch.tensor([2.0, 0.1]), "sum_then_normalize")
    total = np.array([3.0, 6.0, 6.0, 3.0])
    expected = np.array([-1.5, 1.5, 1.5, -1.5]) / (np.std(total) + 1e-4)
    np.testing.assert_allclose(advantages[0].numpy(), [*expected, nan], rtol=1e-6)


@pytest.mark.parametrize("mode", ["sum_then_normalize", "normalize_then_sum"])
def test_weights_may_differ_from_sample_to_sample(mode):
    rewards = torch.tensor([[1.0, 3.0, 2.0, nan, 4.0], [5.0, 1.0, 2.0, 3.0, nan]])
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.3, 0.7])
    weights = torch.stack([one, one, other, other, other], dim=1)  # group by group
    advantages = aggregate_advantages(rewards, GROUPS, weights, mode, "none")
    assert advantages.shape == (1, 5)
    for weight, members in ((one, slice(0, 2)), (other, slice(2, 5))):
        expected = aggregate_advantages(rewards, GROUPS, weight, mode, "none")[:, members]
        found = advantages[:, members]
        if mode == "sum_then_normalize":
            assert torch.allclose(found, expected)
        else:  # up to the standard deviation over the batch, which is of both groups
            assert torch.allclose(found / found.norm(), expected / expected.norm(), atol=1e-4)
    same = aggregate_advantages(rewards, GROUPS, other[:, None].expand(2, 5), mode)
    assert same.equal(aggregate_advantages(rewards, GROUPS, other, mode))


def test_normalize_then_sum_is_trls():
    """Against the formula in TRL's GRPOTrainer (with its own standard deviation put into both places)."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    rewards[1, :4] = nan  # a specialist that applies to the second prompt only
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    groups = torch.arange(2).repeat_interleave(4)
    grouped = rewards.T.view(2, 4, 3)
    z = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, correction=0, keepdim=True) + 1e-4)
    total = (z.view(8, 3) * weights).nansum(1)
    expected = (total - total.mean()) / (total.std(correction=0) + 1e-4)
    advantages = aggregate_advantages(rewards, groups, weights, "normalize_then_sum", "group")
    torch.testing.assert_close(advantages, expected[None].float())


@pytest.mark.parametrize("mode", ["sum_then_normalize", "normalize_then_sum"])
@settings(deadline=None, derandomize=True)
@given(batch=reward_batches())
def test_aggregates_are_advantages(mode, batch):
    rewards, groups = batch
    advantages = aggregate_advantages(rewards, groups, torch.ones(len(rewards)), mode, advantage_clip=2.0)
    assert advantages.shape == (1, rewards.shape[1])
    assert torch.equal(advantages[0].isnan(), rewards.isnan().all(dim=0))
    assert advantages.nan_to_num().abs().max() <= 2
    unclipped = aggregate_advantages(rewards, groups, torch.ones(len(rewards)), mode, advantage_clip=1e6)
    for group in groups.unique():
        of_group = unclipped[:, groups == group].double()
        assert of_group.nanmean().nan_to_num().abs() <= 1e-6 * of_group.nan_to_num().abs().max().clamp_min(1)


def test_reward_stds():
    stds = reward_stds(torch.tensor([[1.0, 3.0, nan], [nan, nan, nan], [2.0, 2.0, 2.0]]))
    np.testing.assert_allclose(stds.numpy(), [1, nan, 0])
