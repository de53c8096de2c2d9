# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from trl_marble.balance import WEIGHTINGS, equal_weights, get_weighting, mgda_weights


@st.composite
def gradient_sets(draw, max_rewards=5):
    """Gradients as rows; fewer columns than rows makes singular Gram matrices."""
    shape = (draw(st.integers(1, max_rewards)), draw(st.integers(1, 6)))
    return draw(arrays(np.float64, shape, elements=st.floats(-3, 3).map(lambda x: round(x, 3))))


def solve_by_enumeration(gram, floor=0.0):
    """The exact minimum: on the optimal face (the weights above the floor) it solves a linear system."""
    size = len(gram)
    best, best_value = None, np.inf
    for count in range(1, size + 1):
        for face in combinations(range(size), count):
            face = list(face)
            weights = np.full(size, floor)
            others = [k for k in range(size) if k not in face]
            system = np.zeros((count + 1, count + 1))
            system[:count, :count] = gram[np.ix_(face, face)]
            system[:count, count] = system[count, :count] = 1
            right = np.append(-gram[np.ix_(face, others)] @ weights[others], 1 - floor * len(others))
            weights[face] = np.linalg.lstsq(system, right, rcond=1e-12)[0][:count]
            value = weights @ gram @ weights / 2
            feasible = weights.min() >= floor - 1e-9 and abs(weights.sum() - 1) < 1e-9
            if feasible and value < best_value:
                best, best_value = weights, value
    return best, best_value


@settings(deadline=None, derandomize=True, max_examples=150)
@given(gradients=gradient_sets(), share=st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]))
def test_agrees_with_enumeration(gradients, share):
    gram = gradients @ gradients.T
    floor = share / len(gram)
    weights = mgda_weights(gram, floor).numpy()
    assert abs(weights.sum() - 1) < 1e-12 and weights.min() >= floor - 1e-15
    expected, value = solve_by_enumeration(gram, floor)
    scale = max(np.abs(gram).max(), 1e-12)
    assert weights @ gram @ weights / 2 <= value + 1e-8 * scale
    # The direction is unique even where its weights are not.
    assert np.linalg.norm((weights - expected) @ gradients) <= 2e-4 * np.sqrt(scale)


@pytest.mark.parametrize("size", [2, 5, 10])
def test_agrees_with_slsqp(size):
    gradients = np.random.default_rng(size).normal(size=(size, 30)) + 0.3
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    gram = gradients @ gradients.T
    expected = minimize(
        lambda a: a @ gram @ a / 2,
        np.full(size, 1 / size),
        jac=lambda a: gram @ a,
        bounds=[(0, None)] * size,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    ).x
    np.testing.assert_allclose(mgda_weights(gram).numpy(), expected, atol=1e-6)


@settings(deadline=None, derandomize=True)
@given(gradients=gradient_sets())
def test_the_direction_conflicts_with_no_gradient(gradients):
    gram = gradients @ gradients.T
    products = gram @ mgda_weights(gram).numpy()
    assert products.min() >= -1e-8 * max(np.abs(gram).max(), 1e-12)


@settings(deadline=None, derandomize=True)
@given(gradients=gradient_sets(), exponent=st.integers(-12, 12))
def test_rescaling_the_gram_matrix_changes_nothing(gradients, exponent):
    gram = gradients @ gradients.T
    np.testing.assert_allclose(
        mgda_weights(gram * 4.0**exponent).numpy(), mgda_weights(gram).numpy(), rtol=0, atol=1e-12
    )


