# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trl_marble.balance import equal_weights, gram_matrix, harmonize, mgda_weights


@st.composite
def gradient_sets(draw):
    """Gradients as rows, of very different norms, some of them 0."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    unscaled = draw(arrays(np.float64, shape, elements=st.floats(-3, 3).map(lambda x: round(x, 3))))
    exponents = draw(arrays(np.int64, shape[0], elements=st.integers(-4, 4)))
    return torch.tensor(unscaled * 10.0 ** exponents[:, None])


def unit_direction(gradients, weights):
    """The direction of unit mean norm: sum_k alpha_k g_k / ||g_k||."""
    norms = gradients.norm(dim=1)
    active = norms > 0
    return (weights @ gradients) / norms[active].mean() if active.any() else weights @ gradients


@settings(deadline=None, derandomize=True, max_examples=150)
@given(gradients=gradient_sets())
def test_the_direction_conflicts_with_no_reward(gradients):
    result = harmonize(gram_matrix(gradients), mgda_weights)
    direction = unit_direction(gradients, result.weights)
    units = torch.nn.functional.normalize(gradients, dim=1, eps=0).nan_to_num()
    assert (units @ direction).min() >= -2e-8
    assert result.weights.isfinite().all()


@settings(deadline=None, derandomize=True)
@given(gradients=gradient_sets(), data=st.data())
def test_rescaling_any_gradient_leaves_the_direction(gradients, data):
    exponents = data.draw(st.lists(st.integers(-10, 10), min_size=len(gradients), max_size=len(gradients)))
    rescaled = gradients * (2.0 ** torch.tensor(exponents))[:, None]
    before = harmonize(gram_matrix(gradients), mgda_weights)
    after = harmonize(gram_matrix(rescaled), mgda_weights)
    torch.testing.assert_close(after.alpha, before.alpha, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        unit_direction(rescaled, after.weights), unit_direction(gradients, before.weights), atol=1e-6, rtol=0
    )


@settings(deadline=None, derandomize=True)
@given(gradients=gradient_sets(), data=st.data())
def test_permutation_equivariance(gradients, data):
    order = data.draw(st.permutations(range(len(gradients))))
    before = harmonize(gram_matrix(gradients), mgda_weights)
    after = harmonize(gram_matrix(gradients[order]), mgda_weights)
    torch.testing.assert_close(after.alpha, before.alpha[order], atol=1e-5, rtol=0)
    assert torch.equal(after.active, before.active[order])


def test_by_hand():
    gradients = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    result = harmonize(gradients @ gradients.T, mgda_weights)
    torch.testing.assert_close(result.norms, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(result.alpha, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(result.weights, torch.tensor([1 / 3, 1.0]))  # alpha * mean norm 2 / norm
    torch.testing.assert_close(result.weights @ gradients, torch.tensor([1.0, 1.0]))
    assert torch.equal(result.gram, gradients @ gradients.T) and result.active.all()


def test_one_reward_is_left_as_it_is():
    result = harmonize(torch.tensor([[7.0]]), mgda_weights)
    torch.testing.assert_close(result.weights, torch.tensor([1.0]))


def test_identical_and_opposite_gradients():
    identical = harmonize(torch.full((3, 3), 4.0), mgda_weights)
    torch.testing.assert_close(identical.weights, torch.full((3,), 1 / 3))
    opposite = harmonize(torch.tensor([[4.0, -2.0], [-2.0, 1.0]]), mgda_weights)
    torch.testing.assert_close(opposite.weights @ torch.tensor([[2.0], [-1.0]]), torch.zeros(1), atol=1e-6, rtol=0)


def test_rewards_that_take_no_part():
    gradients = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 0.0], [0.0, 2.0]])
    mask = torch.tensor([True, False, True, True])
    result = harmonize(gradients @ gradients.T, mgda_weights, active=mask)
    assert result.active.tolist() == [True, False, False, True]
    alone = harmonize(gradients[[0, 3]] @ gradients[[0, 3]].T, mgda_weights)
    torch.testing.assert_close(result.weights[[0, 3]], alone.weights)
    assert result.weights[[1, 2]].tolist() == result.alpha[[1, 2]].tolist() == [0.0, 0.0]


def test_nobody_takes_part():
    result = harmonize(torch.eye(2), mgda_weights, active=torch.tensor([False, False]))
    assert not result.active.any() and torch.equal(result.weights, torch.zeros(2))
    assert torch.equal(harmonize(torch.zeros(2, 2), mgda_weights).weights, torch.zeros(2))


def test_norms_far_apart():
    gradients = torch.tensor([[1e-15, 0.0], [0.0, 1e15]])
    result = harmonize(gradients @ gradients.T, mgda_weights)
    torch.testing.assert_close(result.alpha, torch.tensor([0.5, 0.5]))
    direction = result.weights @ gradients
    torch.testing.assert_close(direction[0], direction[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_gradient_is_named(value):
    gradients = torch.eye(3)
    gradients[1, 0] = value
    with pytest.raises(FloatingPointError, match="gradient of reward 1 is not finite"):
        harmonize(gradients @ gradients.T, mgda_weights)


def test_a_plain_function_as_weighting():
    def by_position(gram):
        assert gram.dtype == torch.float64 and gram.tolist() == [[1.0, 0.5], [0.5, 1.0]]  # of unit gradients
        return torch.tensor([1.5, 3.0])  # need not sum to 1

    gram = torch.tensor([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    result = harmonize(gram, by_position)
    assert result.alpha.tolist() == [1.5, 0.0, 3.0]
    assert result.weights.tolist() == [1.5 * 1.5 / 2, 0.0, 3.0 * 1.5]  # alpha * mean norm 1.5 / norm


def test_a_module_as_weighting():
    class SoftmaxOfConflict(torch.nn.Module):
        """Of the form of torchjd's weightings: forward(Gram matrix) -> weights."""

        def __init__(self):
            super().__init__()
            self.temperature = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, gram):
            return torch.softmax(-gram.sum(dim=1) / self.temperature, dim=0)

    gram = torch.tensor([[1.0, 0.8, -0.5], [0.8, 1.0, 0.0], [-0.5, 0.0, 1.0]])
    result = harmonize(gram, SoftmaxOfConflict())
    torch.testing.assert_close(result.alpha, torch.softmax(-gram.sum(dim=1) / 2, dim=0))
    assert not result.weights.requires_grad


