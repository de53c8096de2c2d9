# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""All captions of ShapeWorld's small language, and prompt sets of them."""

import json
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from datasets import Dataset

from .drawing import PALETTE, SHAPES


COUNT_WORDS = {"two": 2, "three": 3, "four": 4}
QUANTITIES = {"some": (2, 4), "a few": (3, 4), "many": (5, 6)}
RELATIONS = ("above", "below", "left of", "right of")
DIGITS = tuple("0123456789")
WORDS = ("no", "go", "up", "hi", "ok", "on", "yes", "cat", "sun", "fox")

# Prompts per tag in the test and in the train split: 16 per source in test; in train most are for the specialists,
# whose rewards are hard to learn. All glyph prompts are used, so that every text is among them.
SPLIT_SIZES = {
    "colors": (4, 14),
    "counting": (4, 40),
    "two_object": (4, 40),
    "position": (4, 40),
    "digit": (8, 52),
    "word": (8, 52),
    "free": (16, 16),
}


@dataclass(frozen=True)
class Group:
    """`count = (least, most)` objects of one kind; a shape or colour of `None` is chosen at random."""

    count: tuple[int, int]
    colour: str | None
    shape: str | None


@dataclass(frozen=True)
class Caption:
    """A prompt, and what a picture of it must show.

    Attributes:
        prompt (`str`): The prompt.
        tag (`str`): A key of `SPLIT_SIZES`; the first four are GenEval's names.
        groups (`tuple[Group, ...]`): The objects to draw; empty for glyphs.
        relation (`str`, *optional*): The position of the first object relative to the second, one of `RELATIONS`.
        text (`str`, *optional*): The glyphs to write, in upper case.
        colour (`str`, *optional*): The glyphs' colour.
    """

    prompt: str
    tag: str
    groups: tuple[Group, ...] = field(default=())
    relation: str | None = None
    text: str | None = None
    colour: str | None = None

    @property
    def source(self) -> str:
        if self.text is not None:
            return "glyph"
        return "free" if self.tag == "free" else "compositional"

    @property
    def include(self) -> str | None:
        """GenEval's `include` as JSON, so that it is text in a dataset; `None` if the caption is not compositional."""
        if self.source != "compositional":
            return None
        objects: list[dict] = [{"class": g.shape, "color": g.colour, "count": g.count[0]} for g in self.groups]
        if self.relation is not None:
            objects[0]["position"] = [self.relation, 1]
        return json.dumps(objects)


def all_captions(tag: str) -> list[Caption]:
    """All captions of one kind, in a fixed order.

    Args:
        tag (`str`): A key of `SPLIT_SIZES`.

    Returns:
        `list[Caption]`
    """
    kinds = list(product(PALETTE, SHAPES))
    pairs = [(a, b) for a, b in product(kinds, kinds) if a[0] != b[0] and a[1] != b[1]]
    one = (1, 1)
    if tag == "colors":
        return [Caption(f"a {c} {s}", tag, (Group(one, c, s),)) for c, s in kinds]
    if tag == "counting":
        return [
            Caption(f"{word} {c} {s}s", tag, (Group((n, n), c, s),))
            for word, n in COUNT_WORDS.items()
            for c, s in kinds
        ]
    if tag == "two_object":
        return [
            Caption(f"a {c} {s} and a {d} {t}", tag, (Group(one, c, s), Group(one, d, t))) for (c, s), (d, t) in pairs
        ]
    if tag == "position":
        return [
            Caption(f"a {c} {s} {relation} a {d} {t}", tag, (Group(one, c, s), Group(one, d, t)), relation)
            for relation in RELATIONS
            for (c, s), (d, t) in pairs
        ]
    if tag in ("digit", "word"):
        texts = DIGITS if tag == "digit" else WORDS
        return [
            Caption(f'a {c} sign that says "{text}"', tag, text=text.upper(), colour=c)
            for text in texts
            for c in PALETTE
        ]
    if tag == "free":
        return [
            Caption(" ".join(w for w in (q, c, f"{s or 'shape'}s") if w), tag, (Group(counts, c, s),))
            for (q, counts), c, s in product(QUANTITIES.items(), (None, *PALETTE), (None, *SHAPES))
        ]
    raise ValueError(f"unknown tag {tag!r}; use one of {', '.join(SPLIT_SIZES)}")


def split_captions(split: str) -> list[Caption]:
    """The captions of a split, see `load_prompts`."""
    if split not in ("train", "test"):
        raise ValueError(f'unknown split {split!r}; use "train" or "test"')
    captions = []
    for tag, (test_size, train_size) in SPLIT_SIZES.items():
        candidates = all_captions(tag)
        order = np.random.default_rng(0).permutation(len(candidates))[: test_size + train_size]
        chosen = order[:test_size] if split == "test" else order[test_size:]
        captions += [candidates[i] for i in chosen]
    return captions


def load_prompts(split: str) -> Dataset:
    """The prompts for training or for evaluation.

    No prompt is in both splits, and both are the same at every call. The pretrained pipeline was trained on pictures
    of *all* captions, also those of the test split: they are held out from the reinforcement learning only.

    Args:
        split (`str`): `"train"` (254 prompts: 134 compositional, 104 glyph, 16 free) or `"test"` (48, 16 of each).

    Returns:
        `datasets.Dataset`: with the columns

        - `prompt` (`str`),
        - `source` (`str`): `"compositional"`, `"glyph"` or `"free"`,
        - `tag` (`str`): GenEval's `"colors"`, `"counting"`, `"two_object"`, `"position"`, and `"digit"`, `"word"`,
          `"free"`,
        - `include` (`str` or `None`): JSON list of GenEval objects `{"class", "color", "count"}`, the first one with
          `"position": [relation, 1]` if the prompt has a relation; `None` unless compositional,
        - `text` (`str` or `None`): the glyphs in upper case; `None` unless glyph.

    Raises:
        `ValueError`: for any other split.
    """
    columns = ("prompt", "source", "tag", "include", "text")
    return Dataset.from_list([{c: getattr(caption, c) for c in columns} for caption in split_captions(split)])
