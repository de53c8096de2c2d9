# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Losses that compare the samples of a prompt, in an optimizer step of a trainer: exact, however the step is cut."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from trainer_helpers import small_trainer


SUM = {"multi_objective_aggregation": "sum_then_normalize"}
CRD = {"policy_loss": "crd", "old_policy_preset": 4, "crd_beta": 3.0}
DGPO = {"policy_loss": "dgpo", "old_policy_preset": 3}
SAMPLES, TIMES = 8, 2  # of two prompts


def build(folder, micro_batch=4, lags=True, std=0.1, **settings):
    """A trainer whose trained, old and base policies all differ, before its first step."""
    own = {"balance_every": 1} if "multi_objective_aggregation" not in settings else {}
    if settings.get("beta") != 0.0:
        own["regularizer_fraction"] = 1.0
    trainer = small_trainer(
        folder,
        num_generations=4,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=SAMPLES // micro_batch,
        timestep_fraction=1.0,
        **(own | settings),
    )
    trainer.create_optimizer()
    torch.manual_seed(0)
    for parameter in trainer.weights.parameters:
        torch.nn.init.normal_(parameter, std=std)
    if lags:  # half as far from the base model as the trained policy is
        trainer.weights.old.lerp_(0.5)
    else:
        trainer.weights.old.lerp_(0.0)
    return trainer


def sample(trainer):
    """Two prompts; every policy samples the same images."""
    with trainer.weights.averaged.swapped_in():
        sampler, trainer.policy_loss = trainer.policy_loss, type("Live", (), {"samples_with_old": False})
        batch = trainer._sample([0] * 4 + [1] * 4, generation=0)
        trainer.policy_loss = sampler
    trainer.metrics.clear()
    return batch


def take(trainer, batch):
    """The update's direction."""
    positions = [trainer.layout.locate(place) for place in range(trainer.layout.micro_batches_per_update)]
    trainer.update.begin(0, batch, positions[0])
    trainer.update.join_groups()
    for position in positions:
        trainer.update.accumulate(batch, position)
    trainer.update.finish()
    direction = torch.cat([parameter.grad.flatten() for parameter in trainer.weights.parameters])
    trainer.optimizer.zero_grad()
    return direction


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "settings",
    [
        CRD,
        pytest.param(CRD | {"balance_on": "loss", "crd_objective": "bce"}, marks=pytest.mark.slow),
        pytest.param(CRD | SUM, marks=pytest.mark.slow),
        DGPO,
        pytest.param(DGPO | {"dgpo_reference": "old"}, marks=pytest.mark.slow),
        {"policy_loss": "gdro"},
        pytest.param({"policy_loss": "dpo", "dpo_beta": 50.0}, marks=pytest.mark.slow),  # it multiplies a rounding
    ],
    ids=["crd", "crd, complete losses", "crd, weighted sum", "dgpo", "dgpo, old", "gdro", "dpo"],
)
def test_the_direction_does_not_depend_on_the_batch_split(tmp_path, settings):
    found = {}
    for size in (8, 2, 1):
        trainer = build(tmp_path / str(size), size, **settings)
        found[size] = take(trainer, sample(trainer))
    assert found[8].norm() > 0
    # GDRO's terms nearly cancel: 1.5e-5 on one kind of processor, less on another.
    assert relative_error(found[2], found[8]) < 3e-5 and relative_error(found[1], found[8]) < 3e-5


def drawn_by(trainer):
    """Note the inputs and the conditionings that the trained policy is asked for with gradients."""
    noted, ask, draw = [], trainer.weights.velocity, trainer.policy_loss.draw

    class Noting(type(trainer.policy_loss)):
        def draw(self, *args):
            for drawn in draw(*args):
                noted.append(drawn)
                yield drawn

    trainer.update.loss = Noting(**vars(trainer.policy_loss))
    given = []
    trainer.weights.velocity = lambda *args: given.append(args[2]) or ask(*args)
    return noted, given


