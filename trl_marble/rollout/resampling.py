# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Other prompts for groups of images that no reward tells apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..balance import mask_silent_groups


def find_silent_groups(advantages: Tensor, groups: Tensor) -> list[int]:
    """
    The groups without a signal: in which each advantage is 0 or missing.

    Args:
        advantages (`Tensor` of shape `[K, B]`):
            NaN where a reward does not apply.
        groups (`Tensor` of shape `[B]`, int64):
            The group of each image.
    """
    has_signal = ~mask_silent_groups(advantages, groups).isnan().all(dim=0)
    return [group for group in groups.unique().tolist() if not has_signal[groups == group].any()]


class OtherPrompts:
    """
    Draws other rows of the dataset for some groups of a generation batch. All processes draw the same.

    A row is drawn at most once in a generation batch, and not if it is in it already. If prompts have sources, it is
    of the same source as the row that it replaces, so that each source keeps its share. Where no row is left, a group
    keeps its own.

    Args:
        rows (`Sequence[int]`):
            The row of each image of the generation batch of all processes.
        num_generations (`int`):
            Images per group.
        sources (`Sequence[str]`, *optional*):
            The source of each row of the dataset.

    Attributes:
        rows (`list[int]`): The row of each image as it is now.
        number_drawn (`int`): How many rows were drawn.
    """

    def __init__(self, rows: Sequence[int], num_generations: int, sources: Sequence[str] | None = None) -> None:
        self.rows, self.number_drawn = list(rows), 0
        self._first, self._num_generations, self._sources = list(rows), num_generations, sources
        self._used = set(rows)

    @property
    def replaced(self) -> dict[int, int]:
        """Place of an image -> its row, where it is not the one of the beginning."""
        pairs = enumerate(zip(self.rows, self._first, strict=True))
        return {place: row for place, (row, first) in pairs if row != first}

    def draw(self, groups: Sequence[int], num_rows: int, seed: int) -> list[int]:
        """
        Give other rows to some groups.

        Args:
            groups (`Sequence[int]`):
                The groups.
            num_rows (`int`):
                Number of rows of the dataset.
            seed (`int`):
                The same on all processes.

        Returns:
            `list[int]`: the places in the generation batch that have another row now.
        """
        generator = torch.Generator().manual_seed(seed)
        unused = [row for row in torch.randperm(num_rows, generator=generator).tolist() if row not in self._used]
        changed: list[int] = []
        for group in groups:
            places = range(group * self._num_generations, (group + 1) * self._num_generations)
            row = next((row for row in unused if self._is_alike(row, self.rows[places.start])), None)
            if row is None:
                continue
            unused.remove(row)
            self._used.add(row)
            self.number_drawn += 1
            for place in places:
                self.rows[place] = row
            changed += places
        return changed

    def _is_alike(self, row: int, other: int) -> bool:
        return self._sources is None or self._sources[row] == self._sources[other]
