# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Shares of the rewards: evenly from the simplex, the same for a prompt's images, and by their place alone."""

import torch

from trl_marble.rollout import ShareDraws


def test_shares_are_drawn_evenly_from_the_simplex():
    shares = ShareDraws(seed=1, num_rewards=4, num_generations=1).of(0, range(4000)).double()
    assert shares.shape == (4000, 4) and shares.min() >= 0
    assert (shares.sum(dim=1) - 1).abs().max() < 1e-6
    # Of a Dirichlet distribution with parameters 1: mean 1 / K, variance (K - 1) / (K^2 (K + 1)) and so on.
    assert (shares.mean(dim=0) - 1 / 4).abs().max() < 0.01
    expected = torch.full((4, 4), -1 / 80, dtype=torch.float64) + torch.eye(4) * (3 + 1) / 80
    assert (shares.T.cov() - expected).abs().max() < 0.004
    # Of one reward against another: the quarter of the points where the first has more than 1 - (1/4)^(1/3).
    assert abs((shares[:, 0] > 1 - 0.25 ** (1 / 3)).double().mean() - 0.25) < 0.03


def test_of_two_rewards_every_share_is_as_likely():
    shares = ShareDraws(seed=2, num_rewards=2, num_generations=1).of(3, range(2000))[:, 0]
    assert (shares.histc(10, 0, 1) / 200 - 1).abs().max() < 0.3


def test_the_images_of_a_prompt_have_the_same_and_other_prompts_and_batches_others():
    draws = ShareDraws(seed=1, num_rewards=3, num_generations=4)
    shares = draws.of(0, range(12))
    assert [len(shares[4 * group : 4 * group + 4].unique(dim=0)) for group in range(3)] == [1, 1, 1]
    assert len(shares.unique(dim=0)) == 3
    assert len(torch.cat([shares, draws.of(1, range(12))]).unique(dim=0)) == 6
    assert not ShareDraws(seed=2, num_rewards=3, num_generations=4).of(0, range(12)).eq(shares).any()


def test_they_depend_on_the_place_alone():
    draws = ShareDraws(seed=1, num_rewards=3, num_generations=4)
    torch.manual_seed(0)
    shares = draws.of(5, range(24))
    torch.manual_seed(1)
    places = [23, 2, 2, 17]
    assert draws.of(5, places).equal(shares[places])
