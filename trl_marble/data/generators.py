# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Generate prompt sets, for rewards that need to know what an image must show."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from ..rewards.geneval_scoring import CLASSES, COLORS


class Kind(NamedTuple):
    """Prompts of one kind: one for each combination of values, one value from every axis."""

    axes: Sequence[Sequence[Any]]
    make: Callable[..., dict[str, str]]

    @property
    def size(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    def pick(self, place: int) -> dict[str, str]:
        """The prompt at a place between 0 and `size - 1`."""
        values = []
        for axis in self.axes:
            place, i = divmod(place, len(axis))
            values.append(axis[i])
        return self.make(*values)


# ---- Written text ----

STYLES = ("a photograph of", "a close view of", "a watercolor painting of", "a pencil drawing of", "a 3D render of")
SURFACES = (
    "wooden sign",
    "neon sign",
    "road sign",
    "chalkboard",
    "shop window",
    "paper banner",
    "brick wall",
    "metal plaque",
    "coffee mug",
    "cotton shirt",
    "birthday cake",
    "book cover",
    "movie poster",
    "phone screen",
    "train ticket",
    "enamel badge",
    "old envelope",
    "open umbrella",
    "kitchen apron",
    "delivery van",
)
CLAIMS = ("that says", "that reads", "with the text", "showing the text")
PLACES = (
    "in a quiet street",
    "in a sunlit garden",
    "in an old library",
    "in a small kitchen",
    "in an empty classroom",
    "in a train station",
    "in a pine forest",
    "at a busy market",
    "at the end of a pier",
    "at a mountain hut",
    "on a rainy evening",
    "on a snowy morning",
    "on a desert road",
    "on a crowded beach",
    "under a starry sky",
    "under a stone bridge",
    "next to a bicycle",
    "next to a sleeping cat",
    "in front of a lighthouse",
    "in front of a red curtain",
)
WORDS = (
    "Welcome",
    "Open",
    "Closed",
    "Harvest",
    "Bakery",
    "Library",
    "Museum",
    "Harbor",
    "Theater",
    "Garden",
    "Festival",
    "Adventure",
    "Tomorrow",
    "Courage",
    "Balance",
    "Silence",
    "Echo",
    "Marble",
    "Velvet",
    "Compass",
    "Lantern",
    "Orchard",
    "Horizon",
    "Quartz",
)
ADJECTIVES = (
    "Fresh",
    "Quiet",
    "Golden",
    "Hidden",
    "Bright",
    "Gentle",
    "Wild",
    "Simple",
    "Northern",
    "Secret",
    "Happy",
    "Honest",
    "Silver",
    "Warm",
    "Endless",
    "Little",
)
NOUNS = (
    "Bread",
    "River",
    "Flowers",
    "Stories",
    "Journey",
    "Music",
    "Island",
    "Morning",
    "Kitchen",
    "Books",
    "Mountain",
    "Apples",
    "Winter",
    "Dreams",
    "Coffee",
    "Wonders",
)
VERBS = ("Discover", "Celebrate", "Remember", "Follow", "Protect", "Share", "Enjoy", "Imagine")
LABELS = ("Gate", "Room", "Platform", "Table", "Chapter", "Route", "Level", "Exit")


def ocr_prompts(n: int, seed: int = 0) -> Dataset:
    """
    Generate prompts that ask for written text.

    One fifth each asks for one word, two words, three words, a number, and a word with a number, in different places
    and styles. Nothing but the text is in double quotes, where rewards that read text look for it.

    Two sets made with different seeds may share prompts. For training and evaluation split one set:
    `ocr_prompts(1100).train_test_split(test_size=100)`.

    Args:
        n (`int`):
            Number of prompts, at least 1. They are all different.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random choice. The same seed gives the same prompts.

    Returns:
        `datasets.Dataset`: with the columns `prompt` (`str`) and `text` (`str`), the text that the image must show.

    Raises:
        `ValueError`: If `n` is not positive, or more than there are.
    """
    numbers = [str(number) for number in range(10, 10_000)]
    texts: list[Sequence[Sequence[str]]] = [
        [WORDS],
        [ADJECTIVES, NOUNS],
        [VERBS, ADJECTIVES, NOUNS],
        [numbers],
        [LABELS, [str(number) for number in range(1, 100)]],
    ]
    return _generate([Kind((STYLES, SURFACES, CLAIMS, PLACES, *words), _ocr_prompt) for words in texts], n, seed)


def _ocr_prompt(style: str, surface: str, claim: str, place: str, *words: str) -> dict[str, str]:
    text = " ".join(words)
    return {"prompt": f'{style} {with_article(surface)} {claim} "{text}" {place}', "text": text}


# ---- Composition ----

COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"to the left of": "left of", "to the right of": "right of", "above": "above", "below": "below"}

# Not GenEval's own "a photo of", so that no prompt of the benchmark is used for training.
FRAMES = ("a picture of", "a photograph of", "a snapshot of", "a realistic image of")
PAIRS = tuple((first, second) for first in CLASSES for second in CLASSES if first != second)
# A person has no colour, and "an orange orange" is no prompt.
COLORABLE = tuple(name for name in CLASSES if name not in ("person", "orange"))
COLORABLE_PAIRS = tuple((first, second) for first, second in PAIRS if {first, second} <= set(COLORABLE))
COLOR_PAIRS = tuple((first, second) for first in COLORS for second in COLORS if first != second)