@settings(deadline=None, derandomize=True)
@given(gradients=gradient_sets(), data=st.data())
def test_permutation_equivariance(gradients, data):
    order = data.draw(st.permutations(range(len(gradients))))
    gram = gradients @ gradients.T
    permuted = gram[np.ix_(order, order)]
    np.testing.assert_allclose(mgda_weights(permuted).numpy(), mgda_weights(gram).numpy()[order], atol=1e-5)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        ([[3.0, 4.0]], [1.0]),
        ([[0.0]], [1.0]),
        ([[1.0, 0.0], [1.0, 0.0]], [0.5, 0.5]),
        ([[1.0, 2.0]] * 4, [0.25] * 4),
        ([[1.0, 0.0], [-1.0, 0.0]], [0.5, 0.5]),
        ([[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1 / 3] * 3),
        ([[0.0, 0.0], [1.0, 0.0]], [1.0, 0.0]),
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        ([[1.0, 0.0], [0.0, 2.0]], [0.8, 0.2]),
        ([[1.0, 0.0], [5.0, 1.0]], [1.0, 0.0]),
        ([[1e6, 0.0], [0.0, 1e-6]], [0.0, 1.0]),
    ],
)
def test_known_solutions(gradients, expected):
    gradients = torch.tensor(gradients, dtype=torch.float64)
    torch.testing.assert_close(
        mgda_weights(gradients @ gradients.T), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0
    )


def test_many_dependent_gradients_in_float32():
    # Rank 3, rounded to float32: eigenvalues are slightly negative.
    gradients = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    gradients[:, 0] = gradients[:, 0].abs() + 1
    weights = mgda_weights(gradients @ gradients.T)
    assert weights.dtype == torch.float32 and weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert (gradients @ (weights @ gradients)).min() > 0


def test_the_floor_holds():
    gram = torch.tensor([[1.0, 5.0], [5.0, 30.0]])
    assert torch.equal(mgda_weights(gram), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(mgda_weights(gram, floor=0.2), torch.tensor([0.8, 0.2]))
    for size in range(1, 60):  # 1 / K is not exact
        assert torch.equal(mgda_weights(torch.eye(size), floor=1 / size), torch.full((size,), 1 / size))


@pytest.mark.parametrize("solve", [mgda_weights, equal_weights])
def test_takes_lists_and_arrays(solve):
    expected = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(solve([[2, 0], [0, 2]]), expected)
    torch.testing.assert_close(solve([[2.0, 0.0], [0.0, 2.0]]), expected)
    torch.testing.assert_close(solve(np.eye(2)), expected.double())
    torch.testing.assert_close(solve(torch.eye(2, requires_grad=True)), expected)


@pytest.mark.parametrize("solve", [mgda_weights, equal_weights])
def test_bad_gram_matrices_are_refused(solve):
    with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
        solve(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"square.*\(0, 0\)"):
        solve(torch.ones(0, 0))
    with pytest.raises(ValueError, match=r"entry \(0, 1\) is nan"):
        solve([[1.0, float("nan")], [float("nan"), 1.0]])
    with pytest.raises(ValueError, match=r"entry \(1, 1\) is inf"):
        solve([[1.0, 0.0], [0.0, float("inf")]])
    with pytest.raises(ValueError, match=r"not symmetric: entry \(0, 1\) is 0.5, entry \(1, 0\) is -0.5"):
        solve(np.array([[1.0, 0.5], [-0.5, 1.0]]))


def test_a_matrix_that_is_no_gram_matrix_is_refused():
    with pytest.raises(ValueError, match="eigenvalue of -1 times its largest entry"):
        mgda_weights([[0.0, 2.0], [2.0, 0.0]])


@pytest.mark.parametrize("floor", [-0.1, 0.51, float("nan")])
def test_bad_floors_are_refused(floor):
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1/K\] = \[0, 0.5\].*got"):
        mgda_weights(torch.eye(2), floor)


def test_a_superfluous_gradient_weighs_exactly_nothing():
    # The solver itself leaves 5.6e-17 here.
    assert mgda_weights([[1.0, 5.0], [5.0, 30.0]]).tolist() == [1.0, 0.0]


def test_get_weighting():
    assert get_weighting() is get_weighting(None) is get_weighting("mgda") is mgda_weights
    assert get_weighting("equal") is equal_weights
    assert set(WEIGHTINGS) == {"mgda", "equal"}
    own = torch.nn.Softmax(dim=0)
    assert get_weighting(own) is own
    with pytest.raises(ValueError, match="'upgrad': use one of .'equal', 'mgda'."):
        get_weighting("upgrad")
    with pytest.raises(TypeError, match="got int"):
        get_weighting(3)
