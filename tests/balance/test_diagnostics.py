# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trl_marble.balance import (
    aggregate_advantages,
    balance_diagnostics,
    direction_cosines,
    gram_matrix,
    group_advantages,
    harmonize,
    mgda_weights,
    reward_stds,
    weighted_sum_weights,
)


nan = float("nan")
cosine = torch.nn.functional.cosine_similarity
matrices = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-3, 3).map(lambda x: round(x, 2)))
)


@settings(deadline=None, derandomize=True)
@given(gradients=matrices, data=st.data())
def test_cosines_from_the_gram_matrix_are_the_cosines(gradients, data):
    gradients = torch.tensor(gradients)
    weights = torch.tensor(data.draw(arrays(np.float64, len(gradients), elements=st.floats(0, 2))))
    cosines = direction_cosines(gram_matrix(gradients), weights)
    direction = weights @ gradients
    zero = gradients.norm(dim=1) == 0
    assert torch.equal(cosines.isnan(), zero)
    if direction.norm() > 1e-4 * (weights @ gradients.norm(dim=1)) and direction.norm() > 1e-6:
        expected = cosine(gradients[~zero], direction[None], eps=0)
        torch.testing.assert_close(cosines[~zero], expected, atol=1e-6, rtol=0)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(gradients=matrices)
def test_the_harmonized_direction_is_never_reported_as_conflict(gradients):
    gram = gram_matrix(torch.tensor(gradients))
    result = harmonize(gram, mgda_weights)
    diagnostics = balance_diagnostics(gram, result.weights, result.active)
    assert diagnostics["conflict"] == 0.0
    assert not diagnostics["cos_min"] < 0


def test_diagnostics_by_hand():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [5.0, 5.0]])
    gram = gradients @ gradients.T
    weights = torch.tensor([4.0, 2.0, 0.0, 0.0])  # direction (4, 4)
    root = math.sqrt(0.5)
    torch.testing.assert_close(
        direction_cosines(gram, weights), torch.tensor([root, root, -root, 1.0], dtype=torch.float64)
    )
    diagnostics = balance_diagnostics(gram, weights, torch.tensor([True, True, True, False]))
    assert diagnostics == pytest.approx(
        {"cos_min": -root, "cos_mean": root / 3, "cos_var": 0.5 - 0.5 / 9, "conflict": 1.0}
    )
    without = balance_diagnostics(gram, weights, torch.tensor([True, True, False, True]))
    assert without["conflict"] == 0.0 and without["cos_min"] == pytest.approx(root)


def test_gradients_that_cancel_and_gradients_that_are_zero():
    opposite = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    cosines = direction_cosines(opposite, torch.tensor([0.5, 0.5, 1.0]))
    assert cosines[:2].tolist() == [0.0, 0.0] and cosines[2].isnan()
    nobody = balance_diagnostics(opposite, torch.zeros(3), torch.tensor([False, False, True]))
    assert nobody["conflict"] == 0.0 and all(math.isnan(nobody[key]) for key in ("cos_min", "cos_mean", "cos_var"))


def test_the_weighted_sum_is_this_mix_of_per_reward_gradients(make_problem, separate_gradients):
    """The gradient of H for sum_then_normalize is parallel to sum_k u_k grad H_k, and to that of no other weights."""
    problem = make_problem(3, batch=8)
    generator = torch.Generator().manual_seed(5)
    groups = torch.arange(4).repeat_interleave(2)
    rewards = torch.randn(3, 8, generator=generator, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [7.0]])
    rewards[1, 2:] = nan  # specialists: all samples of a prompt or none
    rewards[2, :4] = nan
    reward_weights = torch.tensor([1.0, 0.5, 0.2])
    counts = (~rewards.isnan()).sum(dim=1)
    clip = 1e6  # nothing is clipped

    def gradients(advantages):
        coefficients = problem.coefficients(range(8), "advantage", advantages.double())
        return separate_gradients(problem.terms(range(8), "advantage"), coefficients, problem.parameters)

    total = aggregate_advantages(rewards, groups, reward_weights, "sum_then_normalize", advantage_clip=clip)
    taken = gradients(total)[0]
    per_reward = gradients(group_advantages(rewards, groups, advantage_clip=clip))
    weights = weighted_sum_weights(reward_weights, reward_stds(rewards), counts)
    assert weights.sum().item() == pytest.approx(1)
    assert cosine(weights @ per_reward, taken, dim=0) > 1 - 1e-10
    for other in (reward_weights.double(), reward_weights * counts, torch.ones(3)):
        assert cosine(other.double() @ per_reward, taken, dim=0) < 0.999


def test_weighted_sum_weights_by_hand():
    weights = weighted_sum_weights(
        torch.tensor([1.0, -2.0, 1.0]), torch.tensor([0.9999, 0.9999, nan]), torch.tensor([2, 3, 0])
    )
    torch.testing.assert_close(weights, torch.tensor([0.25, -0.75, 0.0], dtype=torch.float64), atol=1e-7, rtol=0)
    zero = weighted_sum_weights(torch.zeros(2), torch.ones(2), torch.ones(2))
    assert torch.equal(zero, torch.zeros(2, dtype=torch.float64))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"one weight per gradient, got shapes \(2, 2\) and \(3,\)"):
        direction_cosines(torch.eye(2), torch.ones(3))
    with pytest.raises(ValueError, match="one value per reward"):
        weighted_sum_weights(torch.ones(2), torch.ones(3), torch.ones(2))
