# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Teachers' losses beside those of rewards: K + T rows from as few backward passes as there are numbers a sample."""

import pytest
import tiny
import torch
from adapter_helpers import TARGETS, add_trained_adapter
from torch.nn.functional import pad

from trl_marble.balance import Objective, WeightedBackward
from trl_marble.losses import Drawn, FrozenVelocities, Lesson, NFTLoss, NoRewardLoss, StepCounts
from trl_marble.pipelines import plain_lora_linears
from trl_marble.pipelines.policy import adapter_in_use, adapter_layers


BATCH, REWARDS, TEACHERS = 5, 3, 3


class Problem:
    """A Stable Diffusion 3 in float64 with an adapter that is trained, three teachers of it, and noisy inputs."""

    def __init__(self):
        pipeline = tiny.tiny_sd3(num_layers=1)
        pipeline.transformer.requires_grad_(False)
        # Teachers of other ranks, and of layers that are not trained.
        for place in range(TEACHERS):
            add_trained_adapter(pipeline, f"teacher_{place}", seed=place, std=0.3, r=place + 2)
        add_trained_adapter(pipeline, seed=9, std=0.3, target_modules=TARGETS[:3])
        self.model = pipeline.transformer.double().train()
        self.model.set_adapter("default")
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert all(".default." in name for name in self.trained)
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x0, noise = random(BATCH, 4, 8, 8), random(BATCH, 4, 8, 8)
        t = torch.tensor([0.3, 0.5, 0.7, 0.8, 0.95], dtype=torch.float64)
        self.drawn = Drawn(x0 + t.view(-1, 1, 1, 1) * (noise - x0), t, x0, noise)
        self.text, self.pooled = random(BATCH, 4, 64), random(BATCH, 64)
        self.advantages = random(REWARDS, BATCH)
        self.advantages[1, :2] = torch.nan
        # The first two teachers are of sources; the third one is of all prompts. The last sample has no source.
        self.applies = torch.zeros(TEACHERS, BATCH, dtype=torch.bool)
        self.applies[0, :2] = self.applies[1, 2:4] = self.applies[2] = True

    def velocity(self):
        return self.model(self.drawn.x_t, self.text, self.pooled, 1000 * self.drawn.t)[0]

    def teacher(self, place):
        with torch.no_grad(), adapter_in_use(adapter_layers(self.model), f"teacher_{place}"):
            return self.velocity()

    def gradient(self, loss):
        gradients = torch.autograd.grad(loss, list(self.trained.values()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture(scope="module")
def problem():
    return Problem()


def test_rows_of_rewards_and_teachers_are_those_of_one_autograd_call_each(problem):
    teachers = [problem.teacher(place) for place in range(TEACHERS)]
    assert all(not a.isclose(b).any() for a, b in zip(teachers, teachers[1:], strict=False))
    old = problem.velocity().detach() + 0.1 * torch.randn_like(teachers[0])
    loss = NFTLoss(nft_beta=0.1, advantage_clip=5.0, balance_on="advantage", beta=0.0)
    valid = ~problem.advantages.isnan()
    counts = StepCounts(3 * valid.sum(dim=1), torch.tensor(3 * BATCH), 3 * BATCH)  # of three micro-batches
    taught = 3 * problem.applies.sum(dim=1)
    of_sources, of_all = problem.applies.clone(), problem.applies.clone()
    of_sources[2], of_all[:2] = False, False
    mixed = torch.where(problem.applies[0].view(-1, 1, 1, 1), teachers[0], teachers[1])
    lessons = [Lesson(mixed, of_sources), Lesson(teachers[2], of_all)]

    rows = WeightedBackward(REWARDS + TEACHERS, plain_lora_linears(problem.model, problem.trained))
    backwards = []
    with rows.recording(BATCH):
        velocity = problem.velocity()
        velocity.register_hook(backwards.append)
        terms = loss.terms(velocity, problem.drawn, FrozenVelocities(old))
        coefficients = loss.coefficients(terms, problem.advantages, counts)
        objectives = [Objective(terms[0], pad(coefficients[0], (0, 0, 0, TEACHERS)))]
        objectives += [
            Objective(lesson.distance(velocity), pad(lesson.coefficients(taught), (0, 0, REWARDS, 0)))
            for lesson in lessons
        ]
        rows.backward(objectives)
    assert len(backwards) == 3  # one for all rewards, one for the teachers of sources, one for that of all prompts

    velocity = problem.velocity()
    terms = loss.terms(velocity, problem.drawn, FrozenVelocities(old))
    expected = [
        (problem.advantages[k].nan_to_num() / (2 * 0.1) * terms[0]).sum() / counts.valid[k] for k in range(REWARDS)
    ]
    for place, teacher in enumerate(teachers):
        own = problem.applies[place]
        expected.append((velocity - teacher)[own].square().mean(dim=(1, 2, 3)).sum() / (3 * own.sum()))
    for row, each in zip(rows.gradients, expected, strict=True):
        gradient = problem.gradient(each)
        assert gradient.norm() > 0
        assert (row - gradient).norm() / gradient.norm() < 1e-12


def test_an_adapter_in_use_leaves_no_trace(problem):
    before, flags = problem.velocity(), [p.requires_grad for p in problem.model.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"):
        with adapter_in_use(adapter_layers(problem.model), "teacher_1"):
            assert not problem.velocity().isclose(before).any()
            assert [p.requires_grad for p in problem.model.parameters()] == flags
            raise RuntimeError("on purpose")
    assert problem.velocity().equal(before)
    assert [p.requires_grad for p in problem.model.parameters()] == flags


def test_without_rewards_nothing_is_left_of_the_loss_but_the_penalty():
    loss = NoRewardLoss(beta=0.2)
    assert loss.penalties.reference == 0.2 and loss.needs == frozenset() and not loss.samples_with_old
    velocity = torch.randn(2, 3, requires_grad=True)
    drawn = Drawn(velocity.detach(), torch.rand(2), velocity.detach(), velocity.detach())
    assert loss.terms(velocity, drawn, FrozenVelocities()) == ()
    assert loss.coefficients((), torch.empty(0, 2), StepCounts(torch.empty(0), torch.tensor(0), 2)) == ()
