# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One optimizer step on a tiny policy: everything that a loss needs, in float64."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from trl_marble.losses import Drawn, FrozenVelocities, StepCounts


class Problem(NamedTuple):
    """A velocity network with samples, velocities of frozen policies, and advantages of K rewards."""

    net: nn.Module
    drawn: Drawn
    frozen: FrozenVelocities
    advantages: Tensor
    counts: StepCounts

    def velocity(self) -> Tensor:
        return self.net(torch.cat([self.drawn.x_t, self.drawn.t[:, None]], dim=1))

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient with respect to all parameters, flat."""
        gradients = torch.autograd.grad(loss, list(self.net.parameters()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    def make(num_rewards: int = 3, batch: int = 6, seed: int = 0, on_policy: bool = False) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        for parameter in net.parameters():
            parameter.data = 0.5 * random(*parameter.shape)
        x0, noise = random(batch, 4), random(batch, 4)
        t = torch.rand(batch, generator=generator, dtype=torch.float64)
        drawn = Drawn(x0 + t[:, None] * (noise - x0), t, x0, noise)
        advantages = (2 * random(num_rewards, batch)).clamp(-5, 5)
        advantages[torch.rand(num_rewards, batch, generator=generator) > 0.6] = torch.nan
        advantages[:, 0] = 1.5
        valid, scored = ~advantages.isnan(), (~advantages.isnan()).any(dim=0)
        counts = StepCounts(2 * valid.sum(dim=1), 2 * scored.sum(), 2 * batch)  # another micro-batch is as large
        near = net(torch.cat([drawn.x_t, t[:, None]], dim=1)).detach()
        old = None if on_policy else near + 0.3 * random(batch, 4)
        return Problem(net, drawn, FrozenVelocities(old, near + 0.5 * random(batch, 4)), advantages, counts)

    return make
