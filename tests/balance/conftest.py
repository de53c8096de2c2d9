# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trl_marble.balance import NFTLosses, Objective, SampleCoefficients, SeparateBackward, nft_losses


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
    """One optimizer step on a tiny policy: everything that the losses need, in float64."""

    net: TinyVelocityNet
    parameters: list[Tensor]
    losses: Callable[[Sequence[int]], NFTLosses]
    advantages: Tensor
    counts: Tensor
    advantage_clip: float
    nft_beta: float


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    def make(num_rewards: int, batch: int = 6, seed: int = 0, nft_beta: float = 0.1) -> Problem:
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

        def losses(samples: Sequence[int]) -> NFTLosses:
            i = list(samples)
            return nft_losses(net(x_t[i], t[i]), old_velocity[i], x_t[i], x0[i], t[i], nft_beta)

        advantages = (2 * random(num_rewards, batch)).clamp(-5, 5)
        applies = torch.rand(num_rewards, batch, generator=generator) > 0.4
        applies[:, 0] = True
        advantages[~applies] = torch.nan
        counts = applies.sum(dim=1)
        return Problem(net, list(net.parameters()), losses, advantages, counts, 5.0, nft_beta)

    return make


@pytest.fixture
def separate_gradients() -> Callable[..., Tensor]:
    """Per-reward gradients `(K, P)`, one backward pass each."""

    def gradients(
        losses: NFTLosses, coefficients: SampleCoefficients, parameters: list[Tensor], retain_graph: bool = False
    ) -> Tensor:
        rows = SeparateBackward(len(coefficients.positive), parameters)
        rows.backward([Objective(*pair) for pair in zip(losses, coefficients, strict=True)], retain_graph)
        return rows.gradients

    return gradients
