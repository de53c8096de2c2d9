# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from PIL import Image, ImageDraw

from trl_marble.shapeworld import PALETTE, all_captions, draw_picture, reward_funcs
from trl_marble.shapeworld.drawing import Item, draw_items
from trl_marble.shapeworld.prompts import DIGITS, WORDS, Caption, Group
from trl_marble.shapeworld.rewards import calm, centring, composition, coverage, reader


COMPOSITIONAL = ("colors", "counting", "two_object", "position")
GLYPHS = ("digit", "word")
GROUND = (30, 34, 40)


def drawn(tag, count, seed=0):
    rng = np.random.default_rng(seed)
    captions = [all_captions(tag)[i] for i in rng.integers(len(all_captions(tag)), size=count)]
    return captions, [draw_picture(caption, rng) for caption in captions]


def canvas(colour=GROUND):
    image = Image.new("RGB", (64, 64), colour)
    return image, ImageDraw.Draw(image)


def trivial_pictures():
    rng = np.random.default_rng(0)
    dot, draw = canvas()
    draw.point((32, 32), PALETTE["white"])
    flood, draw = canvas()
    draw.rectangle((1, 1, 62, 62), fill=PALETTE["red"])
    return {
        "blank": canvas()[0],
        "flat": canvas(PALETTE["red"])[0],
        "single pixel": dot,
        "flood inside a thin frame": flood,
        "noise": Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        "dim noise": Image.fromarray(rng.integers(0, 140, (64, 64, 3), dtype=np.uint8)),
    }


def apply_all(images, captions):
    columns = {name: [getattr(c, name) for c in captions] for name in ("include", "text", "source", "tag")}
    return {f.__name__: f(images=images, prompts=[c.prompt for c in captions], **columns) for f in reward_funcs()}


def test_names_and_number():
    assert [f.__name__ for f in reward_funcs()] == ["composition", "reader", "coverage", "centring", "calm"]


@pytest.mark.parametrize("tag", [*COMPOSITIONAL, *GLYPHS, "free"])
def test_specialists_apply_to_their_own_prompts_only_and_all_values_are_in_range(tag):
    captions, images = drawn(tag, 12)
    values = apply_all(images, captions)
    for name, column in values.items():
        if name in ("composition", "reader") and tag not in {"composition": COMPOSITIONAL, "reader": GLYPHS}[name]:
            assert column == [None] * 12
        else:
            assert all(isinstance(v, float) and 0 <= v <= 1 for v in column)


@pytest.mark.parametrize("tag", COMPOSITIONAL)
def test_composition_is_high_for_the_right_picture_and_low_for_another_caption(tag):
    captions, images = drawn(tag, 60)
    right = composition(images=images, include=[c.include for c in captions])
    others = captions[1:] + captions[:1]
    wrong = composition(images=images, include=[c.include for c in others])
    wrong = [w for w, a, b in zip(wrong, captions, others, strict=True) if a.include != b.include]
    assert np.mean(right) > 0.93
    assert np.mean(wrong) < 0.2


@pytest.mark.parametrize("tag", GLYPHS)
def test_reader_is_high_for_the_right_text_and_low_for_another(tag):
    captions, images = drawn(tag, 60)
    right = reader(images=images, text=[c.text for c in captions])
    texts = [t.upper() for t in (DIGITS if tag == "digit" else WORDS)]
    wrong = reader(images=images, text=[texts[(texts.index(c.text) + 3) % len(texts)] for c in captions])
    assert np.mean(right) > 0.92
    assert np.mean(wrong) < 0.3


def test_every_text_is_read_as_itself():
    rng = np.random.default_rng(5)
    for text in (*DIGITS, *WORDS):
        image = draw_picture(Caption("", "word", text=text.upper(), colour="white"), rng)
        scores = {t: reader(images=[image], text=[t])[0] for t in (*DIGITS, *WORDS)}
        assert max(scores, key=scores.get) == text


