# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What share each reward has of each prompt, in a run that trains a policy for every balance between them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..seeding import Draw, derive_seed


@dataclass(frozen=True)
class ShareDraws:
    """
    Draws the shares of the rewards: for each prompt of a generation batch one point of the simplex, each point as
    likely as any other (a Dirichlet distribution whose parameters are 1). They depend on their place in the run alone,
    and so are the same on all processes and in a run that was resumed.

    Args:
        seed (`int`):
            Seed of the run.
        num_rewards (`int`):
            Number of rewards.
        num_generations (`int`):
            Images per prompt, which all have its shares.
    """

    seed: int
    num_rewards: int
    num_generations: int

    def of(self, generation: int, places: Iterable[int]) -> Tensor:
        """
        The shares of some images.

        Args:
            generation (`int`):
                Number of the generation batch.
            places (`Iterable[int]`):
                Their places in the generation batch of all processes.

        Returns:
            `Tensor` of shape `[B, K]`, float32: not negative, and 1 together in each row.
        """
        groups = [place // self.num_generations for place in places]
        drawn = {group: self._draw(generation, group) for group in sorted(set(groups))}
        return torch.stack([drawn[group] for group in groups])

    def _draw(self, generation: int, group: int) -> Tensor:
        seed = derive_seed(self.seed, Draw.SHARES, generation, group)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.empty(self.num_rewards, dtype=torch.float64).exponential_(generator=generator)
        return (lengths / lengths.sum()).float()
