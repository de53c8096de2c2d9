# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Advantage weighted matching against its published form, written out with autograd in float64."""

import pytest
import torch

from trl_marble import MarbleConfig
from trl_marble.balance import Objective, SeparateBackward
from trl_marble.losses import AWMLoss, Penalties


WEIGHTINGS = {
    "ghuber": lambda t, mse: t / 0.25 * ((mse + 1e-10) ** 0.25 - 1e-10**0.25),
    "huber": lambda t, mse: t * ((mse + 1e-10) ** 0.5 - 1e-5),
    "t": lambda t, mse: t * mse,
    "t2": lambda t, mse: t**2 * mse,
    "uniform": lambda t, mse: mse,
}


def awm(**settings):
    defaults = {
        "awm_weighting": "ghuber",
        "awm_power": 0.25,
        "awm_off_policy": False,
        "awm_clip_range": 1.0,
        "awm_ema_beta": 0.0,
        "advantage_clip": 5.0,
        "beta": 0.0,
    }
    return AWMLoss(**(defaults | settings))


def log_likelihood(velocity, drawn, weighting):
    mse = (velocity - (drawn.noise - drawn.x0)).square().mean(dim=1)
    return -WEIGHTINGS[weighting](drawn.t, mse)


@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("clip", [0.02, 1.0])
def test_all_gradients_from_one_weighted_pass_are_those_of_k_losses(make_problem, weighting, off_policy, clip):
    """sum_i (m/n) max(-A ratio, -A clip(ratio)), one autograd call per reward."""
    problem = make_problem(num_rewards=4, batch=8)
    loss = awm(awm_weighting=weighting, awm_off_policy=off_policy, awm_clip_range=clip)
    velocity = problem.velocity()
    terms = loss.terms(velocity, problem.drawn, problem.frozen)
    coefficients = loss.coefficients(terms, problem.advantages, problem.counts)
    assert len(coefficients) == 1  # C = 1
    rows = SeparateBackward(4, list(problem.net.parameters()))
    rows.backward([Objective(terms[0], coefficients[0])], retain_graph=True)

    log_p = log_likelihood(velocity, problem.drawn, weighting)
    old = log_likelihood(problem.frozen.old, problem.drawn, weighting) if off_policy else log_p
    ratio = (log_p - old.detach()).exp()
    clipped_samples = 0
    for k, advantages in enumerate(problem.advantages / 5):
        valid = ~advantages.isnan()
        a, n = advantages[valid], problem.counts.valid[k]
        both = torch.stack([-a * ratio[valid], -a * ratio[valid].clamp(1 - clip, 1 + clip)])
        clipped_samples += int((both[1] > both[0]).sum())
        expected = problem.gradient(both.max(dim=0).values.sum() / n)
        torch.testing.assert_close(rows.gradients[k], expected, rtol=1e-9, atol=1e-13)
    assert (clipped_samples > 0) == (off_policy and clip == 0.02)


@pytest.mark.parametrize(
    ("settings", "needs", "penalties", "samples_with_old"),
    [
        ({}, set(), Penalties(), False),
        ({"beta": 0.2, "awm_ema_beta": 0.7}, set(), Penalties(old=0.7, reference=0.2), False),
        ({"awm_off_policy": True}, {"old"}, Penalties(), True),
    ],
)
def test_no_forward_pass_of_the_old_policy_where_none_is_needed(settings, needs, penalties, samples_with_old):
    assert awm(**settings).needs == needs
    assert awm(**settings).penalties == penalties
    assert awm(**settings).samples_with_old == samples_with_old


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"policy_loss": "nfd"},
            r"`policy_loss` is 'nfd'; it must be one of 'nft', 'awm', 'crd', 'dgpo', 'gdro', 'dpo', 'grpo'",
        ),
        ({"policy_loss": "awm", "nft_beta": 0.2}, r"`nft_beta=0.2` has no effect with `policy_loss='awm'`"),
        ({"policy_loss": "awm", "balance_on": "loss"}, r"`balance_on='loss'` has no effect with `policy_loss='awm'`"),
        ({"awm_ema_beta": 0.5}, r"`awm_ema_beta=0.5` has no effect with `policy_loss='nft'`"),
        ({"policy_loss": "awm", "awm_clip_range": 0.1}, "has no effect with `awm_off_policy=False`"),
        ({"policy_loss": "awm", "awm_weighting": "t", "awm_power": 0.5}, "has no effect with `awm_weighting='t'`"),
        ({"policy_loss": "awm", "num_iterations": 2}, "takes one optimizer step for each generation batch"),
        ({"policy_loss": "awm", "awm_ema_beta": 0.0, "old_policy_preset": 1}, "need no old policy"),
        ({"policy_loss": "awm", "awm_power": 1.5}, r"`awm_power` is 1.5; it must be in \(0, 1\]"),
        ({"policy_loss": "awm", "awm_ema_beta": -1.0}, "`awm_ema_beta` is -1.0"),
        ({"policy_loss": "awm", "awm_off_policy": True, "awm_clip_range": 0.0}, "`awm_clip_range` is 0.0"),
        ({"policy_loss": "awm", "awm_weighting": "t3"}, "`awm_weighting` is 't3'"),
    ],
)
def test_settings_that_the_loss_does_not_use_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MarbleConfig(str(tmp_path), use_cpu=True, **settings)


def test_awm_trains_with_its_own_settings(make_trainer):
    trainer = make_trainer(policy_loss="awm", old_policy_preset=3, awm_ema_beta=1.0, beta=0.1)
    before = {name: weight.detach().clone() for name, weight in trainer.weights.trained.items()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.weights.trained.items())
    row = next(row for row in trainer.state.log_history if "balance/cos_min" in row)
    assert row["balance/cos_min"] >= -1e-6 and row["kl"] >= 0


def test_the_trained_policy_samples_on_policy(make_trainer):
    """The rollout of a step is that of the weights before it, however far the old policy lags behind."""
    settings = {"policy_loss": "awm", "max_steps": 2, "awm_ema_beta": 0.0, "learning_rate": 0.1}
    trainer = make_trainer(**settings)
    trainer.weights.old.lerp_ = lambda decay: None  # an old policy that never moves
    trainer.train()
    other = make_trainer(folder="other", **settings)
    other.train()
    for name, weight in trainer.weights.trained.items():
        assert torch.equal(weight, other.weights.trained[name])
