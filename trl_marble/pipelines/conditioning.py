# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Encoded prompts, one row per prompt, from which the rows of a batch are selected."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor


Rows: TypeAlias = Tensor | list[Any]  # of one argument, one row per prompt


@dataclass(frozen=True, eq=False)
class Conditioning:
    """
    Encoded prompts: what the pipeline's `__call__` takes in the place of text.

    Prompts are encoded once and then selected per sample: `flow.encode(unique_prompts).select(prompt_of_sample)`.

    Args:
        kwargs (`dict[str, torch.Tensor | list]`):
            `__call__` arguments by name, each with one row per prompt: a tensor of shape `[number of prompts, ...]`, a
            list of tensors where the pipeline wants rows of different lengths, or a list of whatever else it takes:
            `image` with the images to be edited, and `prompt` with the prompts where it takes nothing but text.

    Raises:
        `ValueError`: there is no argument, or the arguments disagree about the number of prompts.
    """

    kwargs: dict[str, Rows]
    # Where the pipeline takes nothing but text: what its `encode_prompt` returned for exactly these rows, and for each
    # row alone, which all selections of the row share.
    _outputs: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    _row_outputs: list[dict[Hashable, Any]] = field(default_factory=list, init=False, repr=False)
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)
    _derived_from: list[tuple[Any, int]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {name: len(rows) for name, rows in self.kwargs.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"conditioning tensors need one first dimension, a row per prompt; got {sizes}")
        self._row_outputs.extend({} for _ in range(len(self)))

    def __len__(self) -> int:
        return len(next(iter(self.kwargs.values())))

    def select(self, indices: Tensor) -> "Conditioning":
        """
        Rows by index, in the order of the indices; an index may come more than once.

        Args:
            indices (`torch.LongTensor` of shape `[n]`):
                Which rows to take.

        Returns:
            `Conditioning`: of length `n`.
        """
        selected = Conditioning(
            {
                name: rows[indices.to(rows.device, non_blocking=rows.is_cuda)]
                if isinstance(rows, Tensor)
                else [rows[i] for i in indices.tolist()]
                for name, rows in self.kwargs.items()
            }
        )
        selected._row_outputs[:] = [self._row_outputs[i] for i in indices.tolist()]
        return selected

    def part(self, indices: Tensor) -> "Conditioning":
        """The selection of some rows, which is the same object each time as long as no row has changed."""
        derived, key = self.derived(), ("part", *indices.tolist())
        if key not in derived:
            derived[key] = self.select(indices)
        return derived[key]

    def twin(self, name: str, kwargs: dict[str, Rows] | None = None) -> "Conditioning":
        """
        Another conditioning of the same prompts: the same object each time as long as no row has changed.

        Args:
            name (`str`):
                What it is for.
            kwargs (`dict[str, torch.Tensor | list]`, *optional*):
                Its arguments. By default they are the same.
        """
        derived, key = self.derived(), ("twin", name)
        if key not in derived:
            derived[key] = Conditioning(self.kwargs if kwargs is None else kwargs)
            derived[key]._row_outputs[:] = self._row_outputs
        return derived[key]

    def derived(self) -> dict[Hashable, Any]:
        """
        What was computed from exactly these rows, to be kept with them. It is empty again when a row has been replaced
        or a tensor written into.
        """
        rows = [row for rows in self.kwargs.values() for row in (rows if isinstance(rows, list) else [rows])]
        now = [(row, _version(row)) for row in rows]
        before = self._derived_from
        if len(now) != len(before) or any(a is not b or i != j for (a, i), (b, j) in zip(now, before, strict=True)):
            self._derived.clear()
            self._derived_from[:] = now
        return self._derived

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same conditioning on another device."""
        return Conditioning(
            {
                name: rows.to(device)
                if isinstance(rows, Tensor)
                else [row.to(device) if isinstance(row, Tensor) else row for row in rows]
                for name, rows in self.kwargs.items()
            }
        )

    def cached_output(self, key: Hashable) -> Any | None:
        """What [`cache_output`] stored under the key, if anything."""
        return self._cache.get(key)

    def cache_output(self, key: Hashable, output: Any) -> None:
        """Store what a text encoder returned for exactly these rows; that of one row serves every selection of it."""
        self._cache[key] = output

    @property
    def _cache(self) -> dict[Hashable, Any]:
        return self._row_outputs[0] if len(self) == 1 else self._outputs


def _version(row: Any) -> int:
    """How often a tensor has been written into; that of the inference mode does not know."""
    return row._version if isinstance(row, Tensor) and not row.is_inference() else 0
