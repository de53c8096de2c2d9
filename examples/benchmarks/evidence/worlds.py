# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The worlds that methods are compared on: a pipeline, prompts and rewards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import emojiworld
from datasets import Dataset
from diffusers import DiffusionPipeline

from trl_marble import shapeworld


@dataclass(frozen=True)
class World:
    """
    A pipeline with prompts and rewards.

    Args:
        rewards (`tuple[str, ...]`):
            The rewards' names, in the order of tables.
        load_pipeline (`Callable[[], DiffusionPipeline]`):
            The pretrained pipeline.
        load_prompts (`Callable[[str], Dataset]`):
            The prompts of a split, `"train"` or `"test"`, with the column `source`.
        reward_funcs (`Callable[[], Sequence]`):
            The rewards that are trained on.
        heldout_funcs (`Callable[[], Sequence]`, *optional*, defaults to none):
            Rewards that are only measured at the end.
        sources (`Mapping[str, str]`, *optional*, defaults to none):
            Reward -> the only source of prompts that it applies to.
        fingerprint (`Callable[[], str]`, *optional*):
            Of its weights, where they are not part of the package: a run belongs to them.
    """

    rewards: tuple[str, ...]
    load_pipeline: Callable[[], DiffusionPipeline]
    load_prompts: Callable[[str], Dataset]
    reward_funcs: Callable[[], Sequence[Any]]
    heldout_funcs: Callable[[], Sequence[Any]] = tuple
    sources: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Callable[[], str] | None = None

    def rewards_by_name(self) -> dict[str, Any]:
        """The rewards that are trained on."""
        return {reward.__name__: reward for reward in self.reward_funcs()}

    def some_prompts(self, split: str, of_each: int) -> Dataset:
        """Equally many prompts of each source of a split."""
        rows = self.load_prompts(split)
        places: dict[str, list[int]] = {}
        for place, source in enumerate(rows["source"]):
            places.setdefault(source, []).append(place)
        # Evenly spaced over each source: its first prompts are all of one kind.
        return rows.select([own[i * len(own) // of_each] for own in places.values() for i in range(of_each)])


SHAPEWORLD = "shapeworld"
WORLDS = {
    SHAPEWORLD: World(
        rewards=tuple(reward.__name__ for reward in shapeworld.reward_funcs()),
        load_pipeline=shapeworld.load_pipeline,
        load_prompts=shapeworld.load_prompts,
        reward_funcs=shapeworld.reward_funcs,
        sources={"composition": "compositional", "reader": "glyph"},
    ),
    # Nothing is tuned on it.
    "emojiworld": World(
        rewards=("matching", "quality", "background", "vivid", "simple"),
        load_pipeline=emojiworld.load_pipeline,
        load_prompts=emojiworld.load_prompts,
        reward_funcs=emojiworld.reward_funcs,
        heldout_funcs=emojiworld.heldout_funcs,
        sources={"background": "scene"},
        fingerprint=emojiworld.fingerprint,
    ),
}