def test_composition_gives_graded_credit():
    rng = np.random.default_rng(0)
    two = Caption("", "counting", (Group((2, 2), "red", "circle"),)).include
    circle = [Item("circle", "red", x, y, 8) for x, y in ((15, 15), (45, 15), (15, 45))]
    one, both, three = (draw_items(circle[:n], rng) for n in (1, 2, 3))
    half_wrong = draw_items([circle[0], Item("square", "red", 45, 15, 8)], rng)
    scores = composition(images=[one, both, three, half_wrong], include=[two] * 4)
    assert scores[1] > 0.95
    assert scores[0] == pytest.approx(0.5, abs=0.05)
    assert scores[2] == pytest.approx(2 / 3, abs=0.05)
    assert scores[3] == pytest.approx(0.5, abs=0.1)


def test_the_relation_counts_half_and_turns_gradually():
    groups = (Group((1, 1), "red", "circle"), Group((1, 1), "blue", "square"))
    include = Caption("", "position", groups, "above").include
    scores = []
    for degrees in (0, 75, 90, 180):
        angle = np.deg2rad(degrees)
        red = Item("circle", "red", 32 - 18 * np.sin(angle), 32 - 18 * np.cos(angle), 8)
        blue = Item("square", "blue", 32 + 18 * np.sin(angle), 32 + 18 * np.cos(angle), 8)
        scores += composition(images=[draw_items([red, blue], np.random.default_rng(0))], include=[include])
    assert scores[0] > 0.95 and scores[3] == pytest.approx(0.5, abs=0.03)
    assert scores[0] > scores[1] > scores[2] > scores[3]


def test_reader_penalises_missing_and_extra_glyphs():
    rng = np.random.default_rng(0)
    image = draw_picture(Caption("", "word", text="SUN", colour="white"), rng)
    assert reader(images=[image], text=["sun"])[0] > 0.9
    seven = draw_picture(Caption("", "digit", text="7", colour="red"), rng)
    assert reader(images=[seven], text=["7"])[0] > 0.9
    assert reader(images=[image], text=["S"])[0] < 0.4
    assert reader(images=[seven], text=["77"])[0] == pytest.approx(0.5, abs=0.1)


def test_reader_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="ü"):
        reader(images=[canvas()[0]], text=["ü"])


@pytest.mark.parametrize("name", trivial_pictures())
def test_no_trivial_picture_maximises_a_reward(name):
    image = trivial_pictures()[name]
    for caption in (all_captions("colors")[0], all_captions("digit")[0]):
        for value in apply_all([image], [caption]).values():
            assert value[0] is None or value[0] < 0.3


def test_generals_are_mid_range_on_drawn_pictures():
    images = [image for tag in (*COMPOSITIONAL, *GLYPHS, "free") for image in drawn(tag, 15)[1]]
    for general in (coverage, centring, calm):
        values = np.array(general(images=images))
        assert 0.3 < values.mean() < 0.95
        assert 0.05 < values.std() < 0.3


def disc(radius, x=32, y=32):
    image, draw = canvas()
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PALETTE["green"])
    return image


def test_generals_pull_as_they_say():
    small, medium, large, aside = disc(8), disc(12), disc(16), disc(12, x=16)
    a, b, c, d = coverage(images=[small, medium, large, disc(24)])
    assert a < b < c > d  # more is better, up to a point
    assert centring(images=[medium])[0] > 0.95 > centring(images=[aside])[0] + 0.3
    assert abs(calm(images=[small])[0] - calm(images=[large])[0]) < 0.05  # it is about outlines, not about size
    speckled = medium.copy()
    draw = ImageDraw.Draw(speckled)
    for x, y in ((8, 8), (54, 10), (10, 52)):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=tuple(g + 34 for g in GROUND))
    assert calm(images=[medium])[0] > calm(images=[speckled])[0] + 0.02
    assert coverage(images=[medium]) == coverage(images=[speckled])


def test_all_rewards_can_be_high_at_once():
    image = draw_items([Item("circle", "red", 32, 32, 16)], np.random.default_rng(0))
    caption = next(c for c in all_captions("colors") if c.prompt == "a red circle")
    values = apply_all([image], [caption])
    assert min(v[0] for v in values.values() if v[0] is not None) > 0.6
