# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_marble.balance import BalanceSchedule, Harmonization, harmonize, mgda_weights


ALL = torch.tensor([True, True, True])
nan = float("nan")


def solved(alpha, norms=(1.0, 1.0, 1.0), active=(True, True, True)):
    """A full solve with this outcome."""
    active = torch.tensor(active)
    alpha, norms = torch.tensor(alpha).where(active, torch.tensor(0.0)), torch.tensor(norms)
    weights = alpha * norms[active].mean() / norms
    return Harmonization(weights, alpha, norms, torch.diag(norms**2), active)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), equal_nan=True, atol=1e-6, rtol=0)


def test_due_at_multiples():
    schedule = BalanceSchedule(3, balance_every=4)
    assert [step for step in range(13) if schedule.is_due(step)] == [0, 4, 8, 12]
    assert all(BalanceSchedule(3, balance_every=1).is_due(step) for step in range(5))


def test_due_when_an_unseen_reward_takes_part():
    schedule = BalanceSchedule(3, balance_every=10)
    schedule.update(solved([0.4, 0.6, 0.0], active=(True, True, False)))
    assert not schedule.is_due(3, torch.tensor([True, False, False]))
    assert schedule.is_due(3, torch.tensor([True, False, True]))
    schedule.update(solved([0.2, 0.3, 0.5]))
    assert not schedule.is_due(4, ALL)


def test_moving_average_by_hand():
    schedule = BalanceSchedule(3, balance_ema=0.7)
    close(schedule.alpha, [nan, nan, nan])
    schedule.update(solved([0.5, 0.5, 0.0], active=(True, True, False)))
    close(schedule.alpha, [0.5, 0.5, nan])
    schedule.update(solved([0.1, 0.3, 0.6]))
    close(schedule.alpha, [0.38, 0.44, 0.6])  # 0.7 * 0.5 + 0.3 * 0.1, ..., and the third's first value as it is
    schedule.update(solved([1.0, 0.0, 0.0], active=(True, False, False)))
    close(schedule.alpha, [0.566, 0.44, 0.6])  # only the first has moved


def test_weights_by_hand():
    schedule = BalanceSchedule(3, balance_ema=0.5)
    schedule.update(solved([0.2, 0.3, 0.5], norms=(1.0, 2.0, 6.0)))
    close(schedule.weights(ALL), [0.2 * 3, 0.3 * 1.5, 0.5 * 0.5])
    # Without the third, the other two share the whole: alpha .4 and .6, mean norm 1.5.
    close(schedule.weights(torch.tensor([True, True, False])), [0.4 * 1.5, 0.6 * 0.75, 0.0])
    close(schedule.weights(torch.tensor([False, False, False])), [0.0, 0.0, 0.0])
    schedule.update(solved([1.0, 0.0, 0.0], norms=(4.0, 5.0, 7.0), active=(True, False, False)))
    # The first's norm is new, the others' are the last known; alpha .6 .3 .5 is brought back to a sum of 1.
    close(schedule.weights(ALL), [0.6 / 1.4, 0.3 / 1.4 * 2, 0.5 / 1.4 * 4 / 6])


def test_right_after_the_first_solve_the_weights_are_its_own():
    gradients = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients *= torch.tensor([[0.1], [1.0], [10.0]])
    result = harmonize(gradients @ gradients.T, mgda_weights)
    schedule = BalanceSchedule(3)
    schedule.update(result)
    torch.testing.assert_close(schedule.weights(ALL), result.weights)


def test_totals_other_than_one_are_kept():
    schedule = BalanceSchedule(3, balance_ema=0.5)
    schedule.update(solved([1.0, 1.0, 2.0]))
    close(schedule.weights(torch.tensor([True, True, False])), [2.0, 2.0, 0.0])
    schedule.update(solved([0.5, 0.5, 1.0]))
    close(schedule.weights(ALL), [0.75, 0.75, 1.5])


def test_an_unseen_reward_weighs_nothing_until_it_is_solved_for():
    schedule = BalanceSchedule(3)
    close(schedule.weights(ALL), [0.0, 0.0, 0.0])
    schedule.update(solved([0.5, 0.5, 0.0], active=(True, True, False)))
    close(schedule.weights(ALL), [0.5, 0.5, 0.0])


def test_rewards_that_were_superfluous_share_when_the_others_are_absent():
    schedule = BalanceSchedule(3)
    schedule.update(solved([1.0, 0.0, 0.0], norms=(1.0, 1.0, 3.0)))
    close(schedule.weights(torch.tensor([False, True, True])), [0.0, 0.5 * 2, 0.5 * 2 / 3])


def test_a_solve_without_any_reward_changes_nothing():
    schedule = BalanceSchedule(3)
    schedule.update(solved([0.2, 0.3, 0.5]))
    before = schedule.weights(ALL)
    schedule.update(harmonize(torch.zeros(3, 3), mgda_weights))
    assert torch.equal(schedule.weights(ALL), before)


def test_state_round_trip(tmp_path):
    schedule = BalanceSchedule(3)
    schedule.update(solved([0.5, 0.5, 0.0], norms=(1.0, 2.0, 0.0), active=(True, True, False)))
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    resumed = BalanceSchedule(3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        assert torch.equal(resumed.alpha.nan_to_num(9), schedule.alpha.nan_to_num(9))
        assert torch.equal(resumed.weights(ALL), schedule.weights(ALL))
        for each in (schedule, resumed):
            each.update(solved([0.1, 0.2, 0.7], norms=(3.0, 1.0, 2.0)))


def test_a_saved_state_is_a_snapshot():
    schedule = BalanceSchedule(3)
    schedule.update(solved([0.2, 0.3, 0.5]))
    state = schedule.state_dict()
    schedule.update(solved([1.0, 0.0, 0.0]))
    close(state["alpha"], [0.2, 0.3, 0.5])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="balance_every must be at least 1.*got 0"):
        BalanceSchedule(3, balance_every=0)
    with pytest.raises(ValueError, match="balance_ema must be in .* got 1.0"):
        BalanceSchedule(3, balance_ema=1.0)
    with pytest.raises(ValueError, match="num_rewards must be at least 1, got 0"):
        BalanceSchedule(0)
    with pytest.raises(ValueError, match=r"one boolean per reward \(3\)"):
        BalanceSchedule(3).weights(torch.tensor([True]))
    with pytest.raises(ValueError, match="for 2 rewards, this run has 3"):
        BalanceSchedule(3).load_state_dict(BalanceSchedule(2).state_dict())
