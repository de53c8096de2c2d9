# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A coefficient of the KL that follows the KL."""

import math
import random

import pytest

from trl_marble.update import KLControl


def test_rises_when_the_kl_is_above_its_target_and_falls_below_it():
    control = KLControl(0.5, target=0.1)
    control.update(0.2)
    assert control.beta == pytest.approx(0.5 * 2**0.05)
    control = KLControl(0.5, target=0.1)
    control.update(0.05)
    assert control.beta == pytest.approx(0.5 * 2**-0.05)


def test_a_step_changes_it_by_a_limited_factor_whatever_the_kl_is():
    control = KLControl(0.5, target=0.1)
    control.update(1e6)
    assert control.beta == pytest.approx(0.5 * math.exp(0.05))
    control = KLControl(0.5, target=0.1)
    control.update(0.0)  # the first step: the policy is the base
    assert control.beta == pytest.approx(0.5 * math.exp(-0.05))


def test_follows_where_the_running_mean_is_going():
    control = KLControl(1.0, target=0.1)
    control.update(0.1)  # the mean starts there
    assert control.beta == 1.0
    control.update(0.11)  # the mean is 0.101, and 0.131 in 30 steps
    assert control.beta == pytest.approx(1.31**0.05)
    control.update(0.05)  # the mean falls to 0.0959, and would be below 0
    assert control.beta == pytest.approx(1.31**0.05 * math.exp(-0.05))


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl):
    control = KLControl(0.5, target=0.1)
    control.update(0.3)
    before = control.state_dict()
    control.update(kl)
    assert control.state_dict() == before


@pytest.mark.parametrize("lag", [15, 25, 40])
@pytest.mark.parametrize("falling_rate", [True, False])
def test_holds_a_kl_that_follows_it_with_a_lag(lag, falling_rate):
    """
    A policy as ShapeWorld's: its distance moves toward one that depends on `beta` (a KL of .1 at .1, as measured),
    within `lag` steps at the full learning rate.
    """
    control, distance, steps = KLControl(0.5, target=0.06), 0.0, 150
    reached = []
    for step in range(steps):
        end = math.sqrt(0.105 * (control.beta / 0.1) ** -1.2)
        distance += (end - distance) / lag * (1 - step / steps if falling_rate else 1)
        reached.append(distance**2)
        control.update(reached[-1])
    assert max(reached) < 1.15 * 0.06
    assert reached[-1] == pytest.approx(0.06, rel=0.15)
    assert min(reached[75:]) > 0.8 * 0.06


@pytest.mark.parametrize(("noise", "above"), [(0.1, 0.03), (0.2, 0.1)])
def test_a_kl_with_noise_is_held_somewhat_above_the_target(noise, above):
    """As where a part of each step gives it. The policy is the one above; docs/long_runs.md has the numbers."""
    ends = []
    for seed in range(100):
        generator, control, distance, reached = random.Random(seed), KLControl(0.5, target=0.06), 0.0, []
        for _ in range(150):
            end = math.sqrt(0.105 * (control.beta / 0.1) ** -1.2)
            distance += (end - distance) / 25
            reached.append(distance**2)
            control.update(max(distance**2 * generator.gauss(1, noise), 0.0))
        ends.append(sum(reached[-30:]) / 30)
    assert sum(ends) / len(ends) == pytest.approx((1 + above) * 0.06, rel=0.01)


@pytest.mark.parametrize(("kl", "factor"), [(0.0, 1e-4), (1e3, 1e4)])
def test_stays_near_its_first_value_where_the_target_is_out_of_reach(kl, factor):
    """Else 15000 steps end at a `beta` of 0, with which no KL is measured, or at one that overflows."""
    control = KLControl(0.5, target=0.1)
    for _ in range(20_000):
        control.update(kl)
    assert control.beta == pytest.approx(0.5 * factor)


def test_goes_on_from_a_saved_state():
    control, other = KLControl(0.5, target=0.1), KLControl(0.1, target=0.1)
    control.update(0.3)
    other.load_state_dict(control.state_dict())
    for each in (control, other):
        each.update(0.07)
    assert other.state_dict() == control.state_dict()


def test_the_loss_of_each_step_has_the_coefficient_of_that_step(make_trainer):
    trainer = make_trainer(beta=0.5, kl_target=1e-9, max_steps=3)
    trainer.train()
    logged = [row["beta"] for row in trainer.state.log_history if "beta" in row]
    # The first step's KL is 0, those after it are far above the target.
    assert logged == pytest.approx([0.5, 0.5 * math.exp(-0.05), 0.5])
    assert trainer.update.loss.beta == pytest.approx(logged[-1])
