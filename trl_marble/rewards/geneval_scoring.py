# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""GenEval's rules: read what a prompt asks for, select the detected objects that count, and score them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


# GenEval's names of the 80 COCO classes in COCO's order; COCO says mouse, remote and keyboard without computer and tv.
CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

THRESHOLD = 0.3  # minimal confidence of an object that counts
COUNTING_THRESHOLD = 0.9  # the same for prompts of the tag "counting"
MAX_OBJECTS = 16  # per class
POSITION_THRESHOLD = 0.1  # an offset counts as far as it exceeds this share of the sizes of both objects


@dataclass(frozen=True)
class Clause:
    """
    Objects that a prompt asks for.

    Attributes:
        name (`str`): Their class, one of `CLASSES`.
        count (`int`): Their number, at least 1.
        color (`str`, *optional*): Their color, one of `COLORS`.
        position (`tuple[str, int]`, *optional*): Their relation, one of `RELATIONS`, to the objects of another clause,
            and the index of that clause in the list.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True, eq=False)
class Detection:
    """
    An object in an image.

    Attributes:
        box (`tuple[float, float, float, float]`): Left, top, right and bottom in pixels.
        score (`float`): The detector's confidence, in [0, 1].
        mask (`np.ndarray`): Of shape `[H, W]`, `bool`: the object's pixels.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray


class Request(NamedTuple):
    """The objects that a prompt asks for and its tag, see [`parse_request`]."""

    include: list[Clause]
    exclude: list[Clause]
    tag: str


Found = Mapping[str, Sequence[Detection]]
"""The objects that count, by class, the most confident first; classes without objects may be missing."""

ColorsOf = Callable[[str, Sequence[Detection]], Sequence[str]]
"""A function that names the color of each of some objects of a class."""


def parse_request(prompt: str, include: Any, tag: Any, exclude: Any = None) -> Request | None:
    """
    Read a row of a dataset.

    Args:
        prompt (`str`):
            The prompt, for messages.
        include (`str`, `list[dict]` or `None`):
            See [`parse_clauses`].
        tag (`str`):
            One of `TAGS`. Not read if `include` is empty.
        exclude (`str`, `list[dict]` or `None`, *optional*):
            See [`parse_clauses`]. Not read if `include` is empty.

    Returns:
        [`Request`] or `None`: `None` if `include` is `None` or empty.

    Raises:
        `ValueError`: If GenEval cannot use a value; names the prompt, the value and what is possible.
    """
    included = parse_clauses(include, prompt)
    if not included:
        return None
    if tag not in TAGS:
        raise ValueError(
            f"GenEval cannot use `tag` of the prompt {prompt!r}: unknown tag {tag!r}; use one of {', '.join(TAGS)}."
        )
    return Request(included, parse_clauses(exclude, prompt, "exclude"), tag)