@pytest.mark.parametrize("objective", ["mse", "bce"])
def test_the_direction_is_that_of_autograd_on_the_formula_of_crd(tmp_path, objective):
    """One micro-batch for each sample, and the published loss of the whole step in one piece."""
    trainer = build(tmp_path / "run", 1, crd_objective=objective, beta=0.0, **CRD, **SUM)
    batch = sample(trainer)
    noted, given = drawn_by(trainer)
    direction = take(trainer, batch)
    assert len(noted) == 2 * SAMPLES * TIMES and len(given) == SAMPLES * TIMES
    half = SAMPLES * TIMES
    for ahead, drawn in zip(noted[:half], noted[half:], strict=True):  # the same noise in both passes
        assert all(torch.equal(a, b) for a, b in zip(ahead[:4], drawn[:4], strict=True))

    b, clip, weights = 3.0, trainer.args.advantage_clip, trainer.weights
    rho = []
    for (x_t, t, x0, noise, *_), conditioning in zip(noted[half:], given, strict=True):

        def log_p(velocity, target=noise - x0):
            error = velocity - target
            return -error.square().mean() / error.detach().abs().mean()

        old = weights.old_velocity(x_t, t, conditioning)
        rho.append(log_p(trainer.model(x_t, t, conditioning)) - log_p(old))
    rho = torch.stack(rho).view(SAMPLES, TIMES)
    prompts = batch.sample_ids // 4
    for group in (0, 1):  # of a prompt all have the same time and noise
        own = (prompts == group).nonzero().flatten().tolist()
        for time in range(TIMES):
            first, *others = [noted[half + TIMES * i + time] for i in own]
            assert all(other.t == first.t and other.noise.equal(first.noise) for other in others)
    total = 0.0
    reward = 0.5 + batch.advantages[0] / (2 * clip)
    for group in (0, 1):
        own = prompts == group
        centred = b * (rho[own] - rho[own].mean(dim=0).detach())
        target = (reward[own] - reward[own].mean())[:, None].expand_as(centred)
        if objective == "mse":
            total = total + (centred - target).square().sum()
        else:
            total = total + binary_cross_entropy_with_logits(centred, target.sigmoid(), reduction="sum")
    loss = clip / b * total / (SAMPLES * TIMES)
    expected = torch.autograd.grad(loss, weights.parameters)
    assert relative_error(direction, torch.cat([part.flatten() for part in expected])) < 1e-4


@pytest.mark.parametrize(
    ("settings", "trained", "old", "base", "backwards"),
    [
        # On-policy nothing is to be found out; off-policy there is one forward pass more, and the trust region.
        (CRD | {"lags": False, "beta": 0.0}, 1, 0, 0, 1),
        (CRD | {"beta": 0.0}, 2, 1, 0, 2),
        (CRD | {"balance_on": "loss", "beta": 0.0}, 2, 1, 0, 1),
        (CRD | {"lags": False}, 1, 0, 1, 2),
        (DGPO | {"beta": 0.0}, 2, 1, 1, 1),
        (DGPO | {"dgpo_reference": "old", "beta": 0.0, "lags": False}, 1, 0, 0, 1),
        (DGPO | {"dgpo_reference": "old", "beta": 0.0}, 2, 1, 0, 1),
        ({"policy_loss": "gdro", "beta": 0.0}, 2, 0, 1, 1),
        ({"lags": True}, 1, 1, 1, 2),  # DiffusionNFT compares no samples
    ],
)
def test_passes_of_a_step_for_each_sample_and_time(tmp_path, settings, trained, old, base, backwards):
    trainer = build(tmp_path / "run", 4, **settings)
    batch = sample(trainer)
    counts = {"trained": 0, "old": 0, "base": 0, "backward": 0}

    def counted(kind, ask):
        def velocity(x_t, *args):
            counts[kind] += len(x_t)
            found = ask(x_t, *args)
            if found.requires_grad:
                found.register_hook(lambda gradient: counts.update(backward=counts["backward"] + len(gradient)))
            return found

        return velocity

    weights = trainer.weights
    for kind, name in (
        ("trained", "velocity"),
        ("trained", "detached_velocity"),
        ("old", "old_velocity"),
        ("base", "base_velocity"),
    ):
        setattr(weights, name, counted(kind, getattr(weights, name)))
    take(trainer, batch)
    assert {kind: number / (SAMPLES * TIMES) for kind, number in counts.items()} == {
        "trained": trained,
        "old": old,
        "base": base,
        "backward": backwards,
    }


def test_looking_ahead_does_not_touch_other_draws(tmp_path):
    trainer = build(tmp_path / "run", 2, **CRD)
    batch = sample(trainer)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = take(trainer, batch)
    assert torch.get_rng_state().equal(before)
    assert take(trainer, batch).equal(first)  # as in a run that is resumed there
