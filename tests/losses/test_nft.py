# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from trl_marble.balance import (
    NFTLosses,
    SampleCoefficients,
    advantage_coefficients,
    anchor_coefficients,
    flatten_gradients,
    mix_coefficients,
    nft_coefficients,
    nft_losses,
    weighted_loss,
)


nan = float("nan")


def gradient(loss, parameters, retain_graph=False):
    return flatten_gradients(
        torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain_graph), parameters
    )


def row(coefficients, k):
    return SampleCoefficients(coefficients.positive[k], coefficients.negative[k])


def test_losses_by_hand():
    """Every quantity of the definition, sample by sample, in numpy."""
    generator = np.random.default_rng(0)
    v, v_old, x0, noise = generator.normal(size=(4, 3, 2, 5, 5))
    t, b = np.array([0.1, 0.5, 0.9]), 0.3
    x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    losses = nft_losses(*(torch.tensor(a) for a in (v, v_old, x_t, x0, t)), nft_beta=b)
    for i in range(3):
        for sign, loss in ((1, losses.positive[i]), (-1, losses.negative[i])):
            predicted = x_t[i] - t[i] * (v_old[i] + sign * b * (v[i] - v_old[i]))
            weight = max(np.abs(predicted - x0[i]).mean(), 1e-5)
            assert loss.item() == pytest.approx(((predicted - x0[i]) ** 2).mean() / weight, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4, 4)])
def test_any_trailing_shape_and_half_precision(shape):
    tensors = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    losses = nft_losses(*tensors, t=torch.tensor([0.2, 0.5, 0.8]), nft_beta=0.1)
    assert losses.positive.shape == losses.negative.shape == (3,)
    assert losses.positive.dtype == losses.negative.dtype == torch.float32
    expected = nft_losses(*(x.double() for x in tensors), t=torch.tensor([0.2, 0.5, 0.8]), nft_beta=0.1)
    torch.testing.assert_close(losses.positive.double(), expected.positive, rtol=1e-5, atol=1e-6)


def test_a_perfect_prediction_meets_the_clamp_and_not_a_division_by_zero():
    x0 = torch.randn(2, 3)
    noise = torch.randn(2, 3)
    velocity = (noise - x0).requires_grad_()
    t = torch.tensor([0.5, 0.5])
    losses = nft_losses(velocity, velocity, x0 + 0.5 * (noise - x0), x0, t, nft_beta=0.1)
    (losses.positive + losses.negative).sum().backward()
    assert velocity.grad.isfinite().all() and losses.positive.max() < 1e-6


def test_gradients_reach_the_velocity_only_and_not_through_the_adaptive_weight():
    generator = torch.Generator().manual_seed(0)
    velocity, old, x_t, x0 = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    velocity.requires_grad_()
    old.requires_grad_()
    t, b = torch.tensor([0.3, 0.6], dtype=torch.float64), 0.2
    losses = nft_losses(velocity, old, x_t, x0, t, b)
    losses.positive.sum().backward()
    assert old.grad is None
    error = (x_t - t[:, None] * (old + b * (velocity - old)) - x0).detach()
    # d mean(e^2) / w with w constant: 2 e / D / w * (-t b)
    expected = 2 * error / 4 / error.abs().mean(dim=1, keepdim=True) * (-t[:, None] * b)
    torch.testing.assert_close(velocity.grad, expected)


def test_coefficients_by_hand():
    advantages = torch.tensor([[5.0, 0.0, nan], [nan, -5.0, 2.5], [nan, nan, nan]])
    coefficients = nft_coefficients(advantages, torch.tensor([4, 2, 0]), advantage_clip=5.0, nft_beta=0.1)
    # C/b = 50, divided by the counts: 12.5 and 25; r = 1, 1/2 | 0, 3/4
    expected_positive = torch.tensor([[12.5, 6.25, 0], [0, 0, 18.75], [0, 0, 0]])
    expected_negative = torch.tensor([[0, 6.25, 0], [0, 25, 6.25], [0, 0, 0]])
    torch.testing.assert_close(coefficients.positive, expected_positive)
    torch.testing.assert_close(coefficients.negative, expected_negative)