def parse_clauses(value: Any, prompt: str, column: str = "include") -> list[Clause]:
    """
    Read a value of the column `include` or `exclude`; the second has no colors and no positions.

    Args:
        value (`str`, `list[dict]` or `None`):
            `{"class": str, "count": int, "color": str, "position": [relation, index]}` for each kind of object, the
            last two optional; or the same as JSON.
        prompt (`str`):
            The prompt, for messages.
        column (`str`, *optional*, defaults to `"include"`):
            Name of the column, for messages.

    Returns:
        `list[Clause]`: empty for `None` and an empty list or text.

    Raises:
        `ValueError`: If it cannot be read, or contains something that GenEval does not have; names the prompt, the
            value and what is possible.
    """

    def refuse(problem: str) -> ValueError:
        return ValueError(f"GenEval cannot use `{column}` of the prompt {prompt!r}: {problem}")

    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise refuse(f"{value!r} is not JSON ({error}).") from error
    if value is None:
        return []
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(item, Mapping) for item in value)
    ):
        raise refuse(f'{value!r} is not a list of objects such as [{{"class": "dog", "count": 1}}].')
    known = {"class", "count", "color", "position"} if column == "include" else {"class", "count"}
    clauses = []
    for index, item in enumerate(value):
        # In a table every row has the same fields, with `None` for those that it does not use.
        fields = {key: field for key, field in item.items() if field is not None}
        if unknown := sorted(fields.keys() - known):
            raise refuse(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        name, count, color = fields.get("class"), fields.get("count"), fields.get("color")
        if name not in CLASSES:
            raise refuse(f"unknown class {name!r}; use one of the 80 COCO classes: {', '.join(CLASSES)}.")
        if type(count) is not int or count < 1:
            raise refuse(f"the count of {name!r} is {count!r}; use a whole number of at least 1.")
        if color is not None and color not in COLORS:
            raise refuse(f"unknown color {color!r}; use one of {', '.join(COLORS)}.")
        position = fields.get("position")
        if position is not None:
            if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
                raise refuse(f'the position {position!r} is not a pair such as ["left of", 0].')
            relation, target = position
            if relation not in RELATIONS:
                raise refuse(f"unknown relation {relation!r}; use one of {', '.join(RELATIONS)}.")
            if type(target) is not int or not 0 <= target < len(value) or target == index:
                raise refuse(
                    f"the position of {name!r} is relative to {target!r}; use the index of another object in the "
                    f"list, from 0 to {len(value) - 1}."
                )
            position = (relation, target)
        clauses.append(Clause(name, count, color, position))
    try:
        evaluation_order(clauses)
    except ValueError as error:
        raise refuse(str(error)) from error
    return clauses


def evaluation_order(clauses: Sequence[Clause]) -> list[int]:
    """
    Sort the indices of clauses, so that each comes after the one that its position is relative to.

    GenEval's own prompts have that order already; others may not.

    Raises:
        `ValueError`: If there is no such order.
    """
    order: list[int] = []
    while len(order) < len(clauses):
        ready = [i for i, c in enumerate(clauses) if i not in order and (c.position is None or c.position[1] in order)]
        if not ready:
            raise ValueError("the positions are relative to each other in a circle; remove one of them.")
        order += ready
    return order


def select_objects(objects: Sequence[Detection], tag: str, max_overlap: float = 1.0) -> list[Detection]:
    """
    Select those of the detected objects of one class that count.

    Args:
        objects (`Sequence[Detection]`):
            All detected objects, in any order.
        tag (`str`):
            The prompt's tag: with `"counting"` the detector must be more confident.
        max_overlap (`float`, *optional*, defaults to `1.0`):
            Intersection over union from which the less confident one of two objects is left out; 1 keeps all.

    Returns:
        `list[Detection]`: at most 16, the most confident one first.
    """
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    scores = np.array([each.score for each in objects], dtype=np.float32)
    best = [objects[i] for i in np.argsort(scores)[::-1] if scores[i] > least][:MAX_OBJECTS]
    kept: list[Detection] = []
    for each in best:
        if max_overlap == 1 or all(overlap(each.box, other.box) < max_overlap for other in kept):
            kept.append(each)
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union, in [0, 1], of two boxes whose right and bottom pixels are inside."""
    both = _area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    either = _area(*a) + _area(*b) - both
    return both / either if either else 0.0


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """
    The relations of the box `a` to the box `b`.

    The offset of their centers counts as far as it exceeds a tenth of their sizes, and a direction counts if it has
    more than half of the full offset. So there can be two directions, or none.

    Returns:
        `set[str]`: some of `RELATIONS`.
    """
    corners = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)  # box, corner, axis
    centers, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    clear = np.maximum(np.abs(offset) - POSITION_THRESHOLD * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    x, y = clear / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def strict_score(include: Sequence[Clause], exclude: Sequence[Clause], found: Found, colors_of: ColorsOf) -> float:
    """
    GenEval's own score: 1 if the image shows everything that is asked for, otherwise 0.

    A clause is fulfilled if there are at least `count` objects and the `count` most confident of them have its color
    and are all in its position to all objects of its target, which must be fulfilled itself. More objects do not
    count against it, unless `exclude` forbids `count` or more objects of a class.

    Args:
        include (`Sequence[Clause]`):
            The objects asked for.
        exclude (`Sequence[Clause]`):
            The objects forbidden.
        found (`Mapping[str, Sequence[Detection]]`):
            The objects that count, by class, see [`select_objects`].
        colors_of (`Callable`):
            Names the colors of objects of a class. Called only if needed.

    Returns:
        `float`: 0 or 1.
    """
    matched: dict[int, Sequence[Detection]] = {}
    for i in evaluation_order(include):
        clause = include[i]
        objects = found.get(clause.name, [])[: clause.count]
        holds = (
            len(objects) == clause.count
            and (clause.color is None or all(c == clause.color for c in colors_of(clause.name, objects)))
            and (clause.position is None or _in_position(objects, clause.position[0], matched[clause.position[1]]))
        )
        if not holds:
            return 0.0
        matched[i] = objects
    return float(all(len(found.get(clause.name, [])) < clause.count for clause in exclude))


def partial_score(include: Sequence[Clause], found: Found, colors_of: ColorsOf) -> float:
    """
    Partial credit as in the reward that Flow-GRPO (huggingface.co/papers/2505.05470) trains on: the mean of terms.

    - Each clause gives `1 - |count - n| / count` for n objects. Unlike `strict_score`, surplus objects cost as much as
      missing ones, so that `exclude` adds nothing, and the term is negative from `2 * count + 1` objects on.
    - If the number is right, a color gives the same term, with n objects of that color.
    - If number and color are right, a position gives 1; if it is wrong it gives both a 0 and a 1 (this is how the
      original computes it), and a 0 if its target is not fulfilled.
    - If the number is wrong, color and position together give one 0. If the color is wrong, the position gives none.

    Args:
        include (`Sequence[Clause]`):
            The objects asked for, at least one clause.
        found (`Mapping[str, Sequence[Detection]]`):
            The objects that count, by class, see [`select_objects`].
        colors_of (`Callable`):
            Names the colors of objects of a class. Called only if needed.

    Returns:
        `float`: at most 1, and 1 only if everything is right; -14 with 16 objects instead of one.
    """
    matched: dict[int, Sequence[Detection] | None] = {}
    terms: dict[int, list[float]] = {}
    for i in evaluation_order(include):
        clause = include[i]
        objects = found.get(clause.name, [])
        terms[i] = [_closeness(len(objects), clause.count)]
        holds = len(objects) == clause.count
        if not holds and (clause.color is not None or clause.position is not None):
            terms[i].append(0.0)
        if holds and clause.color is not None:
            right = sum(color == clause.color for color in colors_of(clause.name, objects))
            terms[i].append(_closeness(right, clause.count))
            holds = right == clause.count
        if holds and clause.position is not None:
            relation, target = clause.position
            targets = matched[target]
            if targets is None:
                terms[i].append(0.0)
                holds = False
            else:
                holds = _in_position(objects, relation, targets)
                terms[i] += [1.0] if holds else [0.0, 1.0]
        matched[i] = objects if holds else None
    # Summed in the order of the clauses, so that the rounding is that of the original.
    flat = [term for i in range(len(include)) for term in terms[i]]
    return sum(flat) / len(flat)


def _in_position(objects: Iterable[Detection], relation: str, targets: Sequence[Detection]) -> bool:
    return all(relation in relations(each.box, target.box) for each in objects for target in targets)


def _closeness(number: int, asked: int) -> float:
    return 1 - abs(asked - number) / asked


def _area(left: float, top: float, right: float, bottom: float) -> float:
    return max(right - left + 1, 0) * max(bottom - top + 1, 0)
