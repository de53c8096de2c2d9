# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""All captions of EmojiWorld, and prompt sets of them. What is drawn has the names that people gave it."""

import json
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
from datasets import Dataset


EMOJI_FILE = Path(__file__).parent / "emoji.json"
BACKGROUNDS = {
    "red": (226, 80, 72),
    "green": (96, 184, 100),
    "blue": (72, 132, 232),
    "yellow": (244, 212, 84),
    "purple": (164, 92, 204),
    "white": (244, 244, 244),
}
SOURCES = ("scene", "pair", "plain")
TEST_SIZE, TRAIN_SIZE = 16, 134  # prompts of each source


@dataclass(frozen=True)
class Caption:
    """A prompt, and what a picture of it must show.

    Attributes:
        prompt (`str`): The prompt.
        source (`str`): One of `SOURCES`.
        names (`tuple[str, ...]`): The emoji to draw, from left to right.
        background (`str`, *optional*): The asked colour, a key of `BACKGROUNDS`; `None` unless the source is `scene`.
    """

    prompt: str
    source: str
    names: tuple[str, ...]
    background: str | None = None


def scene(name: str, background: str) -> Caption:
    """The caption of one emoji on a background of a given colour."""
    return Caption(f"{name} on a {background} background", "scene", (name,), background)


def pair(left: str, right: str) -> Caption:
    """The caption of two emoji beside each other."""
    return Caption(f"{left} and {right}", "pair", (left, right))


def plain(name: str) -> Caption:
    """The caption of one emoji on any background."""
    return Caption(name, "plain", (name,))


@cache
def emoji_images() -> dict[str, str]:
    """The file of the picture of each emoji, by its name."""
    return {entry["name"]: entry["image"] for entry in json.loads(EMOJI_FILE.read_text(encoding="utf-8"))}


def all_words() -> list[str]:
    """Every word of every caption, once, in alphabetical order."""
    names = list(emoji_images())
    captions = [*map(plain, names), *(scene(names[0], colour) for colour in BACKGROUNDS), pair(*names[:2])]
    return sorted({word for caption in captions for word in caption.prompt.split()})


def random_caption(rng: np.random.Generator) -> Caption:
    """A random caption: each source is equally probable, and so is each emoji."""
    names = list(emoji_images())
    source = SOURCES[rng.integers(len(SOURCES))]
    left, right = rng.choice(len(names), 2, replace=False)
    if source == "scene":
        return scene(names[left], list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])
    return pair(names[left], names[right]) if source == "pair" else plain(names[left])


def split_captions(split: str) -> list[Caption]:
    """The captions of a split, see `load_prompts`."""
    if split not in ("train", "test"):
        raise ValueError(f'unknown split {split!r}; use "train" or "test"')
    rng = np.random.default_rng(0)
    names = rng.permutation(list(emoji_images())).tolist()  # so that the order in pairs is random
    candidates = {
        # Each pair in one order only: its reverse, in the other split, would be nearly the same prompt.
        "scene": [scene(name, colour) for name, colour in product(names, BACKGROUNDS)],
        "pair": [pair(left, right) for left, right in combinations(names, 2)],
        "plain": [plain(name) for name in names],
    }
    captions = []
    for source in SOURCES:
        order = rng.permutation(len(candidates[source]))[: TEST_SIZE + TRAIN_SIZE]
        chosen = order[:TEST_SIZE] if split == "test" else order[TEST_SIZE:]
        captions += [candidates[source][i] for i in chosen]
    return captions


def load_prompts(split: str) -> Dataset:
    """The prompts for training or for evaluation.

    No prompt is in both splits, and both are the same at every call. The pretrained pipeline saw captions
    of all kinds: the test split is held out from the reinforcement learning only.

    Args:
        split (`str`): `"train"` (402 prompts) or `"test"` (48), with equal shares of the sources.

    Returns:
        `datasets.Dataset`: with the columns

        - `prompt` (`str`),
        - `source` (`str`): `"scene"`, `"pair"` or `"plain"`,
        - `background` (`str` or `None`): the asked colour; `None` unless the source is `"scene"`.

    Raises:
        `ValueError`: for any other split.
    """
    columns = ("prompt", "source", "background")
    return Dataset.from_list([{c: getattr(caption, c) for c in columns} for caption in split_captions(split)])
