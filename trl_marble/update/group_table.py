# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The samples of an optimizer step by their prompts, on all processes."""

import torch
from accelerate import Accelerator
from torch import Tensor

from ..losses import Groups


class GroupTable:
    """
    Finds the group of a sample, see [`~trl_marble.losses.Groups`].

    Args:
        sample_ids (`Tensor` of shape `[S]`, int64):
            The samples of the optimizer step on all processes, by their place in the generation batch.
        advantages (`Tensor` of shape `[K, S]`):
            Their advantages.
        terms (`Tensor` of shape `[T, N, S]` or `None`):
            Their terms at each of their draws, where these were computed.
        num_generations (`int`):
            Samples of each prompt in the generation batch.
    """

    def __init__(self, sample_ids: Tensor, advantages: Tensor, terms: Tensor | None, num_generations: int) -> None:
        self._sample_ids, order = sample_ids.sort()
        self._advantages, self._terms = advantages[:, order], None if terms is None else terms[..., order]
        _, self._group, sizes = torch.unique_consecutive(
            self._sample_ids // num_generations, return_inverse=True, return_counts=True
        )
        self._first = sizes.cumsum(dim=0) - sizes
        columns = torch.arange(int(sizes.max()), device=sizes.device)
        self._absent = columns >= sizes[:, None]  # [groups, G]: smaller groups are filled up
        self._members = (self._first[:, None] + columns).masked_fill(self._absent, 0)

    @classmethod
    def gather(
        cls,
        sample_ids: Tensor,
        advantages: Tensor,
        terms: Tensor | None,
        num_generations: int,
        accelerator: Accelerator,
    ) -> "GroupTable":
        """The table of the samples that all processes have, of which each passes its own. All processes call it."""

        def gather(values: Tensor) -> Tensor:
            """Of all processes, along the last dimension."""
            return accelerator.gather(values.to(accelerator.device).movedim(-1, 0).contiguous()).movedim(0, -1)

        found = None if terms is None else gather(terms)
        return cls(gather(sample_ids), gather(advantages), found, num_generations)

    def at(self, draw: int, sample_ids: Tensor) -> Groups:
        """
        The groups of some samples.

        Args:
            draw (`int`):
                Which of their draws.
            sample_ids (`Tensor` of shape `[B]`, int64):
                The samples.
        """
        rows = torch.searchsorted(self._sample_ids, sample_ids.to(self._sample_ids))
        groups = self._group[rows]
        members, absent = self._members[groups], self._absent[groups]  # [B, G]
        advantages = self._advantages[:, members].masked_fill(absent, torch.nan)
        terms = None if self._terms is None else self._terms[draw][:, members].masked_fill(absent, 0.0)
        return Groups(rows - self._first[groups], advantages, terms)
