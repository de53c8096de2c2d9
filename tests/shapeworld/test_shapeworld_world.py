# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest

from trl_marble.shapeworld import PALETTE, SHAPES, all_captions, draw_picture, generate, load_prompts, split_captions
from trl_marble.shapeworld.drawing import GAP, SIZE
from trl_marble.shapeworld.prompts import SPLIT_SIZES
from trl_marble.shapeworld.world import place


def test_generator_is_deterministic_and_its_seeds_differ():
    first, again, other = (list(generate(20, seed)) for seed in (3, 3, 4))
    assert [c.prompt for c, _ in first] == [c.prompt for c, _ in again]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert [c.prompt for c, _ in first] != [c.prompt for c, _ in other]
    assert all(image.size == (SIZE, SIZE) and image.mode == "RGB" for _, image in first)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_objects_stay_apart_and_inside(count):
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, y, radius = place(count, None, rng)
        assert (np.minimum(x, y) - radius >= 0).all() and (np.maximum(x, y) + radius <= SIZE).all()
        for i in range(count):
            for j in range(i):
                gap = max(abs(x[i] - x[j]), abs(y[i] - y[j])) - radius[i] - radius[j]
                assert gap >= GAP


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("above", 1, -1), ("below", 1, 1), ("left of", 0, -1), ("right of", 0, 1)]
)
def test_relations_hold_between_the_places(relation, axis, sign):
    rng = np.random.default_rng(1)
    for _ in range(30):
        centres = np.stack(place(2, relation, rng)[:2])
        offset = centres[:, 0] - centres[:, 1]
        assert sign * offset[axis] > abs(offset[1 - axis])


def test_splits_share_no_prompt_and_balance_the_sources():
    train, test = load_prompts("train"), load_prompts("test")
    assert not set(train["prompt"]) & set(test["prompt"])
    for dataset, per_source in ((train, (134, 104, 16)), (test, (16, 16, 16))):
        assert dataset.column_names == ["prompt", "source", "tag", "include", "text"]
        assert len(set(dataset["prompt"])) == len(dataset)
        assert tuple(map(dataset["source"].count, ("compositional", "glyph", "free"))) == per_source
    assert set(train["tag"]) == set(test["tag"]) == set(SPLIT_SIZES)
    assert load_prompts("test")[:] == test[:]


def test_an_unknown_split_or_tag_is_refused():
    with pytest.raises(ValueError, match="validation"):
        load_prompts("validation")
    with pytest.raises(ValueError, match="colour"):
        all_captions("colour")


def test_columns_say_what_the_prompt_asks_for():
    for row in load_prompts("train"):
        assert (row["include"] is not None) == (row["source"] == "compositional")
        assert (row["text"] is not None) == (row["source"] == "glyph")
        if row["text"] is not None:
            assert f'"{row["text"].lower()}"' in row["prompt"]
        for entry in json.loads(row["include"] or "[]"):
            assert entry["class"] in SHAPES and entry["color"] in PALETTE
            assert f"{entry['color']} {entry['class']}" in row["prompt"]


def test_every_caption_of_both_splits_can_be_drawn():
    rng = np.random.default_rng(2)
    for caption in split_captions("train") + split_captions("test"):
        assert np.asarray(draw_picture(caption, rng)).std() > 5
