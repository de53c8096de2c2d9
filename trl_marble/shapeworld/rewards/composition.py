# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The specialist for shapes: does the picture show the objects of the prompt, in the positions of the prompt?

A detector like that of GenEval (huggingface.co/papers/2310.11513), which needs no learned weights in this small world,
and gives continuous partial credit instead of GenEval's yes or no.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from ..drawing import PALETTE, SHAPES, draw_shape
from .foreground import contrast


EDGE = 0.26  # contrast at the outline of an object
SMALLEST = 12  # pixels; smaller components are not objects
SHARPNESS = 0.05  # difference in IoU that makes one shape e times as probable as another
POOR_IOU, GOOD_IOU = 0.6, 0.85  # IoU with the ideal shape for the score 0, and for the score 1
GOOD_COLOUR, WRONG_COLOUR = 0.12, 0.5  # RGB distance to the palette for the score 1, and for the score 0
SQUARE = 0.8  # ratio of the shorter to the longer side from which an object counts as undistorted


@dataclass(frozen=True)
class Detection:
    """A detected object: its centre in pixels, its colour, and a score in [0, 1] for each shape in that colour."""

    x: float
    y: float
    colour: str
    scores: dict[str, float]


@lru_cache(maxsize=4096)
def _ideal(shape: str, height: int, width: int) -> np.ndarray:
    """The shape that fills a box of `height` x `width` pixels, as a mask."""
    scale = 4
    image = Image.new("L", (width * scale, height * scale))
    draw_shape(ImageDraw.Draw(image), shape, (0, 0, width * scale - 1, height * scale - 1), 255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) > 127


def _shape_scores(mask: np.ndarray) -> dict[str, float]:
    """The score in [0, 1] of a mask, which fills its box, for each of the shapes."""
    ious = np.array(
        [(mask & ideal).sum() / (mask | ideal).sum() for ideal in (_ideal(s, *mask.shape) for s in SHAPES)]
    )
    probabilities = np.exp((ious - ious.max()) / SHARPNESS)
    probabilities /= probabilities.sum()
    quality = np.clip((ious - POOR_IOU) / (GOOD_IOU - POOR_IOU), 0, 1)
    undistorted = min(min(mask.shape) / max(mask.shape) / SQUARE, 1.0)
    return dict(zip(SHAPES, (probabilities * quality * undistorted).tolist(), strict=True))


def detect(image: Image.Image) -> list[Detection]:
    """Find the objects: connected foreground pixels of one palette colour.

    A pixel's colour is the palette entry whose difference to the background has the most similar direction, so that
    antialiased edges, which mix object and background, count as the object's.

    Args:
        image (`PIL.Image.Image`): RGB.

    Returns:
        `list[Detection]`: every object of at least 12 pixels.
    """
    difference, ground = contrast(image)
    foreground = np.abs(difference).max(axis=2) > EDGE
    colours = np.array(list(PALETTE.values()), dtype=np.float32) / 255 - ground
    directions = colours / np.maximum(np.linalg.norm(colours, axis=1, keepdims=True), 1e-6)
    nearest = np.where(foreground, (difference @ directions.T).argmax(axis=2), -1)
    found = []
    for index, name in enumerate(PALETTE):
        labels, _ = ndimage.label(nearest == index)
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[box] == label
            if mask.sum() < SMALLEST:
                continue
            distance = np.linalg.norm(np.median(difference[box][mask], axis=0) - colours[index])
            purity = float(np.clip((WRONG_COLOUR - distance) / (WRONG_COLOUR - GOOD_COLOUR), 0, 1))
            scores = {shape: score * purity for shape, score in _shape_scores(mask).items()}
            rows, columns = box
            found.append(Detection((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2, name, scores))
    return found


def _relation_score(relation: str, subject: Detection, other: Detection) -> float:
    """1 if the subject is within about 45 degrees of the direction of the relation, 0 from 100 degrees on."""
    direction = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}[relation]
    offset = np.array([subject.x - other.x, subject.y - other.y])
    cosine = offset @ direction / max(float(np.hypot(*offset)), 1e-6)
    return float(np.clip((cosine + 0.2) / 0.9, 0, 1))


def score_objects(objects: list[dict], found: list[Detection]) -> float:
    """Match the detected objects to those of the prompt.

    The score is the sum of the scores over the best one-to-one matching, divided by the number of objects of the
    prompt or of detected ones, whichever is larger. If the prompt has a relation, half of the score is for it.

    Args:
        objects (`list[dict]`): GenEval's `include`, see `load_prompts`.
        found (`list[Detection]`): From `detect`.

    Returns:
        `float`: in [0, 1].
    """
    asked = [entry for entry in objects for _ in range(entry["count"])]
    if not found:
        return 0.0
    scores = np.array([[d.scores[a["class"]] if d.colour == a["color"] else 0.0 for d in found] for a in asked])
    rows, columns = linear_sum_assignment(scores, maximize=True)
    score = float(scores[rows, columns].sum()) / max(len(asked), len(found))
    for row, entry in enumerate(asked):
        if "position" in entry:
            relation, other = entry["position"]
            matched = dict(zip(rows.tolist(), columns.tolist(), strict=True))
            holds = 0.0
            if row in matched and other in matched:
                holds = _relation_score(relation, found[matched[row]], found[matched[other]])
            score *= (1 + holds) / 2
    return score


def composition(images: list[Image.Image], include: list[str | None], **kwargs) -> list[float | None]:
    """How well the picture shows the objects of the prompt: colours, shapes, counts and positions.

    Args:
        images (`list[PIL.Image.Image]`): RGB pictures.
        include (`list[str | None]`): The objects of each prompt, in the form of `load_prompts`.

    Returns:
        `list[float | None]`: one value in [0, 1] per picture; `None` where `include` is `None`.
    """
    return [
        None if asked is None else score_objects(json.loads(asked), detect(image))
        for image, asked in zip(images, include, strict=True)
    ]
