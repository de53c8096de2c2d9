# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trl_marble.balance import Objective, SeparateBackward
from trl_marble.losses import Drawn, FrozenVelocities, NFTLoss, StepCounts


class TinyVelocityNet(nn.Module):
    """A convolutional velocity predictor with a time input, and one parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 3, 3, padding=1)
        self.time = nn.Linear(1, 3)
        self.leave = nn.Conv2d(3, 2, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x_t) + self.time(t[:, None])[:, :, None, None]))


class Problem(NamedTuple):
    """One optimizer step on a tiny policy: everything that DiffusionNFT's loss needs, in float64."""

    net: TinyVelocityNet
    parameters: list[Tensor]
    drawn: Drawn
    old_velocity: Tensor
    advantages: Tensor
    counts: Tensor
    nft_beta: float = 0.1

    def terms(self, samples: Sequence[int] = range(6), balance_on: str = "loss") -> list[Tensor]:
        """What the rewards act through: one tensor `(B,)` for each of its backward passes."""
        i = list(samples)
        drawn = Drawn(*(part[i] for part in self.drawn[:4]))
        terms = self._loss(balance_on).terms(
            self.net(drawn.x_t, drawn.t), drawn, FrozenVelocities(self.old_velocity[i])
        )
        return list(terms[: 2 if balance_on == "loss" else 1])

    def coefficients(
        self, samples: Sequence[int] = range(6), balance_on: str = "loss", advantages: Tensor | None = None
    ) -> Sequence[Tensor]:
        """`(K, B)` for each term. With other advantages, what they are divided by is counted anew."""
        counts = self.counts if advantages is None else (~advantages.isnan()).sum(dim=1)
        chosen = (self.advantages if advantages is None else advantages)[:, list(samples)]
        return self._loss(balance_on).coefficients((), chosen, StepCounts(counts, counts.max(), 0))

    def _loss(self, balance_on: str) -> NFTLoss:
        return NFTLoss(self.nft_beta, advantage_clip=5.0, balance_on=balance_on, beta=0.0)


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    def make(num_rewards: int, batch: int = 6, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        net = TinyVelocityNet().double()
        for parameter in net.parameters():
            parameter.data = 0.5 * random(*parameter.shape)
        x0, noise = random(batch, 2, 4, 4), random(batch, 2, 4, 4)
        t = torch.rand(batch, generator=generator, dtype=torch.float64)
        x_t = x0 + t[:, None, None, None] * (noise - x0)
        old_velocity = net(x_t, t).detach() + 0.3 * random(batch, 2, 4, 4)
        advantages = (2 * random(num_rewards, batch)).clamp(-5, 5)
        applies = torch.rand(num_rewards, batch, generator=generator) > 0.4
        applies[:, 0] = True
        advantages[~applies] = torch.nan
        drawn = Drawn(x_t, t, x0, noise)
        return Problem(net, list(net.parameters()), drawn, old_velocity, advantages, applies.sum(dim=1))

    return make


@pytest.fixture
def separate_gradients() -> Callable[..., Tensor]:
    """Per-reward gradients `(K, P)`, one backward pass each."""

    def gradients(
        terms: Sequence[Tensor],
        coefficients: Sequence[Tensor],
        parameters: list[Tensor],
        retain_graph: bool = False,
    ) -> Tensor:
        rows = SeparateBackward(len(coefficients[0]), parameters)
        rows.backward([Objective(*pair) for pair in zip(terms, coefficients, strict=True)], retain_graph)
        return rows.gradients

    return gradients
