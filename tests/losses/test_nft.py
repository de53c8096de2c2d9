# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""DiffusionNFT's loss against its definition, written out with autograd."""

import numpy as np
import pytest
import torch

from trl_marble.losses import Drawn, FrozenVelocities, NFTLoss, Penalties, Sampled, StepCounts
from trl_marble.losses.nft import implicit_losses


NAN = float("nan")


def nft(balance_on="loss", nft_beta=0.1, beta=0.0):
    return NFTLoss(nft_beta=nft_beta, advantage_clip=5.0, balance_on=balance_on, beta=beta)


def test_losses_by_hand():
    """Every quantity of the definition, sample by sample, in numpy."""
    generator = np.random.default_rng(0)
    v, v_old, x0, noise = generator.normal(size=(4, 3, 2, 5, 5))
    t, b = np.array([0.1, 0.5, 0.9]), 0.3
    x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    losses = implicit_losses(*(torch.tensor(a) for a in (v, v_old, x_t, x0, t)), nft_beta=b)
    for i in range(3):
        for sign, loss in zip((1, -1), losses, strict=True):
            predicted = x_t[i] - t[i] * (v_old[i] + sign * b * (v[i] - v_old[i]))
            weight = max(np.abs(predicted - x0[i]).mean(), 1e-5)
            assert loss[i].item() == pytest.approx(((predicted - x0[i]) ** 2).mean() / weight, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4, 4)])
def test_any_trailing_shape_and_half_precision(shape):
    tensors = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(4)]
    t = torch.tensor([0.2, 0.5, 0.8])
    positive, negative = implicit_losses(*tensors, t=t, nft_beta=0.1)
    assert positive.shape == negative.shape == (3,)
    assert positive.dtype == negative.dtype == torch.float32
    expected, _ = implicit_losses(*(x.double() for x in tensors), t=t, nft_beta=0.1)
    torch.testing.assert_close(positive.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_perfect_prediction_meets_the_clamp_and_not_a_division_by_zero():
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    velocity = (noise - x0).requires_grad_()
    losses = implicit_losses(velocity, velocity, x0 + 0.5 * (noise - x0), x0, torch.tensor([0.5, 0.5]), nft_beta=0.1)
    torch.stack(losses).sum().backward()
    assert velocity.grad.isfinite().all() and losses[0].max() < 1e-6


def test_gradients_reach_the_velocity_only_and_not_through_the_adaptive_weight():
    generator = torch.Generator().manual_seed(0)
    velocity, old, x_t, x0 = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    velocity.requires_grad_()
    old.requires_grad_()
    t, b = torch.tensor([0.3, 0.6], dtype=torch.float64), 0.2
    implicit_losses(velocity, old, x_t, x0, t, b)[0].sum().backward()
    assert old.grad is None
    error = (x_t - t[:, None] * (old + b * (velocity - old)) - x0).detach()
    # d mean(e^2) / w with w constant: 2 e / D / w * (-t b)
    expected = 2 * error / 4 / error.abs().mean(dim=1, keepdim=True) * (-t[:, None] * b)
    torch.testing.assert_close(velocity.grad, expected)


def test_coefficients_by_hand():
    advantages = torch.tensor([[5.0, 0.0, NAN], [NAN, -5.0, 2.5], [NAN, NAN, NAN]])
    counts = StepCounts(torch.tensor([4, 2, 0]), torch.tensor(4), 4)
    positive, negative = nft().coefficients((), advantages, counts)
    # C/b = 50, divided by the counts: 12.5 and 25; r = 1, 1/2 | 0, 3/4
    torch.testing.assert_close(positive, torch.tensor([[12.5, 6.25, 0], [0, 0, 18.75], [0, 0, 0]]))
    torch.testing.assert_close(negative, torch.tensor([[0, 6.25, 0], [0, 25, 6.25], [0, 0, 0]]))
    (signal,) = nft("advantage").coefficients(
        (), torch.tensor([[3.0, NAN, -1.0]]), StepCounts(*torch.tensor([[2], [2]]), 3)
    )
    torch.testing.assert_close(signal, torch.tensor([[7.5, 0.0, -2.5]]))  # A / (2 b n)


@pytest.mark.parametrize("nft_beta", [0.1, 1.0])
def test_signal_plus_trust_region_is_the_loss_of_a_reward(make_problem, nft_beta):
    """With one reward, L = H + S: the same gradient by either way of balancing."""
    problem = make_problem(num_rewards=1)
    gradients = []
    for balance_on in ("loss", "advantage"):
        loss = nft(balance_on, nft_beta)
        velocity = problem.velocity()
        terms = loss.terms(velocity, problem.drawn, problem.frozen)
        own = loss.coefficients(terms, problem.advantages, problem.counts)
        total = sum((share[0] * term).sum() for share, term in zip(own, terms, strict=False))
        scored = ~problem.advantages.isnan().all(dim=0)
        frozen = FrozenVelocities(problem.frozen.old)
        shared = loss.shared(velocity, terms, frozen, scored, problem.counts)
        gradients.append(problem.gradient(total if shared is None else total + shared.sum()))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_the_trust_region_pulls_nowhere_at_the_old_policy(make_problem):
    problem = make_problem(on_policy=True)
    loss = nft("advantage")
    velocity = problem.velocity()
    old = FrozenVelocities(velocity.detach())  # as if it had been asked for
    terms = loss.terms(velocity, problem.drawn, old)
    scored = torch.ones(6, dtype=torch.bool)
    assert problem.gradient(loss.shared(velocity, terms, old, scored, problem.counts).sum()).abs().max() < 1e-12
    assert problem.gradient(terms[0].sum()).abs().max() > 1e-3
    free = loss.shared(
        velocity, loss.terms(velocity, problem.drawn, FrozenVelocities()), FrozenVelocities(), scored, problem.counts
    )
    assert not free.requires_grad and free.sum() > 0  # a value to log, without a backward pass


def test_the_kl_is_no_part_of_what_the_loss_computes_itself(make_problem):
    """It is a penalty, which may be taken from a part of a step."""
    assert nft(beta=0.2).needs == {"old"}
    assert nft().penalties == Penalties() and nft(beta=0.2).penalties == Penalties(reference=0.2)
    problem = make_problem()
    velocity = problem.velocity()
    terms = nft("advantage").terms(velocity, problem.drawn, problem.frozen)
    rest = problem.frozen, torch.ones(6, dtype=torch.bool), problem.counts
    with_kl, without = (nft("advantage", beta=beta).shared(velocity, terms, *rest) for beta in (0.2, 0.0))
    assert with_kl.equal(without)


def test_noise_is_drawn_sample_by_sample():
    """Cut into other micro-batches, each sample has the same times and the same noise."""
    x0, times = torch.randn(4, 2, 3), torch.linspace(0.1, 1, 5)

    def draw(samples):
        generators = [torch.Generator().manual_seed(i) for i in samples]
        return list(nft().draw(Sampled(x0[samples]), times, 3, generators))

    whole, second = draw([0, 1, 2, 3]), draw([2, 3])
    assert len(whole) == 3
    for one, other in zip(whole, second, strict=True):
        assert all(torch.equal(a[2:], b) for a, b in zip(one[:4], other[:4], strict=True))
    t = torch.stack([drawn.t for drawn in whole])
    assert all(len(set(column.tolist())) == 3 for column in t.T)  # without replacement
    drawn: Drawn = whole[0]
    torch.testing.assert_close(drawn.x_t, x0 + drawn.t[:, None, None] * (drawn.noise - x0))