@pytest.mark.parametrize("nft_beta", [0.1, 1.0])
@pytest.mark.parametrize("num_rewards", [1, 2, 5])
def test_signal_plus_anchor_is_the_loss(make_problem, num_rewards, nft_beta):
    """L_k = H_k + S_k, in the coefficients and through autograd."""
    problem = make_problem(num_rewards, nft_beta=nft_beta)
    settings = (problem.advantage_clip, problem.nft_beta)
    whole = nft_coefficients(problem.advantages, problem.counts, *settings)
    signal = advantage_coefficients(problem.advantages, problem.counts, *settings)
    losses = problem.losses(range(6))
    for k in range(num_rewards):
        anchor = anchor_coefficients(~problem.advantages[k].isnan(), problem.counts[k], *settings)
        torch.testing.assert_close(whole.positive[k], signal.positive[k] + anchor.positive, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(whole.negative[k], signal.negative[k] + anchor.negative, rtol=1e-6, atol=1e-7)
        expected = weighted_loss(losses, row(whole, k))
        torch.testing.assert_close(
            weighted_loss(losses, row(signal, k)) + weighted_loss(losses, anchor), expected, rtol=1e-6, atol=0
        )


def test_signal_by_hand():
    coefficients = advantage_coefficients(torch.tensor([[3.0, nan, -1.0]]), torch.tensor([2]), 5.0, 0.1)
    torch.testing.assert_close(coefficients.positive, torch.tensor([[7.5, 0.0, -2.5]]))  # A / (2 b n)
    torch.testing.assert_close(coefficients.negative, -coefficients.positive)


def test_the_anchor_pulls_nowhere_at_the_old_policy(make_problem):
    problem = make_problem(1)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x_t = x0 + t[:, None, None, None] * (noise - x0)
    velocity = problem.net(x_t, t)
    losses = nft_losses(velocity, velocity, x_t, x0, t, 0.1)
    anchor = anchor_coefficients(torch.tensor([True, False, True]), 2, 5.0, 0.1)
    signal = SampleCoefficients(anchor.positive, -anchor.negative)
    pull = gradient(weighted_loss(losses, anchor), problem.parameters, retain_graph=True)
    push = gradient(weighted_loss(losses, signal), problem.parameters)
    assert pull.abs().max() < 1e-12 < 1e-3 < push.abs().max()


@pytest.mark.parametrize("num_rewards", [1, 2, 5])
def test_identity_1_the_mixed_loss_is_the_mix_of_gradients(make_problem, num_rewards):
    """sum_k w_k L_k as one loss has the gradient sum_k w_k g_k, each g_k by its own forward and backward pass."""
    problem = make_problem(num_rewards, seed=num_rewards)
    coefficients = nft_coefficients(problem.advantages, problem.counts, problem.advantage_clip, problem.nft_beta)
    weights = torch.rand(num_rewards, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    separately = sum(
        weights[k] * gradient(weighted_loss(problem.losses(range(6)), row(coefficients, k)), problem.parameters)
        for k in range(num_rewards)
    )
    mixed = mix_coefficients(coefficients, weights)
    assert mixed.positive.shape == mixed.negative.shape == (6,)
    at_once = gradient(weighted_loss(problem.losses(range(6)), mixed), problem.parameters)
    torch.testing.assert_close(at_once, separately, rtol=1e-11, atol=1e-12)


def test_mixing_takes_weights_of_another_dtype():
    coefficients = SampleCoefficients(torch.ones(2, 3), torch.zeros(2, 3))
    mixed = mix_coefficients(coefficients, torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert torch.equal(mixed.positive, torch.full((3,), 0.75))


def test_bad_input_is_refused():
    advantages, counts = torch.tensor([[1.0, nan]]), torch.tensor([1])
    with pytest.raises(ValueError, match="size 7.0 lies outside"):
        nft_coefficients(torch.tensor([[7.0]]), counts, 5.0, 0.1)
    with pytest.raises(ValueError, match="size inf lies outside"):
        advantage_coefficients(torch.tensor([[float("inf")]]), counts, 5.0, 0.1)
    with pytest.raises(ValueError, match="Reward 0 applies to 1 samples here but its count is 0"):
        nft_coefficients(advantages, torch.tensor([0]), 5.0, 0.1)
    with pytest.raises(ValueError, match="one count per reward"):
        nft_coefficients(advantages, torch.tensor([1, 1]), 5.0, 0.1)
    with pytest.raises(ValueError, match="nft_beta must be positive, got 0"):
        nft_coefficients(advantages, counts, 5.0, 0.0)
    with pytest.raises(ValueError, match="advantage_clip must be positive, got -1"):
        nft_coefficients(advantages, counts, -1.0, 0.1)
    with pytest.raises(ValueError, match="boolean vector"):
        anchor_coefficients(torch.ones(2), 2, 5.0, 0.1)
    with pytest.raises(ValueError, match="count is 0"):
        anchor_coefficients(torch.tensor([True]), 0, 5.0, 0.1)
    coefficients = nft_coefficients(advantages, counts, 5.0, 0.1)
    with pytest.raises(ValueError, match="one weight per reward"):
        mix_coefficients(coefficients, torch.ones(2))
    with pytest.raises(ValueError, match="mix_coefficients"):
        weighted_loss(NFTLosses(torch.ones(2), torch.ones(2)), coefficients)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"x0 has shape \(2, 4\)"):
        nft_losses(x, x, x, torch.zeros(2, 4), torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="one time per sample"):
        nft_losses(x, x, x, x, torch.zeros(3), 0.1)


def test_the_clip_may_be_rounded_to_float32():
    clip = 0.1  # as a float32 it is a little more
    coefficients = nft_coefficients(torch.tensor([[clip, -clip]]), torch.tensor([2]), clip, 0.1)
    torch.testing.assert_close(coefficients.positive, torch.tensor([[0.5, 0.0]]), atol=1e-6, rtol=0)