def test_what_a_weighting_returns_is_checked():
    with pytest.raises(ValueError, match="must return 2 finite weights"):
        harmonize(torch.eye(2), lambda gram: torch.ones(3))
    with pytest.raises(ValueError, match=r"returned \[1.0, nan\]"):
        harmonize(torch.eye(2), lambda gram: torch.tensor([1.0, float("nan")]))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
        harmonize(torch.ones(2, 3), equal_weights)
    with pytest.raises(ValueError, match="floats, got torch.int64"):
        harmonize(torch.eye(2).long(), equal_weights)
    with pytest.raises(ValueError, match=r"gram\[1, 1\] is negative: -1.0"):
        harmonize(torch.diag(torch.tensor([1.0, -1.0])), equal_weights)
    with pytest.raises(ValueError, match=r"one boolean per reward \(2\)"):
        harmonize(torch.eye(2), equal_weights, active=torch.ones(2))


@settings(deadline=None, derandomize=True)
@given(gradients=gradient_sets())
def test_equal_weighting_is_the_mean_of_unit_gradients(gradients):
    norms = gradients.norm(dim=1)
    assume(norms.min() > 0)
    result = harmonize(gram_matrix(gradients), equal_weights)
    expected = (gradients / norms[:, None]).mean(dim=0)
    torch.testing.assert_close(unit_direction(gradients, result.weights), expected)


def test_cosines_are_in_the_ratio_of_the_priorities():
    gradients = torch.eye(3, 5, dtype=torch.float64) + 0.1  # nearly orthogonal, so that none is left out
    gradients *= torch.tensor([[1.0], [10.0], [0.1]])
    priorities = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    found = harmonize(gradients @ gradients.T, mgda_weights, priorities=priorities)
    assert (found.alpha > 0).all()
    direction = found.weights @ gradients
    cosines = torch.cosine_similarity(gradients, direction[None], dim=1)
    torch.testing.assert_close(cosines / cosines[0], priorities, rtol=1e-6, atol=0)
    # Only their ratios count.
    torch.testing.assert_close(
        harmonize(gradients @ gradients.T, mgda_weights, priorities=100 * priorities).weights, found.weights
    )


def test_equal_priorities_change_no_bit():
    gradients = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    active = torch.tensor([True, True, False, True])
    plain = harmonize(gradients @ gradients.T, mgda_weights, active)
    equal = harmonize(gradients @ gradients.T, mgda_weights, active, torch.full((4,), 2.0))
    assert torch.equal(plain.weights, equal.weights) and torch.equal(plain.alpha, equal.alpha)


def test_priorities_of_rewards_that_take_no_part_do_not_count():
    gradients = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    active = torch.tensor([True, False, True])
    some = harmonize(gradients @ gradients.T, mgda_weights, active, torch.tensor([1.0, 50.0, 3.0]))
    others = harmonize(gradients @ gradients.T, mgda_weights, active, torch.tensor([1.0, 1.0, 3.0]))
    assert torch.equal(some.weights, others.weights)
