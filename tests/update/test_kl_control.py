# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A coefficient of the KL that follows the KL."""

import math

import pytest

from trl_marble.update import KLControl


def test_rises_when_the_kl_is_above_its_target_and_falls_four_times_slower_below():
    control = KLControl(0.5, target=0.1)
    control.update(0.1 * math.e)
    assert control.beta == pytest.approx(0.5 * math.exp(0.2))
    control = KLControl(0.5, target=0.1)
    control.update(0.1 / math.e)
    assert control.beta == pytest.approx(0.5 * math.exp(-0.05))


def test_a_step_changes_it_by_a_limited_factor_whatever_the_kl_is():
    control = KLControl(0.5, target=0.1)
    control.update(1e6)
    assert control.beta == pytest.approx(0.5 * math.exp(0.2))
    control = KLControl(0.5, target=0.1)
    control.update(0.0)  # the first step: the policy is the base
    assert control.beta == pytest.approx(0.5 * math.exp(-0.05))


def test_follows_a_running_mean():
    control = KLControl(1.0, target=0.1)
    control.update(0.1)  # the mean starts there
    assert control.beta == 1.0
    control.update(0.2)  # 0.8 * 0.1 + 0.2 * 0.2 = 0.12
    assert control.beta == pytest.approx(math.exp(0.2 * math.log(1.2)))


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl):
    control = KLControl(0.5, target=0.1)
    control.update(0.3)
    before = control.state_dict()
    control.update(kl)
    assert control.state_dict() == before


@pytest.mark.parametrize(("start", "sensitivity"), [(0.5, 0.02), (0.001, 0.02), (0.5, 0.0005)])
def test_holds_a_kl_that_depends_on_it(start, sensitivity):
    """A policy whose KL moves toward sensitivity / beta, from any start."""
    control, kl = KLControl(start, target=0.05), 0.0
    for _ in range(400):
        kl += 0.1 * (sensitivity / control.beta - kl)
        control.update(kl)
    assert kl == pytest.approx(0.05, rel=0.05)


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
    assert logged == pytest.approx([0.5, 0.5 * math.exp(-0.05), 0.5 * math.exp(0.15)])
    assert trainer.update.loss.beta == pytest.approx(logged[-1])
