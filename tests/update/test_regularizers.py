# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The KL and AWM's trust region at a random part of the timesteps."""

import itertools
from statistics import mean

import pytest
import torch
from trainer_helpers import small_trainer

from trl_marble import MarbleConfig
from trl_marble.update import policy_update
from trl_marble.update.random_part import draw_fraction


# Two micro-batches at four timesteps.
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_inference_steps": 4,
    "timestep_fraction": 1.0,
    "beta": 0.5,
    "balance_every": 1,
    "regularizer_fraction": 1.0,
}
TIMES, MICRO_BATCHES = 4, 2
MICRO_STEPS = TIMES * MICRO_BATCHES
SUM = {"multi_objective_aggregation": "sum_then_normalize"}
AWM = {"policy_loss": "awm", "old_policy_preset": 3}


class Step:
    """An optimizer step of a trainer whose trained, old and base policies all differ, taken again and again."""

    def __init__(self, folder, lags=True, **settings):
        settings = SETTINGS | settings
        if "multi_objective_aggregation" in settings:
            del settings["balance_every"]
        self.trainer = trainer = small_trainer(folder, **settings)
        trainer.create_optimizer()
        torch.manual_seed(0)
        for parameter in trainer.weights.parameters:
            torch.nn.init.normal_(parameter, std=0.1)
        if not lags:
            trainer.weights.old.lerp_(0.0)
        self.batch = trainer._sample([0, 0, 1, 1], generation=0)  # prompt by prompt
        self.forwards, self.backwards = {"trained": 0, "old": 0, "base": 0}, 0
        trainer.metrics.clear()
        for kind, name in (("trained", "velocity"), ("old", "old_velocity"), ("base", "base_velocity")):
            setattr(trainer.weights, name, self.counted(kind, getattr(trainer.weights, name)))

    def counted(self, kind, ask):
        def velocity(*args):
            self.forwards[kind] += 1
            found = ask(*args)
            if found.requires_grad:
                found.register_hook(self.count_backward)
            return found

        return velocity

    def count_backward(self, grad):
        self.backwards += 1

    def take(self, number=0):
        """The update's direction, the loss, and the KL of each micro-step that has one."""
        trainer = self.trainer
        trainer.metrics.clear()
        positions = [trainer.layout.locate(place) for place in range(trainer.args.gradient_accumulation_steps)]
        trainer.update.begin(number, self.batch, positions[0])
        loss = sum(trainer.update.accumulate(self.batch, position) for position in positions)
        trainer.update.finish()
        direction = torch.cat([parameter.grad.flatten() for parameter in trainer.weights.parameters])
        trainer.optimizer.zero_grad()
        return direction, loss, [kl.item() for kl in trainer.metrics._values.get("kl", [])]


def choose(monkeypatch, *places):
    monkeypatch.setattr(policy_update, "draw_fraction", lambda *args: frozenset(places))


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"balance_on": "loss"}, SUM, AWM, AWM | {"awm_off_policy": True}, AWM | SUM | {"beta": 0.0}],
    ids=["advantage", "loss", "weighted sum", "AWM", "AWM off-policy", "trust region only"],
)
def test_the_mean_over_all_choices_is_the_full_gradient(tmp_path, monkeypatch, settings, number):
    step = Step(tmp_path / "run", **settings)
    expected, expected_loss, _ = step.take()
    found = []
    for places in itertools.combinations(range(TIMES), number):
        choose(monkeypatch, *places)
        found.append(step.take()[:2])
    directions, losses = zip(*found, strict=True)
    assert relative_error(torch.stack(directions).mean(dim=0), expected) < 1e-5
    torch.testing.assert_close(torch.stack(losses).mean(), expected_loss)
    assert all(relative_error(direction, expected) > 1e-3 for direction in directions)


@pytest.mark.parametrize(
    ("settings", "old", "base", "backwards"),
    [
        # On-policy the trust region of DiffusionNFT has no gradient, and what is balanced has a pass of its own.
        ({"lags": False}, 0, 1, TIMES + 1),
        ({"lags": True}, TIMES, 1, 2 * TIMES),
        ({"balance_on": "loss"}, TIMES, 1, 2 * TIMES + 1),
        (SUM, TIMES, 1, TIMES),
        (AWM, 1, 1, TIMES + 1),
        (AWM | {"beta": 0.0}, 1, 0, TIMES + 1),
        (AWM | {"awm_ema_beta": 0.0, "old_policy_preset": 0}, 0, 1, TIMES + 1),
        (AWM | {"awm_off_policy": True}, TIMES, 1, TIMES + 1),
    ],
)
def test_other_timesteps_cost_no_pass_for_it(tmp_path, settings, old, base, backwards):
    step = Step(tmp_path / "run", regularizer_fraction=0.25, **settings)
    step.take()
    passes = {"trained": TIMES, "old": old, "base": base}
    assert step.forwards == {kind: number * MICRO_BATCHES for kind, number in passes.items()}
    assert step.backwards == backwards * MICRO_BATCHES


