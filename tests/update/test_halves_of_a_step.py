# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a step finds out about itself from two halves of its prompts, on one linear layer: without a further pass."""

import logging
import math
import threading

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from trl_marble.balance import BalanceSchedule, harmonize, mgda_weights
from trl_marble.metrics import MetricBuffer
from trl_marble.update import BalanceSettings, NonFiniteGuard, StepGradient


NAMES = ["a", "b", "c"]
SAMPLES, MICRO_STEPS = 24, 3
WEIGHTED_SUM = torch.tensor([0.1, 0.2, 0.7])


class Case:
    """Steps on one layer with given coefficients; `passes` counts its backward passes."""

    def __init__(self, weighting=mgda_weights, fraction=1.0, has_linears=True, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(5, 4, bias=False).double()
        self.layer.weight.data = self.draw(4, 5)
        accelerator, self.metrics = Accelerator(cpu=True), MetricBuffer()
        self.gradient = StepGradient(
            accelerator,
            [self.layer.weight],
            [self.layer] if has_linears else None,
            BalanceSettings(BalanceSchedule(len(NAMES), balance_every=1, balance_ema=0.0), weighting, fraction, NAMES),
            seed=0,
            guard=NonFiniteGuard("raise", accelerator, self.metrics),
            metrics=self.metrics,
        )
        self.passes = 0

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def run(self, step=0, coefficients=None):
        self.coefficients = self.draw(len(NAMES), SAMPLES) if coefficients is None else coefficients
        self.first_half = torch.arange(SAMPLES) % 3 == 0  # 8 of 24
        self.inputs, self.targets = self.draw(SAMPLES, 2, 5), self.draw(SAMPLES, 2, 4)
        halves = torch.stack([self.first_half, ~self.first_half])
        counts = halves.sum(dim=1, keepdim=True).expand(2, len(NAMES))
        active = torch.stack([(self.coefficients * half != 0).any(dim=1) for half in halves])
        self.gradient.guard.begin(step)
        self.gradient.begin(step, counts, active, MICRO_STEPS, WEIGHTED_SUM)
        for place in range(MICRO_STEPS):
            part = slice(place * SAMPLES // MICRO_STEPS, (place + 1) * SAMPLES // MICRO_STEPS)
            with self.gradient.recording(place, self.first_half[part]):
                output = self.layer(self.inputs[part])
                output.register_hook(self.count)
                losses = (output - self.targets[part]).square().sum(dim=(1, 2))
                self.gradient.backward([losses], [self.coefficients[:, part]], shared=output.sum(dim=(1, 2)))
        self.gradient.finish()
        self.gradient.commit()
        return self.metrics.flush(self.gradient.accelerator)

    def count(self, grad):
        self.passes += 1

    def gradients(self, chosen):
        """Per-reward gradients `(K, P)` of some samples, one backward pass each."""
        found = []
        for own in self.coefficients:
            losses = (self.inputs @ self.layer.weight.mT - self.targets).square().sum(dim=(1, 2))
            (gradient,) = torch.autograd.grad((losses * own * chosen).sum(), [self.layer.weight])
            found.append(gradient.flatten())
        return torch.stack(found)

    def expected_cosines(self, weigh):
        """`weigh` says, from a half's gradients, how its direction is made of them."""
        halves = [self.gradients(self.first_half), self.gradients(~self.first_half)]
        directions = [weigh(half) @ half for half in halves]
        of_first = torch.cosine_similarity(halves[1], directions[0][None])
        of_second = torch.cosine_similarity(halves[0], directions[1][None])
        return ((of_first + of_second) / 2).tolist()


def logged(log, kind):
    return [log[f"balance/{kind}/{name}"] for name in NAMES]


def by_mgda(gradients):
    return harmonize(gradients @ gradients.T, mgda_weights).weights


def test_each_half_is_measured_on_the_other():
    case = Case()
    log = case.run()
    assert logged(log, "heldout_cos") == pytest.approx(case.expected_cosines(by_mgda), rel=1e-6)
    assert log["balance/heldout_cos_min"] == pytest.approx(min(logged(log, "heldout_cos")))
    other = case.expected_cosines(lambda gradients: WEIGHTED_SUM.double())
    assert logged(log, "weighted_sum/heldout_cos") == pytest.approx(other, rel=1e-5)
    assert log["balance/weighted_sum/heldout_cos_min"] == pytest.approx(min(other), rel=1e-5)
    first, second, both = (case.gradients(half) for half in (case.first_half, ~case.first_half, torch.ones(SAMPLES)))
    signal = (first * second).sum(dim=1) / (1 / 3 * 2 / 3) / both.square().sum(dim=1)
    assert logged(log, "signal") == pytest.approx(signal.tolist(), rel=1e-5)
    direction = by_mgda(both) @ both
    in_sample = torch.cosine_similarity(both, direction[None])
    assert logged(log, "cos") == pytest.approx(in_sample.tolist(), rel=1e-5)
    # And the step that is taken is that of all samples.
    shared = case.inputs.sum(dim=(0, 1)).expand(4, 5).flatten()
    torch.testing.assert_close(case.layer.weight.grad.flatten(), direction + shared, rtol=1e-6, atol=1e-6)


def test_halves_cost_no_further_pass_and_are_left_out_where_they_would():
    measured, separate = Case(), Case(has_linears=False)
    log = measured.run()
    assert measured.passes == 2 * MICRO_STEPS  # one of what balances and one of what is shared, for 7 rows
    log_of_separate = separate.run()
    assert separate.passes == (len(NAMES) + 1) * MICRO_STEPS
    torch.testing.assert_close(measured.layer.weight.grad, separate.layer.weight.grad)
    assert logged(log, "cos") == pytest.approx(logged(log_of_separate, "cos"), rel=1e-5)
    assert set(log) - set(log_of_separate) == {
        *(
            f"balance/{kind}/{name}"
            for kind in ("heldout_cos", "weighted_sum/heldout_cos", "signal")
            for name in NAMES
        ),
        "balance/heldout_cos_min",
        "balance/weighted_sum/heldout_cos_min",
    }


def test_a_reward_without_a_signal_in_one_half_is_unknown_and_not_zero():
    case = Case()
    coefficients = case.draw(len(NAMES), SAMPLES)
    coefficients[1, torch.arange(SAMPLES) % 3 == 0] = 0
    log = case.run(coefficients=coefficients)
    for kind in ("heldout_cos", "weighted_sum/heldout_cos", "signal"):
        assert [math.isnan(value) for value in logged(log, kind)] == [False, True, False]
    assert log["balance/heldout_cos_min"] == min(log["balance/heldout_cos/a"], log["balance/heldout_cos/c"])
    assert math.isfinite(log["balance/cos/b"])
    log = case.run(step=1, coefficients=coefficients * (torch.arange(SAMPLES) % 3 != 0))
    assert math.isnan(log["balance/heldout_cos_min"]) and math.isfinite(log["balance/cos_min"])


def test_a_streaming_step_measures_the_weights_that_it_takes():
    case = Case(fraction=1 / MICRO_STEPS)
    case.run()
    weights = case.gradient.balance.schedule.weights(torch.ones(3, dtype=torch.bool))
    log = case.run(step=1)
    (place,) = case.gradient._measured
    size = SAMPLES // MICRO_STEPS
    seen = torch.zeros(SAMPLES)
    seen[place * size : (place + 1) * size] = 1
    case.coefficients = case.coefficients * seen
    assert logged(log, "heldout_cos") == pytest.approx(case.expected_cosines(lambda gradients: weights), rel=1e-5)


class Remembering:
    """A weighting with a state: each answer is half of the last one."""

    def __init__(self):
        self.last, self.calls = torch.full((3,), 1 / 3, dtype=torch.float64), 0

    def __call__(self, gram):
        self.calls += 1
        self.last = (self.last + mgda_weights(gram)) / 2
        return self.last


class Averaging:
    """Answers for the mean of all that it was asked for."""

    def __init__(self):
        self.grams = []

    def __call__(self, gram):
        self.grams.append(gram)
        return mgda_weights(torch.stack(self.grams).mean(dim=0))

    def weigh(self, gram):
        return self(gram)


def test_a_weighting_for_all_rewards_only_is_not_stopped_by_a_half_without_one_of_them():
    case = Case(lambda gram: torch.full((3,), 1 / 3))
    coefficients = case.draw(len(NAMES), SAMPLES)
    coefficients[1, torch.arange(SAMPLES) % 3 == 0] = 0
    log = case.run(coefficients=coefficients)
    assert math.isfinite(log["balance/cos_min"]) and math.isnan(log["balance/heldout_cos_min"])
    assert math.isfinite(log["balance/weighted_sum/heldout_cos_min"]) and math.isfinite(log["balance/signal/a"])


@pytest.mark.parametrize("is_method", [False, True], ids=["object", "method"])
def test_a_half_is_weighed_by_what_was_known_before_the_step(is_method):
    weighting = Averaging()
    case = Case(weighting.weigh if is_method else weighting)
    log = case.run()
    assert logged(log, "heldout_cos") == pytest.approx(case.expected_cosines(by_mgda), rel=1e-6)
    case.run(step=1)
    assert len(weighting.grams) == 2


def test_a_weighting_that_cannot_be_copied_is_used_and_halves_are_left_out(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    weighting = Averaging()
    weighting.lock = threading.Lock()
    log = Case(weighting).run()
    assert "Held-out cosines are not measured" in caplog.text
    assert math.isfinite(log["balance/cos/a"]) and not any("heldout" in name for name in log)


def at_random(gram):
    return torch.rand(len(gram), dtype=gram.dtype)


@pytest.mark.parametrize("make", [Remembering, lambda: at_random], ids=["with a state", "random"])
def test_halves_do_not_change_what_a_weighting_answers_to_the_next_step(make):
    directions = []
    for has_linears in (True, False):  # without them there are no halves
        torch.manual_seed(0)
        case = Case(make(), has_linears=has_linears)
        taken = []
        for step in range(3):
            case.run(step)
            taken.append(case.layer.weight.grad.clone())
        directions.append(torch.stack(taken))
    torch.testing.assert_close(directions[0], directions[1])
    if make is Remembering:
        assert case.gradient.balance.weighting.calls == 3
