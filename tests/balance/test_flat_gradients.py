# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_marble.balance import assign_gradients, flatten_gradients, gram_matrix


def test_a_direction_goes_back_to_where_it_came_from(make_problem, separate_gradients):
    problem = make_problem(2)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gradients = separate_gradients(problem.terms(), problem.coefficients(), problem.parameters)
    direction = weights @ gradients
    problem.net.enter.weight.grad = torch.full_like(problem.net.enter.weight, 1e9)  # is replaced, not added to
    assign_gradients(direction, problem.parameters)
    assigned = [p.grad.clone() for p in problem.parameters]
    problem.net.zero_grad()
    mixed = [weights @ own @ term for term, own in zip(problem.terms(), problem.coefficients(), strict=True)]
    torch.stack(mixed).sum().backward()
    for parameter, grad in zip(problem.parameters, assigned, strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_assigned_gradients_are_copies_in_the_parameters_dtype():
    parameters = [torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True), torch.zeros(1, requires_grad=True)]
    direction = torch.arange(5.0)
    assign_gradients(direction, parameters)
    assert parameters[0].grad.dtype == torch.bfloat16
    assert parameters[0].grad.tolist() == [[0, 1], [2, 3]] and parameters[1].grad.tolist() == [4]
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    assert torch.equal(direction, torch.arange(5.0))


def test_gram_matrix_keeps_small_differences():
    # Over 2 ** 21 numbers, more than one chunk: float32 sums would lose the difference of the two rows.
    first = torch.full((1 << 21,), 1 / 3)
    second = -first.clone()
    second[0] = 0
    gram = gram_matrix(torch.stack([first, second]))
    third = first[0].double().item()
    assert gram.dtype == torch.float64
    assert gram.sum().item() == pytest.approx(third**2, rel=1e-6)  # |first + second|^2


def test_bad_input_is_refused():
    parameters = [torch.zeros(2, 2), torch.zeros(3)]
    with pytest.raises(ValueError, match=r"direction has shape \(6,\), the parameters have 7"):
        assign_gradients(torch.zeros(6), parameters)
    with pytest.raises(ValueError, match="Got 1 gradients for 2 parameters"):
        flatten_gradients([None], parameters)
    with pytest.raises(ValueError, match=r"Gradient 1 has shape \(2,\)"):
        flatten_gradients([None, torch.zeros(2)], parameters)
    with pytest.raises(ValueError, match="rewards, parameters"):
        gram_matrix(torch.ones(3))