def test_the_kl_that_is_logged_and_followed_is_the_mean_over_the_chosen(tmp_path, monkeypatch):
    step = Step(tmp_path / "run", kl_target=0.01)
    _, _, everywhere = step.take()
    assert len(everywhere) == MICRO_STEPS and len(set(everywhere)) == MICRO_STEPS
    choose(monkeypatch, 1, 2)
    _, _, chosen = step.take()
    assert chosen == everywhere[1:3] + everywhere[TIMES + 1 : TIMES + 3]  # of both micro-batches
    assert step.trainer.update._kl == pytest.approx(mean(chosen))


def test_each_step_draws_anew_and_does_not_touch_other_draws(tmp_path):
    step = Step(tmp_path / "run", regularizer_fraction=0.5)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn = []
    for number in range(8):
        step.take(number)
        drawn.append(step.trainer.update._regularized)
    assert torch.get_rng_state().equal(before)
    assert {len(each) for each in drawn} == {2} and len(set(drawn)) > 2
    step.take(3)
    assert step.trainer.update._regularized == drawn[3]  # as in a run that is resumed there


@pytest.mark.parametrize("settings", [{}, SUM, AWM], ids=["advantage", "weighted sum", "AWM"])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, settings):
    directions = [
        Step(
            tmp_path / str(size),
            **settings,
            regularizer_fraction=0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        ).take(3)
        for size in (1, 2, 4)
    ]
    for direction, loss, _ in directions[1:]:
        assert relative_error(direction, directions[0][0]) < 1e-5
        torch.testing.assert_close(loss, directions[0][1])


def test_every_place_is_drawn_equally_often():
    drawn = [draw_fraction(0.3, 10, seed) for seed in range(3000)]
    assert {len(each) for each in drawn} == {3}
    often = [sum(place in each for each in drawn) for place in range(10)]
    assert all(750 < number < 1050 for number in often)  # 900, with a standard deviation of 25


@pytest.mark.parametrize(
    ("fraction", "total", "number"), [(1.0, 7, 7), (0.9, 2, 2), (0.5, 3, 2), (1 / 8, 96, 12), (1e-3, 96, 1)]
)
def test_the_number_is_rounded_and_at_least_one(fraction, total, number):
    assert len(draw_fraction(fraction, total, seed=0)) == number


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularizer_fraction": 0.0}, r"`regularizer_fraction` is 0.0; it must be in \(0, 1\]"),
        ({"regularizer_fraction": 1.5}, r"`regularizer_fraction` is 1.5; it must be in \(0, 1\]"),
        ({"beta": 0.0}, "`regularizer_fraction=0.5` has no effect with `beta=0.0`, which leaves no penalty"),
        (
            {"policy_loss": "awm", "beta": 0.0, "awm_ema_beta": 0.0},
            "`regularizer_fraction=0.5` has no effect with `beta=0.0` and `awm_ema_beta=0.0`, which leaves no penalty",
        ),
    ],
)
def test_a_fraction_of_nothing_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MarbleConfig(str(tmp_path), use_cpu=True, **({"regularizer_fraction": 0.5} | settings))


def test_it_has_an_effect_without_a_kl_where_there_is_a_trust_region(tmp_path):
    args = MarbleConfig(str(tmp_path), use_cpu=True, policy_loss="awm", beta=0.0, regularizer_fraction=0.5)
    assert "regularizer_fraction" not in args.unused_settings


@pytest.mark.parametrize(
    ("timestep_fraction", "fraction", "times"), [(0.5, 0.5, "1 timestep,"), (1.0, 0.9, "2 timesteps,")]
)
def test_a_fraction_that_is_all_timesteps_is_refused(tmp_path, timestep_fraction, fraction, times):
    with pytest.raises(ValueError, match=rf"`regularizer_fraction={fraction}` has no effect.*{times}"):
        small_trainer(tmp_path, timestep_fraction=timestep_fraction, regularizer_fraction=fraction)
