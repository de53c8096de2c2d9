# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Steps with noise against their published forms, and on data whose velocity is known."""

import math

import pytest
import torch

from trl_marble.sde import SDESteps


GRID = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.2, 0.0])
KINDS = pytest.mark.parametrize("kind", ["flow_sde", "cps"])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flow_sde_is_the_published_step():
    """`x (1 + s^2 dt / 2t) + v (1 + s^2 (1 - t) / 2t) dt` with noise `s sqrt(-dt)`."""
    steps, x, v = SDESteps.of_grid("flow_sde", 0.7, GRID), random(2, 3), random(2, 3, seed=1)
    for i in range(len(GRID) - 1):
        t, dt = GRID[i].item(), GRID[i + 1].item() - GRID[i].item()
        s2 = 0.49 * t / (1 - (t if i > 0 else GRID[1].item()))
        mean = x * (1 + s2 * dt / (2 * t)) + v * (1 + s2 * (1 - t) / (2 * t)) * dt
        step = steps.at(i).expand(x)
        torch.testing.assert_close(step.mean(x, v), mean, rtol=1e-12, atol=1e-14)
        assert step.deviation[0].item() == pytest.approx(math.sqrt(-s2 * dt), rel=1e-12)


def test_cps_is_the_published_step():
    """`(1 - t') x0 + sqrt(t'^2 - s^2) n` with noise `s = t' sin(a pi / 2)`."""
    steps, x, v = SDESteps.of_grid("cps", 0.7, GRID), random(2, 3), random(2, 3, seed=1)
    for i in range(len(GRID) - 1):
        t, t_next = GRID[i].item(), GRID[i + 1].item()
        s = t_next * math.sin(0.35 * math.pi)
        mean = (1 - t_next) * (x - t * v) + math.sqrt(t_next**2 - s**2) * (x + (1 - t) * v)
        step = steps.at(i).expand(x)
        torch.testing.assert_close(step.mean(x, v), mean, rtol=1e-12, atol=1e-14)
        assert step.deviation[0].item() == pytest.approx(s, abs=1e-12)


@KINDS
def test_the_velocity_factor_is_the_derivative_of_the_mean(kind):
    steps = SDESteps.of_grid(kind, 0.7, GRID)
    for i in range(len(GRID) - 1):
        step, x, v = steps.at(i).expand(random(3, 4)), random(3, 4), random(3, 4, seed=1).requires_grad_()
        (derivative,) = torch.autograd.grad(step.mean(x, v).sum(), v)
        torch.testing.assert_close(derivative, step.velocity_factor[:, None].expand(3, 4), rtol=1e-12, atol=1e-14)


@KINDS
def test_without_noise_it_is_a_step_of_eulers_method(kind):
    steps, x, v = SDESteps.of_grid(kind, 0.0, GRID), random(2, 3), random(2, 3, seed=1)
    for i in range(len(GRID) - 1):
        step = steps.at(i).expand(x)
        assert not step.deviation.any() and not step.removed.any()
        assert torch.equal(step.mean(x, v), x + (GRID[i + 1].double() - GRID[i].double()) * v)


@KINDS
def test_samples_of_a_gaussian_keep_the_mean_and_the_variance_of_their_time(kind):
    """
    Data of mean 2 and deviation 0.5, whose velocity is known. The noise must not change the distribution of `x_t`, and
    must change each sample.
    """
    mean, deviation, number = 2.0, 0.5, 20_000
    times = torch.linspace(1, 0, 201)

    def variance(t):
        return (1 - t) ** 2 * deviation**2 + t**2

    def velocity(x, t):
        # E[e - x0 | x_t], of two variables that are Gaussian together.
        return -mean + (t - (1 - t) * deviation**2) / variance(t) * (x - (1 - t) * mean)

    steps = SDESteps.of_grid(kind, 0.1 if kind == "cps" else 0.7, times)
    generator = torch.Generator().manual_seed(0)
    x = ode = torch.randn(number, 1, generator=generator, dtype=torch.float64)
    for i in range(170):
        step, t = steps.at(i), times[i].item()
        x = step.expand(x).mean(x, velocity(x, t)) + step.deviation * torch.randn(
            number, 1, generator=generator, dtype=torch.float64
        )
        ode = ode + (step.t_next - step.t) * velocity(ode, t)
        if i in (40, 100, 169):
            expected = variance(step.t_next.item())
            assert x.mean().item() == pytest.approx((1 - step.t_next.item()) * mean, abs=0.03)
            assert x.var().item() == pytest.approx(expected, rel=0.06)
            assert ode.var().item() == pytest.approx(expected, rel=0.06)
    assert torch.corrcoef(torch.cat([x, ode], dim=1).T)[0, 1] < 0.9
