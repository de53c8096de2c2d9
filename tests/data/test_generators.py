# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Generated prompt sets: different prompts, the same at every call, which agree with their columns."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_marble.data import compositional_prompts, mix_prompts, ocr_prompts, validate_prompts
from trl_marble.data.generators import CLASSES, COLORS, COUNTS, FRAMES, RELATIONS, one, several, with_article


MAKERS = pytest.mark.parametrize("make", [ocr_prompts, compositional_prompts])


def sizes_and_seeds(test):
    return settings(max_examples=20)(given(n=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))(test))


@MAKERS
def test_the_seed_decides(make) -> None:
    first = make(40, seed=1)
    assert first.to_list() == make(40, seed=1).to_list()
    assert set(first["prompt"]) != set(make(40, seed=2)["prompt"])


@MAKERS
@sizes_and_seeds
def test_there_are_n_different_prompts(make, n, seed) -> None:
    prompts = make(n, seed)
    validate_prompts(prompts)
    assert len(set(prompts["prompt"])) == len(prompts) == n


@MAKERS
@pytest.mark.parametrize("n", [0, -3, 10**12])
def test_more_than_there_are_is_refused(make, n) -> None:
    with pytest.raises(ValueError, match=rf"`n` is {n}; there are (\d+) different prompts, so pass 1 to \1"):
        make(n)


def test_sets_can_be_mixed() -> None:
    mixed = mix_prompts({"ocr": ocr_prompts(3), "geneval": compositional_prompts(4)})
    assert mixed["text"][3:] == [None] * 4
    assert mixed["include"][:3] == [None] * 3


@sizes_and_seeds
def test_the_text_is_what_is_in_quotes(n, seed) -> None:
    for row in ocr_prompts(n, seed):
        assert re.findall('"(.*?)"', row["prompt"]) == [row["text"]]
        assert row["prompt"].count('"') == 2
        assert re.fullmatch(r"\w+( \w+){0,2}", row["text"])


def test_texts_are_of_five_kinds_in_equal_parts() -> None:
    shapes = Counter(re.sub("[A-Za-z]+", "w", re.sub(r"\d+", "0", text)) for text in ocr_prompts(100)["text"])
    assert shapes == {"w": 20, "w w": 20, "w w w": 20, "0": 20, "w 0": 20}


def test_tags_have_equal_parts_as_long_as_there_are_enough() -> None:
    assert set(Counter(compositional_prompts(60)["tag"]).values()) == {10}
    assert sorted(Counter(compositional_prompts(100)["tag"]).values()) == [16, 16, 17, 17, 17, 17]
    many = Counter(compositional_prompts(9000)["tag"])
    assert (many.pop("single_object"), many.pop("counting")) == (320, 960)  # all of them
    assert set(many.values()) == {1930}


def words_of(include: list[dict], tag: str) -> str:
    """The prompt without its frame, written anew from what must be seen."""
    first, *others = include
    if tag == "counting":
        return f"{ {n: word for word, n in COUNTS.items()}[first['count']] } {several(first['class'])}"
    words = [one(entry["class"], entry.get("color", "")) for entry in include]
    if tag == "position":
        relation, reference = others[0]["position"]
        return f"{words[1]} { {r: text for text, r in RELATIONS.items()}[relation] } {words[reference]}"
    return " and ".join(words)


@sizes_and_seeds
def test_include_agrees_with_the_prompt(n, seed) -> None:
    keys = {
        "single_object": [{"class", "count"}],
        "two_object": [{"class", "count"}] * 2,
        "counting": [{"class", "count"}],
        "colors": [{"class", "count", "color"}],
        "position": [{"class", "count"}, {"class", "count", "position"}],
        "color_attr": [{"class", "count", "color"}] * 2,
    }
    for row in compositional_prompts(n, seed):
        include = json.loads(row["include"])
        assert [set(entry) for entry in include] == keys[row["tag"]]
        assert {entry["class"] for entry in include} <= set(CLASSES)
        assert len({entry["class"] for entry in include}) == len(include)
        colors = [entry["color"] for entry in include if "color" in entry]
        assert set(colors) <= set(COLORS) and len(set(colors)) == len(colors)
        assert all(entry["count"] == 1 for entry in include) or row["tag"] == "counting"
        frame = next(frame for frame in FRAMES if row["prompt"].startswith(frame))
        assert row["prompt"] == f"{frame} {words_of(include, row['tag'])}"


def test_the_first_prompts_are_of_every_kind() -> None:
    assert len(set(compositional_prompts(600)["tag"][:60])) == 6
    assert {len(text.split()) for text in ocr_prompts(600)["text"][:60]} == {1, 2, 3}


def test_classes_without_colours_are_asked_for_without_one() -> None:
    colored = [
        entry["class"]
        for include in compositional_prompts(9000)["include"]
        for entry in json.loads(include)
        if "color" in entry
    ]
    assert set(colored) == set(CLASSES) - {"person", "orange"}


def test_prompts_of_the_benchmark_are_not_among_them() -> None:
    assert not any(prompt.startswith("a photo of ") for prompt in compositional_prompts(9000)["prompt"])


@pytest.mark.parametrize(
    ("name", "color", "singular", "plural"),
    [
        ("apple", "", "an apple", "apples"),
        ("apple", "green", "a green apple", "apples"),
        ("bench", "orange", "an orange bench", "benches"),
        ("bus", "", "a bus", "buses"),
        ("knife", "", "a knife", "knives"),
        ("person", "", "a person", "people"),
        ("sheep", "", "a sheep", "sheep"),
        ("scissors", "red", "a pair of red scissors", "pairs of scissors"),
        ("skis", "", "a pair of skis", "pairs of skis"),
        ("broccoli", "", "a head of broccoli", "heads of broccoli"),
        ("tv", "black", "a black TV", "TVs"),
        ("computer mouse", "", "a computer mouse", "computer mice"),
        ("wine glass", "", "a wine glass", "wine glasses"),
        ("toothbrush", "", "a toothbrush", "toothbrushes"),
    ],
)
def test_english(name, color, singular, plural) -> None:
    assert (one(name, color), several(name)) == (singular, plural)


def test_classes_and_colors_are_complete() -> None:
    assert len(set(CLASSES)) == len(CLASSES) == 80
    assert len(set(COLORS)) == len(COLORS) == 10
    assert with_article("old envelope") == "an old envelope"
