# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_marble.balance import (
    NFTLosses,
    SampleCoefficients,
    advantage_coefficients,
    assign_gradients,
    flatten_gradients,
    gram_matrix,
    mix_coefficients,
    nft_coefficients,
    per_reward_gradients,
    weighted_loss,
)


def coefficients_of(problem, samples=range(6), make=nft_coefficients):
    return make(problem.advantages[:, list(samples)], problem.counts, problem.advantage_clip, problem.nft_beta)


@pytest.mark.parametrize("make", [nft_coefficients, advantage_coefficients])
@pytest.mark.parametrize("num_rewards", [1, 3, 5])
def test_each_row_is_the_gradient_of_its_loss(make_problem, num_rewards, make):
    problem = make_problem(num_rewards)
    coefficients = coefficients_of(problem, make=make)
    gradients = per_reward_gradients(problem.losses(range(6)), coefficients, problem.parameters)
    for k in range(num_rewards):
        problem.net.zero_grad()
        losses = problem.losses(range(6))
        (coefficients.positive[k] @ losses.positive + coefficients.negative[k] @ losses.negative).backward()
        expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in problem.parameters]
        torch.testing.assert_close(gradients[k], torch.cat([g.flatten() for g in expected]), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("make", [nft_coefficients, advantage_coefficients])
def test_identity_2_two_cotangents_serve_every_reward(make_problem, make):
    """g_k = sum_i positive[k,i] J_i^T a_i + negative[k,i] J_i^T b_i, with a and b the same for every k."""
    problem = make_problem(4)
    coefficients = coefficients_of(problem, make=make)
    shared = torch.zeros(2, 6, sum(p.numel() for p in problem.parameters), dtype=torch.float64)
    for i in range(6):
        for row, loss in enumerate(problem.losses([i])):  # J_i^T a_i, then J_i^T b_i
            grads = torch.autograd.grad(loss.sum(), problem.parameters, retain_graph=True, allow_unused=True)
            shared[row, i] = flatten_gradients(grads, problem.parameters)
    expected = coefficients.positive @ shared[0] + coefficients.negative @ shared[1]
    actual = per_reward_gradients(problem.losses(range(6)), coefficients, problem.parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4], [5]]])
def test_how_the_step_is_split_does_not_matter(make_problem, split):
    problem = make_problem(3)
    whole = per_reward_gradients(problem.losses(range(6)), coefficients_of(problem), problem.parameters)
    parts = sum(
        per_reward_gradients(problem.losses(s), coefficients_of(problem, s), problem.parameters) for s in split
    )
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-12)


def test_unused_parameters_have_gradient_zero_and_grad_stays_untouched(make_problem):
    problem = make_problem(2)
    gradients = per_reward_gradients(problem.losses(range(6)), coefficients_of(problem), problem.parameters)
    start = sum(
        p.numel() for p in problem.parameters[: [p is problem.net.unused for p in problem.parameters].index(True)]
    )
    assert torch.equal(gradients[:, start : start + 4], torch.zeros(2, 4, dtype=torch.float64))
    assert gradients.abs().sum(dim=1).min() > 0
    assert all(p.grad is None for p in problem.parameters)


def test_rewards_without_a_sample_cost_no_backward_pass(make_problem):
    problem = make_problem(4)
    problem.advantages[[0, 2, 3]] = torch.nan
    problem.counts[3] = 0
    losses = problem.losses(range(6))
    passes = []
    losses.positive.register_hook(lambda grad: passes.append(1))
    gradients = per_reward_gradients(losses, coefficients_of(problem), problem.parameters)
    assert len(passes) == 1
    assert (gradients != 0).any(dim=1).tolist() == [False, True, False, False]


def test_nothing_to_do():
    parameter = torch.ones(3, requires_grad=True)
    losses = NFTLosses(parameter[:2] * 2, parameter[:2] * 3)
    zero = SampleCoefficients(torch.zeros(2, 2), torch.zeros(2, 2))
    assert torch.equal(per_reward_gradients(losses, zero, [parameter]), torch.zeros(2, 3))


def test_the_graph_is_freed_unless_asked_otherwise(make_problem):
    problem = make_problem(2)
    losses = problem.losses(range(6))
    mixed = mix_coefficients(coefficients_of(problem), torch.ones(2))
    per_reward_gradients(losses, coefficients_of(problem), problem.parameters, retain_graph=True)
    per_reward_gradients(losses, coefficients_of(problem), problem.parameters)
    with pytest.raises(RuntimeError, match="second time"):
        weighted_loss(losses, mixed).backward()


def test_half_precision_parameters_give_float32_rows():
    parameter = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    losses = NFTLosses(parameter[:2].float() * 2, parameter[:2].float() * 3)
    ones = SampleCoefficients(torch.ones(1, 2), torch.ones(1, 2))
    gradients = per_reward_gradients(losses, ones, [parameter])
    assert gradients.dtype == torch.float32
    assert gradients.tolist() == [[5.0, 5.0, 0.0]]


def test_a_direction_goes_back_to_where_it_came_from(make_problem):
    problem = make_problem(2)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gradients = per_reward_gradients(problem.losses(range(6)), coefficients_of(problem), problem.parameters)
    direction = weights @ gradients
    problem.net.enter.weight.grad = torch.full_like(problem.net.enter.weight, 1e9)  # is replaced, not added to
    assign_gradients(direction, problem.parameters)
    assigned = [p.grad.clone() for p in problem.parameters]
    problem.net.zero_grad()
    weighted_loss(problem.losses(range(6)), mix_coefficients(coefficients_of(problem), weights)).backward()
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
    with pytest.raises(ValueError, match=r"shape \(rewards, samples\)"):
        per_reward_gradients(
            NFTLosses(torch.ones(2), torch.ones(2)), SampleCoefficients(torch.ones(2), torch.ones(2)), parameters
        )
    with pytest.raises(ValueError, match="rewards, parameters"):
        gram_matrix(torch.ones(3))
