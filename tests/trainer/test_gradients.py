# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The update's direction, against autograd on the formulas, and its independence of how the batch is split."""

import pytest
import torch
from transformers import TrainerCallback


class KeepGradient(TrainerCallback):
    """Copies the flat gradient of every optimizer step before the optimizer sees it."""

    def __init__(self):
        self.gradients = []
        self.trainer = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parts = [parameter.grad.flatten() for parameter in self.trainer.weights.parameters]
        self.gradients.append(torch.cat(parts).clone())


@pytest.fixture
def gradients_of(make_trainer):
    """Gradients of every step of a run without clipping."""

    def run(prepare=None, **overrides):
        keep = KeepGradient()
        trainer = make_trainer(callbacks=[keep], max_grad_norm=0.0, **overrides)
        keep.trainer = trainer
        if prepare is not None:
            prepare(trainer)
        trainer.train()
        return keep.gradients

    return run


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "method",
    [
        {"balance_on": "loss", "balance_every": 2},
        {"balance_on": "advantage", "balance_every": 2},
        {"multi_objective_aggregation": "sum_then_normalize"},
    ],
    ids=["loss", "advantage", "weighted sum"],
)
def test_gradient_does_not_depend_on_the_batch_split(gradients_of, method):
    settings = {"beta": 0.1} | method
    # Small, so that the second step's rewards do not differ by more than rounding: Adam's first step has the size of
    # the learning rate wherever a gradient is not exactly zero.
    settings["learning_rate"] = 1e-6
    whole = gradients_of(per_device_train_batch_size=8, gradient_accumulation_steps=1, **settings)
    single = gradients_of(per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    pairs = gradients_of(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert len(whole) == 2 and whole[0].norm() > 0
    # The first step solves, the second mixes; the second also starts from weights that must have stayed together.
    for step in range(2):
        assert relative_error(single[step], whole[step]) < 1e-5
        assert relative_error(pairs[step], whole[step]) < 1e-5


def nft_loss(velocity, old_velocity, x_t, x0, t, advantages, b, clip):
    """One reward's loss as the design writes it, for the samples that it applies to."""
    t = t.view(-1, 1, 1, 1)
    r = 0.5 + advantages / (2 * clip)
    total = 0.0
    for sign, weight in ((1, r), (-1, 1 - r)):
        prediction = x_t - t * (old_velocity + sign * b * (velocity - old_velocity))
        scale = (prediction - x0).abs().mean(dim=(1, 2, 3)).detach().clamp(min=1e-5)
        total = total + weight * ((prediction - x0) ** 2).mean(dim=(1, 2, 3)) / scale
    return clip / b * total


def record_calls(trainer):
    """Keep what each forward and backward pass of the update was given."""
    calls, loss = [], trainer.policy_loss

    class Recorder(type(loss)):
        def terms(self, velocity, drawn, frozen):
            calls.append(drawn)
            return super().terms(velocity, drawn, frozen)

        def coefficients(self, terms, advantages, counts):
            calls[-1] = (calls[-1], advantages)
            return super().coefficients(terms, advantages, counts)

    trainer.update.loss = Recorder(**vars(loss))
    select, chosen = trainer.flow.velocity, []
    trainer.flow.velocity = lambda x_t, t, conditioning: chosen.append(conditioning) or select(x_t, t, conditioning)
    return calls, chosen


def fix_weights(trainer, weights):
    """The same weights over the gradients as they are, in every step."""
    solve = trainer.update.gradient._solve
    trainer.update.gradient._solve = lambda *a: solve(*a)._replace(weights=weights.to(a[0]))
    trainer.schedule.weights = lambda active: weights.double()


@pytest.mark.parametrize("balance_on", ["loss", "advantage"])
def test_direction_is_that_of_autograd_on_the_formulas(monkeypatch, make_trainer, balance_on):
    """Fixed weights, no normalization: d = sum_k w_k grad L_k (+ anchor once) + beta grad KL, over the whole step."""
    weights = torch.tensor([0.2, 0.5, 0.3])
    keep = KeepGradient()
    # Two steps, so that the second starts from a policy that has left the old one: the anchor is at work.
    trainer = make_trainer(
        callbacks=[keep],
        max_steps=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        max_grad_norm=0.0,
        balance_on=balance_on,
        beta=0.5,
        regularizer_fraction=1.0,
        old_policy_preset=2,
    )
    fix_weights(trainer, weights)
    calls, conditionings = record_calls(trainer)
    keep.trainer = trainer

    expected = []

    class Expect(TrainerCallback):
        """Computes the step's gradient again before the optimizer moves the weights."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            b, clip, beta = args.nft_beta, args.advantage_clip, args.beta
            total = torch.zeros(3)
            divergence, anchor, scored = 0.0, 0.0, 0
            counts = torch.stack([(~a.isnan()).sum(dim=1) for _, a in calls]).sum(dim=0)
            samples = sum(len(drawn.x0) for drawn, _ in calls)
            per_call = len(conditionings) // len(calls)  # old, base and trained velocities of the same inputs
            given = conditionings[::per_call]
            losses = [0.0, 0.0, 0.0]
            for ((x_t, t, x0, *_), advantages), conditioning in zip(list(calls), given, strict=True):
                with torch.no_grad(), trainer.weights.old.swapped_in():
                    old = trainer.model(x_t, t, conditioning)
                with torch.no_grad():
                    trainer.flow.transformer.disable_adapters()
                    base = trainer.model(x_t, t, conditioning)
                    trainer.flow.transformer.enable_adapters()
                velocity = trainer.model(x_t, t, conditioning)
                divergence = divergence + (velocity - base).square().mean(dim=(1, 2, 3)).sum() / samples
                no_signal = nft_loss(velocity, old, x_t, x0, t, torch.zeros(len(x0)), b, clip)
                any_reward = ~advantages.isnan().all(dim=0)
                anchor = anchor + no_signal[any_reward].sum()
                scored += int(any_reward.sum())
                for k in range(3):
                    valid = ~advantages[k].isnan()
                    loss = nft_loss(velocity, old, x_t, x0, t, advantages[k].nan_to_num(), b, clip)
                    if balance_on == "advantage":
                        loss = loss - no_signal
                    losses[k] = losses[k] + loss[valid].sum() / counts[k]
            total = sum(w * loss for w, loss in zip(weights, losses, strict=True)) + beta * divergence
            if balance_on == "advantage":
                total = total + anchor / scored
            gradients = torch.autograd.grad(total, trainer.weights.parameters)
            expected.append(torch.cat([gradient.flatten() for gradient in gradients]))
            calls.clear()
            conditionings.clear()

    trainer.add_callback(Expect())
    trainer.train()
    assert len(expected) == 2
    for step in range(2):
        assert relative_error(keep.gradients[step], expected[step]) < 1e-4


def test_mixing_with_known_weights_is_the_full_step(gradients_of):
    """Amortization is exact: with the same weights, one backward pass gives the direction of K of them."""
    settings = {"learning_rate": 1e-6}  # as above: the second step must find the same rewards
    weights = torch.tensor([0.2, 0.5, 0.3])
    solved = gradients_of(lambda trainer: fix_weights(trainer, weights), balance_every=1, **settings)
    mixed = gradients_of(lambda trainer: fix_weights(trainer, weights), balance_every=100, **settings)
    assert relative_error(mixed[1], solved[1]) < 1e-5


def test_gradient_checkpointing_changes_nothing(gradients_of):
    plain = gradients_of(balance_every=2)
    checkpointed = gradients_of(balance_every=2, gradient_checkpointing=True)
    for a, b in zip(checkpointed, plain, strict=True):
        assert relative_error(a, b) < 1e-5


def test_rescaling_a_reward_does_not_change_the_update(gradients_of, rewards):
    brightness, *others = rewards

    def bright_percent(images, **kwargs):
        return [100 * value + 7 for value in brightness(images)]

    plain = gradients_of(max_steps=1)
    rescaled = gradients_of(max_steps=1, reward_funcs=[bright_percent, *others])
    # 1e-4 in the denominator of the advantages is not scaled along.
    assert relative_error(rescaled[0], plain[0]) < 0.1
    weighted = {"multi_objective_aggregation": "sum_then_normalize", "max_steps": 1}
    plain = gradients_of(**weighted)
    rescaled = gradients_of(reward_funcs=[bright_percent, *others], **weighted)
    assert relative_error(rescaled[0], plain[0]) > 0.1


def test_the_update_has_cosines_in_the_ratio_of_the_priorities(make_trainer):
    priorities = [1.0, 1.5, 2.0]
    trainer = make_trainer(max_steps=1, reward_priorities=priorities)
    trainer.train()
    (step,) = (row for row in trainer.state.log_history if "loss" in row)
    ratios = [step[f"balance/cos/{name}"] / own for name, own in zip(trainer.scorer.names, priorities, strict=True)]
    used = [step[f"balance/alpha/{name}"] > 1e-6 for name in trainer.scorer.names]
    assert sum(used) >= 2
    least = min(ratios)
    for ratio, is_used in zip(ratios, used, strict=True):
        assert ratio == pytest.approx(least, rel=1e-4) if is_used else ratio > least