# One object of a class, where this is not the name of the class; `{}` is the place of a colour.
SINGULARS = {
    "broccoli": "head of {}broccoli",
    "scissors": "pair of {}scissors",
    "skis": "pair of {}skis",
    "tv": "{}TV",
    "tv remote": "{}TV remote",
}
PLURALS = {
    "broccoli": "heads of broccoli",
    "scissors": "pairs of scissors",
    "skis": "pairs of skis",
    "tv": "TVs",
    "tv remote": "TV remotes",
    "computer mouse": "computer mice",
    "knife": "knives",
    "person": "people",
    "sheep": "sheep",
}


def compositional_prompts(n: int, seed: int = 0) -> Dataset:
    """
    Generate prompts that ask for objects, their number, colours and positions, as GenEval
    (https://huggingface.co/papers/2310.11513) does, with the same 80 classes and ten colours.

    GenEval's six kinds have equal shares, as long as there are enough of each (320 `single_object`, 960 `counting`).
    The wording differs from the benchmark's, so that none of its prompts is among these; the objects are the same.

    Two sets made with different seeds may share prompts. For training and evaluation split one set:
    `compositional_prompts(1100).train_test_split(test_size=100)`.

    Args:
        n (`int`):
            Number of prompts, at least 1. They are all different.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random choice. The same seed gives the same prompts.

    Returns:
        `datasets.Dataset`: with the columns

        - `prompt` (`str`),
        - `tag` (`str`): `"single_object"`, `"two_object"`, `"counting"`, `"colors"`, `"position"` or `"color_attr"`,
        - `include` (`str`): JSON list of what the image must show, objects `{"class", "count"}` with a `"color"` if
          the prompt names one, and `"position": [relation, 0]` for a relation to the first object in the list.

    Raises:
        `ValueError`: If `n` is not positive, or more than there are.
    """
    kinds = [
        Kind((FRAMES, CLASSES), _single_object),
        Kind((FRAMES, PAIRS), _two_object),
        Kind((FRAMES, CLASSES, tuple(COUNTS)), _counting),
        Kind((FRAMES, COLORABLE, COLORS), _colors),
        Kind((FRAMES, PAIRS, tuple(RELATIONS)), _position),
        Kind((FRAMES, COLORABLE_PAIRS, COLOR_PAIRS), _color_attr),
    ]
    return _generate(kinds, n, seed)


def with_article(noun: str) -> str:
    """`"an apple"`, `"a bench"`. Right for the words of this module, not for "hour" or "university"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def one(name: str, color: str = "") -> str:
    """One object of a class, in words: `"a pair of red scissors"`."""
    return with_article(SINGULARS.get(name, "{}" + name).format(f"{color} " if color else ""))


def several(name: str) -> str:
    """More than one object of a class, in words: `"wine glasses"`."""
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "sh", "ch")) else "s")


def _row(tag: str, prompt: str, *include: dict[str, Any]) -> dict[str, str]:
    return {"prompt": prompt, "tag": tag, "include": json.dumps(include)}


def _single_object(frame: str, name: str) -> dict[str, str]:
    return _row("single_object", f"{frame} {one(name)}", {"class": name, "count": 1})


def _two_object(frame: str, names: tuple[str, str]) -> dict[str, str]:
    first, second = names
    prompt = f"{frame} {one(first)} and {one(second)}"
    return _row("two_object", prompt, {"class": first, "count": 1}, {"class": second, "count": 1})


def _counting(frame: str, name: str, count: str) -> dict[str, str]:
    return _row("counting", f"{frame} {count} {several(name)}", {"class": name, "count": COUNTS[count]})


def _colors(frame: str, name: str, color: str) -> dict[str, str]:
    return _row("colors", f"{frame} {one(name, color)}", {"class": name, "count": 1, "color": color})


def _position(frame: str, names: tuple[str, str], relation: str) -> dict[str, str]:
    reference, placed = names
    return _row(
        "position",
        f"{frame} {one(placed)} {relation} {one(reference)}",
        {"class": reference, "count": 1},
        {"class": placed, "count": 1, "position": [RELATIONS[relation], 0]},
    )


def _color_attr(frame: str, names: tuple[str, str], colors: tuple[str, str]) -> dict[str, str]:
    (first, second), (color, other) = names, colors
    return _row(
        "color_attr",
        f"{frame} {one(first, color)} and {one(second, other)}",
        {"class": first, "count": 1, "color": color},
        {"class": second, "count": 1, "color": other},
    )


def _generate(kinds: Sequence[Kind], n: int, seed: int) -> Dataset:
    """`n` different prompts in random order, with equal numbers of each kind as far as there are enough."""
    available = sum(kind.size for kind in kinds)
    if not 1 <= n <= available:
        raise ValueError(f"`n` is {n}; there are {available} different prompts, so pass 1 to {available}.")
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    by_size = sorted(kinds, key=lambda kind: kind.size)
    for position, kind in enumerate(by_size):
        # If a small kind does not have enough prompts, the larger ones have more.
        count = min(kind.size, (n - len(rows)) // (len(by_size) - position))
        rows += [kind.pick(place) for place in generator.sample(range(kind.size), count)]
    generator.shuffle(rows)
    return Dataset.from_list(rows)
