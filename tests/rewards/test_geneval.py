# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""GenEval: its rules on objects placed by hand, and the complete reward on tiny random models loaded from disk."""

import functools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import _clip_tokenizer
from tiny_scorers import tiny_detector
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerImageProcessorPil,
)

from trl_marble.rewards import ModelReward
from trl_marble.rewards.geneval import GenEval, read_detections
from trl_marble.rewards.geneval_scoring import (
    CLASSES,
    COLORS,
    TAGS,
    Clause,
    Detection,
    overlap,
    parse_clauses,
    parse_request,
    partial_score,
    relations,
    select_objects,
    strict_score,
)
from trl_marble.shapeworld.prompts import Caption, Group


MASK = np.ones((1, 1), dtype=bool)


def thing(x=0, y=0, width=10, height=10, score=0.95, color=None):
    """An object whose box starts at (x, y)."""
    found = Detection((x, y, x + width, y + height), score, MASK)
    seen_colors[found] = color
    return found


seen_colors = {}


def colors_of(name, objects):
    return [seen_colors[each] for each in objects]


def no_colors(name, objects):
    raise AssertionError("nobody asked for colors")


def scores(include, found, exclude=(), colors=colors_of):
    """The strict and the partial score."""
    wanted = parse_clauses(include, "a prompt")
    unwanted = parse_clauses(list(exclude), "a prompt", "exclude")
    return strict_score(wanted, unwanted, found, colors), partial_score(wanted, found, colors)


class TestRules:
    def test_single_object(self):
        include = [{"class": "dog", "count": 1}]
        assert scores(include, {"dog": [thing()]}, colors=no_colors) == (1, 1)
        assert scores(include, {"dog": [thing()], "cat": [thing()]}) == (1, 1)
        assert scores(include, {"cat": [thing()]}) == (0, 0)
        assert scores(include, {}) == (0, 0)
        # More than one is still a photo of a dog to GenEval, and the wrong number to the partial credit.
        assert scores(include, {"dog": [thing(), thing()]}) == (1, 0)

    def test_two_object(self):
        include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]
        assert scores(include, {"dog": [thing()], "cat": [thing()]}) == (1, 1)
        assert scores(include, {"dog": [thing()]}) == (0, 0.5)
        assert scores(include, {"dog": [thing()], "cat": [thing()] * 2}) == (1, 0.5)

    @pytest.mark.parametrize(
        ("number", "strict", "partial"),
        [
            (0, 0, 0),
            (1, 0, 1 / 3),
            (2, 0, 2 / 3),
            (3, 1, 1),
            (4, 0, 2 / 3),
            (6, 0, 0),
            (7, 0, -1 / 3),
            (16, 0, -10 / 3),
        ],
    )
    def test_counting(self, number, strict, partial):
        include, exclude = [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}]
        assert scores(include, {"dog": [thing()] * number}, exclude) == (strict, pytest.approx(partial))

    def test_too_many_are_wrong_only_if_they_are_excluded(self):
        include = [{"class": "dog", "count": 2}]
        many = {"dog": [thing()] * 5}
        assert scores(include, many) == (1, -0.5)
        assert scores(include, many, [{"class": "dog", "count": 6}]) == (1, -0.5)
        assert scores(include, many, [{"class": "dog", "count": 5}]) == (0, -0.5)

    def test_exclude_forbids_other_classes_too(self):
        include, found = [{"class": "dog", "count": 1}], {"dog": [thing()], "cat": [thing()]}
        assert scores(include, found, [{"class": "cat", "count": 1}]) == (0, 1)
        assert scores(include, found, [{"class": "cat", "count": 2}, {"class": "bird", "count": 1}]) == (1, 1)

    def test_colors(self):
        include = [{"class": "car", "count": 1, "color": "red"}]
        assert scores(include, {"car": [thing(color="red")]}) == (1, 1)
        assert scores(include, {"car": [thing(color="blue")]}) == (0, 0.5)  # 1 for the car, 0 for its color
        assert scores(include, {}, colors=no_colors) == (0, 0)
        # Only the most confident one is looked at; to the partial credit the number is wrong: 0, and 0 for the color.
        assert scores(include, {"car": [thing(color="red"), thing(color="blue")]}) == (1, 0)
        assert scores(include, {"car": [thing(color="blue"), thing(color="red")]}) == (0, 0)

    def test_colors_of_several(self):
        include = [{"class": "car", "count": 3, "color": "red"}]
        red, blue = thing(color="red"), thing(color="blue")
        assert scores(include, {"car": [red] * 3}) == (1, 1)
        assert scores(include, {"car": [red, red, blue]}) == (0, pytest.approx((1 + 2 / 3) / 2))
        assert scores(include, {"car": [red, red]}) == (0, pytest.approx((2 / 3 + 0) / 2))

    def test_color_attr(self):
        include = [{"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]
        assert scores(include, {"car": [thing(color="red")], "dog": [thing(color="blue")]}) == (1, 1)
        swapped = {"car": [thing(color="blue")], "dog": [thing(color="red")]}
        assert scores(include, swapped) == (0, 0.5)  # 1, 0, 1, 0
        assert scores(include, {"car": [thing(color="red")]}) == (0, 0.5)  # 1, 1, 0, 0

    def test_position(self):
        include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]
        dog, left, right = thing(100), thing(0), thing(200)
        assert scores(include, {"dog": [dog], "cat": [left]}) == (1, 1)
        # 1 for the dog, 1 for the cat, and both 0 and 1 for the wrong position, as the original has it.
        assert scores(include, {"dog": [dog], "cat": [right]}) == (0, 0.75)
        assert scores(include, {"cat": [left]}) == (0, pytest.approx((0 + 1 + 0) / 3))
        assert scores(include, {"dog": [dog]}) == (0, pytest.approx((1 + 0 + 0) / 3))
        assert scores(include, {"dog": [dog, dog], "cat": [left]}) == (1, pytest.approx((0 + 1 + 0) / 3))

    def test_position_to_all_of_several(self):
        include = [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["above", 0]}]
        dogs = [thing(0, 100), thing(50, 100)]
        assert scores(include, {"dog": dogs, "cat": [thing(0, 0), thing(20, 0)]}) == (1, 1)
        assert scores(include, {"dog": dogs, "cat": [thing(0, 0), thing(20, 200)]}) == (0, 0.75)

    def test_position_and_color(self):
        include = [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 1, "color": "blue", "position": ["below", 0]},
        ]
        dog, cat = thing(0, 0, color="red"), thing(0, 100, color="blue")
        assert scores(include, {"dog": [dog], "cat": [cat]}) == (1, 1)
        # With the wrong color a position is not looked at, and gives no term: 1, 1, 1, 0.
        assert scores(include, {"dog": [dog], "cat": [thing(0, 100, color="red")]}) == (0, 0.75)
        # A target of the wrong color is no target: 1, 0, 1, 1, 0.
        assert scores(include, {"dog": [thing(color="pink")], "cat": [cat]}) == (0, pytest.approx(3 / 5))
        # A wrong number costs one 0 for color and position together: 1, 1, 0, 0.
        assert scores(include, {"dog": [dog]}) == (0, 0.5)

    def test_the_target_may_come_later(self):
        first = [{"class": "dog", "count": 1, "position": ["left of", 1]}, {"class": "cat", "count": 1}]
        last = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
        for dog in ([thing(0)], [thing(200)], []):
            found = {"dog": dog, "cat": [thing(100)]}
            assert scores(first, found) == scores(last, found)
        assert scores(first, {"dog": [thing(0)], "cat": [thing(100)]}) == (1, 1)

    def test_positions_in_a_chain(self):
        include = [
            {"class": "dog", "count": 1, "position": ["left of", 1]},
            {"class": "cat", "count": 1, "position": ["left of", 2]},
            {"class": "bird", "count": 1},
        ]
        found = {"dog": [thing(0)], "cat": [thing(100)], "bird": [thing(200)]}
        assert scores(include, found) == (1, 1)
        # The cat is out of place (1, 0, 1), so that it is no target for the dog either (1, 0).
        assert scores(include, found | {"cat": [thing(300)]}) == (0, pytest.approx(4 / 6))


class TestRelations:
    @pytest.mark.parametrize(
        ("a", "expected"),
        [
            (thing(-50, 0), {"left of"}),
            (thing(50, 0), {"right of"}),
            (thing(0, -50), {"above"}),
            (thing(0, 50), {"below"}),
            (thing(50, 50), {"right of", "below"}),
            (thing(-50, -50), {"left of", "above"}),
            (thing(50, 20), {"right of"}),
            (thing(0, 0), set()),
            # A tenth of both widths, 2 pixels, does not count: of 4 pixels 2 are left, which is not more than half.
            (thing(2, 0), set()),
            (thing(4, 0), set()),
            (thing(4.25, 0), {"right of"}),
            # The same offset between larger objects: 0.1 * (10 + 90) = 10 of 45 pixels do not count; of 15, too many.
            (thing(5, -40, 90, 90), {"right of"}),
            (thing(-25, -40, 90, 90), set()),
        ],
    )
    def test_seen_from_a_box_at_the_origin(self, a, expected):
        assert relations(a.box, thing(0, 0).box) == expected

    def test_the_other_way_round_it_is_the_opposite(self):
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        rng = np.random.default_rng(0)
        seen = set()
        for _ in range(200):
            a, b = (thing(*rng.integers(0, 60, 2), *rng.integers(0, 40, 2)).box for _ in range(2))
            seen |= relations(a, b)
            assert relations(b, a) == {opposite[each] for each in relations(a, b)}
        assert seen == set(opposite)

    def test_overlap(self):
        assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
        assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
        assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == 50 / 150  # right and bottom pixels are inside


class TestWhatCounts:
    def test_the_threshold_is_higher_where_objects_are_counted(self):
        objects = [thing(score=score) for score in (0.2, 0.95, 0.3, 0.5, 0.9)]
        for tag in TAGS:
            expected = [0.95] if tag == "counting" else [0.95, 0.9, 0.5]
            assert [each.score for each in select_objects(objects, tag)] == expected

    def test_sixteen_of_a_class_at_most(self):
        objects = [thing(score=0.4 + 0.01 * i) for i in range(20)]
        assert select_objects(objects, "colors") == objects[:3:-1]

    def test_overlapping_objects_count_by_default(self):
        best, near, far = thing(0, 0, score=0.9), thing(3, 0, score=0.8), thing(50, 0, score=0.7)
        assert select_objects([far, near, best], "colors") == [best, near, far]
        assert select_objects([far, near, best], "colors", max_overlap=0.5) == [best, far]
        assert select_objects([far, near, best], "colors", max_overlap=0.7) == [best, near, far]
        half = thing(0, 0, 9, 19, score=0.9), thing(0, 0, 9, 9, score=0.8)
        assert select_objects(half, "colors", max_overlap=0.5) == [half[0]]

    def test_nothing(self):
        assert select_objects([], "colors") == []


class TestReading:
    def test_a_list_and_json_are_the_same(self):
        include = [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 2, "position": ["above", 0]},
        ]
        expected = [Clause("dog", 1, "red"), Clause("cat", 2, None, ("above", 0))]
        assert parse_clauses(include, "p") == parse_clauses(json.dumps(include), "p") == expected
        assert parse_clauses(tuple(include), "p") == expected

    def test_shapeworld_writes_what_is_read(self):
        dog, cat = Group((1, 1), "red", "dog"), Group((1, 1), "blue", "cat")
        caption = Caption("a red dog left of a blue cat", "position", (dog, cat), "left of")
        assert parse_clauses(caption.include, caption.prompt) == [
            Clause("dog", 1, "red", ("left of", 1)),
            Clause("cat", 1, "blue"),
        ]

    def test_fields_without_a_value_are_not_there(self):
        """As tables have them, where every row has the same fields."""
        row = [{"class": "dog", "count": 1, "color": None, "position": None}]
        assert parse_clauses(row, "p") == [Clause("dog", 1)]

    @pytest.mark.parametrize("include", [None, "", " ", [], "[]", "null"])
    def test_nothing_is_asked_for(self, include):
        assert parse_clauses(include, "p") == []
        assert parse_request("p", include, tag="what is this", exclude="not json") is None

    @pytest.mark.parametrize(
        ("include", "message"),
        [
            ('[{"class": "dog"', "is not JSON"),
            ("a dog", "'a dog' is not JSON"),
            ({"class": "dog", "count": 1}, "is not a list of objects"),
            ('"dog"', "is not a list of objects"),
            ("{}", "is not a list of objects"),
            (["dog"], "is not a list of objects"),
            (7, "7 is not a list of objects"),
            ([{"class": "unicorn", "count": 1}], "unknown class 'unicorn'; use one of the 80 COCO classes: person,"),
            ([{"count": 1}], "unknown class None"),
            ([{"class": "dog"}], "the count of 'dog' is None; use a whole number of at least 1"),
            ([{"class": "dog", "count": 0}], "the count of 'dog' is 0"),
            ([{"class": "dog", "count": "2"}], "the count of 'dog' is '2'"),
            ([{"class": "dog", "count": True}], "the count of 'dog' is True"),
            ([{"class": "dog", "count": 1, "color": "mauve"}], "unknown color 'mauve'; use one of red, orange"),
            ([{"class": "dog", "count": 1, "colour": "red"}], "unknown field 'colour'; known are class, color"),
            ([{"class": "dog", "count": 1, "position": "above"}], "the position 'above' is not a pair"),
            ([{"class": "dog", "count": 1, "position": ["above"]}], "the position ['above'] is not a pair"),
            (
                [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["on top of", 0]}],
                "unknown relation 'on top of'; use one of left of, right of, above, below",
            ),
            ([{"class": "dog", "count": 1, "position": ["above", 1]}], "is relative to 1; use the index of another"),
            ([{"class": "dog", "count": 1, "position": ["above", 0]}], "is relative to 0; use the index of another"),
            ([{"class": "dog", "count": 1, "position": ["above", -1]}], "is relative to -1"),
            ([{"class": "dog", "count": 1, "position": ["above", "0"]}], "is relative to '0'"),
            (
                [
                    {"class": "dog", "count": 1, "position": ["above", 1]},
                    {"class": "cat", "count": 1, "position": ["above", 0]},
                ],
                "relative to each other in a circle",
            ),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, include, message):
        start = "GenEval cannot use `include` of the prompt 'a “dög”': "
        with pytest.raises(ValueError, match=f"^{re.escape(start)}.*{re.escape(message)}"):
            parse_request("a “dög”", include, "colors")

    def test_exclude_knows_no_colors(self):
        include = [{"class": "dog", "count": 1}]
        with pytest.raises(
            ValueError, match="`exclude` of the prompt 'p': unknown field 'color'; known are class, count"
        ):
            parse_request("p", include, "colors", [{"class": "dog", "count": 2, "color": "red"}])

    @pytest.mark.parametrize("tag", [None, "count", ""])
    def test_unknown_tags_are_refused(self, tag):
        with pytest.raises(
            ValueError, match=f"`tag` of the prompt 'p': unknown tag {tag!r}; use one of single_object"
        ):
            parse_request("p", [{"class": "dog", "count": 1}], tag)

    def test_the_names(self):
        assert len(set(CLASSES)) == 80
        assert [CLASSES.index(name) for name in ("person", "traffic light", "computer mouse", "toothbrush")] == [
            0,
            9,
            64,
            79,
        ]


def logits(*queries, size):
    """Outputs of a detector: `(probabilities by class, columns, rows, mask logit)` a query; outside it is -20."""
    classes = torch.full((len(queries), 81), 1e-9)
    masks = torch.full((len(queries), *size), -20.0)
    for i, (probabilities, columns, rows, logit) in enumerate(queries):
        for name, probability in probabilities.items():
            classes[i, CLASSES.index(name)] = probability
        classes[i, 80] = 1 - sum(probabilities.values())
        masks[i, rows, columns] = logit
    return classes.log(), masks


class TestDetections:
    def test_boxes_masks_and_confidence(self):
        size = (6, 8)
        outputs = logits(
            ({"dog": 0.8}, slice(2, 5), slice(1, 3), 1.5),
            ({"dog": 0.5, "cat": 0.4}, slice(0, 8), slice(0, 1), 9.0),
            ({"bird": 0.25}, slice(0, 8), slice(0, 6), 9.0),  # not likely enough
            ({"cow": 0.9}, slice(0, 0), slice(0, 0), 9.0),  # nowhere
            size=size,
        )
        found = read_detections(*outputs, size, size)
        assert found.keys() == {"dog", "cat"}
        surer, other = found["dog"]
        assert surer.box == (2, 1, 5, 3)
        assert surer.score == pytest.approx(0.8 / (1 + np.exp(-1.5)), abs=1e-5)
        assert surer.mask.dtype == bool and surer.mask[1:3, 2:5].all() and surer.mask.sum() == 6
        assert other.box == found["cat"][0].box == (0, 0, 8, 1)
        assert found["cat"][0].score == pytest.approx(0.4 / (1 + np.exp(-9)), abs=1e-5)

    def test_masks_are_enlarged_to_the_image_before_they_are_cut(self):
        outputs = logits(({"dog": 1.0}, slice(0, 1), slice(0, 2), 20.0), size=(2, 2))
        (found,) = read_detections(*outputs, (8, 8), (16, 24))["dog"]
        assert found.mask.shape == (16, 24)
        assert found.box == (0, 0, 12, 16)  # +20 and -20 meet in the middle

    def test_at_most_a_hundred(self):
        outputs = logits(*[({"dog": 0.6}, slice(0, 2), slice(0, 2), 9.0)] * 120, size=(2, 2))
        assert len(read_detections(*outputs, (2, 2), (2, 2))["dog"]) == 100


SIDE = 32  # of the tiny CLIP's images


@functools.cache
def tiny_clip():
    """A random CLIP whose features differ from input to input."""
    torch.manual_seed(3)
    alike = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    words = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPModel(
        CLIPConfig(
            text_config=alike | words, vision_config=alike | {"image_size": SIDE, "patch_size": 8}, projection_dim=16
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a detector and a CLIP as `from_pretrained` wants them."""
    detector, clip = (tmp_path_factory.mktemp(name) for name in ("detector", "clip"))
    tiny_detector().save_pretrained(detector)
    Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(detector)
    tiny_clip().save_pretrained(clip)
    _clip_tokenizer().save_pretrained(clip)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        clip
    )
    return {"detector": str(detector), "clip": str(clip)}


def pictures(number=6):
    """Random patches of color; sizes differ, and some are alike."""
    rng = np.random.default_rng(0)
    sizes = [(50, 40), (40, 50), (50, 40), (33, 71), (64, 64)]
    noise = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in range(number)]
    return [image.resize(sizes[i % 5], Image.Resampling.NEAREST) for i, image in enumerate(noise)]


@torch.no_grad()
def detected(image):
    """Confidences and masks by class, from the model in memory, one query and class after the other."""
    pixels = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})(image, return_tensors="pt")
    outputs = tiny_detector()(pixel_values=pixels.pixel_values)
    found = {}
    for classes, mask in zip(outputs.class_queries_logits[0], outputs.masks_queries_logits[0], strict=True):
        for size in (pixels.pixel_values.shape[-2:], image.size[::-1]):
            mask = torch.nn.functional.interpolate(mask[None, None], size=size, mode="bilinear")[0, 0]
        weights, inside = 1 / (1 + np.exp(-mask.double().numpy())), mask.numpy() > 0
        odds = np.exp(classes.double().numpy())
        for name, probability in zip(CLASSES, odds / odds.sum(), strict=False):
            if inside.any() and probability * weights[inside].mean() > 0.3:
                found.setdefault(name, []).append((probability * weights[inside].mean(), inside))
    return {name: sorted(each, key=lambda pair: -pair[0]) for name, each in found.items()}


@torch.no_grad()
def named_color(image, name, inside):
    """The color of an object: its pixels before grey, cut out, resized, and compared with thirty sentences."""
    alone = np.where(inside[..., None], np.asarray(image), 0x99).astype(np.uint8)
    rows, columns = np.nonzero(inside)
    alone = alone[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = alone.shape[:2]
    size = [int(SIDE * length / min(width, height)) for length in (width, height)]
    large = Image.fromarray(alone).resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - SIDE) / 2 for length in size)
    pixels = np.asarray(large)[round(top) : round(top) + SIDE, round(left) : round(left) + SIDE] / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    seen = tiny_clip().visual_projection(tiny_clip().vision_model(pixel_values=pixels).pooler_output)[0]
    likeness = {color: float(seen @ text) for color, text in color_texts(name).items()}
    return max(likeness, key=likeness.get)


@functools.cache
@torch.no_grad()
def color_texts(name):
    """The directions of the colors of a class, from one sentence after the other."""
    clip, tokenizer, directions = tiny_clip(), _clip_tokenizer(), {}
    for color in COLORS:
        texts = f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object"
        tokens = [tokenizer(text, return_tensors="pt") for text in texts]
        features = [clip.text_projection(clip.text_model(**each).pooler_output)[0] for each in tokens]
        mean = sum(feature / feature.norm() for feature in features) / 3
        directions[color] = mean / mean.norm()
    return directions


class TestModels:
    def test_objects_are_those_that_the_detector_shows(self, folders):
        reward = GenEval(**folders)
        images = pictures()
        assert reward.model is not None
        with torch.inference_mode():
            everything = reward.detect(images)
        for image, found in zip(images, everything, strict=True):
            expected = detected(image)
            assert {name for name in found if select_objects(found[name], "colors")} == expected.keys()
            for name, objects in expected.items():
                mine = select_objects(found[name], "colors")
                assert [each.score for each in mine] == pytest.approx([score for score, _ in objects], abs=1e-5)
                for each, (_, inside) in zip(mine, objects, strict=True):
                    assert np.array_equal(each.mask, inside)
                    rows, columns = np.nonzero(inside)
                    assert each.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert len({name for found in everything for name in found}) > 5

    def test_colors_are_those_that_clip_names(self, folders):
        reward = GenEval(**folders)
        assert reward.model is not None
        seen = set()
        for image in pictures(2):
            for name, objects in detected(image).items():
                expected = [named_color(image, name, inside) for _, inside in objects]
                rows_columns = [np.nonzero(inside) for _, inside in objects]
                things = [
                    Detection((c.min(), r.min(), c.max() + 1, r.max() + 1), score, inside)
                    for (score, inside), (r, c) in zip(objects, rows_columns, strict=True)
                ]
                with torch.inference_mode():
                    assert reward.name_colors(image, name, things) == expected
                seen |= set(expected)
        assert len(seen) > 1  # or else this would say little

    def test_scores(self, folders):
        """What is asked for is made from what is there, so that the right scores are known."""
        image = pictures()[0]
        there = detected(image)
        name, objects = max(there.items(), key=lambda item: len(item[1]))
        number = len(objects)
        single = next(other for other, each in there.items() if len(each) == 1)
        color = named_color(image, single, there[single][0][1])
        wrong = next(other for other in COLORS if other != color)
        assert number > 1
        asked = {  # what is asked for, and the strict and the partial score
            "right": ([{"class": name, "count": number}], 1, 1),
            "too many": ([{"class": name, "count": number + 1}], 0, number / (number + 1)),
            "too few": ([{"class": name, "count": 1}], 1, 2 - number),
            "color": ([{"class": single, "count": 1, "color": color}], 1, 1),
            "wrong color": ([{"class": single, "count": 1, "color": wrong}], 0, 0.5),
            "missing": ([{"class": "toaster", "count": 1}, {"class": single, "count": 1}], 0, 0.5),
        }
        assert "toaster" not in there
        prompts = list(asked)
        columns = {"include": [json.dumps(include) for include, *_ in asked.values()], "tag": ["colors"] * len(asked)}
        images = [image] * len(asked)
        strict = GenEval(**folders, strict=True)(images=images, prompts=prompts, trainer_state=None, **columns)
        partial = GenEval(**folders)(images=images, prompts=prompts, trainer_state=None, **columns)
        assert strict == [score for _, score, _ in asked.values()]
        assert partial == pytest.approx([score for *_, score in asked.values()])

    def test_exclude_and_tag_are_read(self, folders):
        image = pictures()[0]
        name, objects = max(detected(image).items(), key=lambda item: len(item[1]))
        include = [{"class": name, "count": 1}]
        assert all(score < 0.9 for score, _ in objects)  # so that none of them may be counted
        values = GenEval(**folders, strict=True)(
            images=[image] * 4,
            prompts=["p"] * 4,
            include=[include] * 4,
            exclude=[None, json.dumps([{"class": name, "count": 2}]), [{"class": name, "count": 9}], None],
            tag=["colors", "colors", "colors", "counting"],
        )
        assert values == [1, 0, 1, 0]

    def test_overlapping_objects_can_be_left_out(self, folders):
        image = pictures()[0]
        name, objects = max(detected(image).items(), key=lambda item: len(item[1]))
        columns = {"include": [[{"class": name, "count": len(objects)}]], "tag": ["colors"]}
        (all_count,) = GenEval(**folders)(images=[image], prompts=["p"], **columns)
        (one_counts,) = GenEval(**folders, max_overlap=0.01)(images=[image], prompts=["p"], **columns)
        assert (all_count, one_counts) == (1, pytest.approx(1 / len(objects)))

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_the_batch_does_not_change_a_score(self, folders, batch_size):
        images = pictures(7)
        include = []
        for image in images:
            name, objects = max(detected(image).items(), key=lambda item: len(item[1]))
            include.append([{"class": name, "count": len(objects), "color": "red"}, {"class": "dog", "count": 2}])
        columns = {"include": include, "tag": ["colors"] * 7}
        together = GenEval(**folders)(images=images, prompts=["p"] * 7, **columns)
        reversed_columns = {name: column[::-1] for name, column in columns.items()}
        alone = GenEval(**folders, batch_size=batch_size)(images=images[::-1], prompts=["p"] * 7, **reversed_columns)
        assert alone[::-1] == together
        assert all(value > 0 for value in together)

    def test_images_of_any_mode_and_size(self, folders):
        images = [
            Image.new("RGB", (1, 1), "red"),
            Image.new("L", (3, 1), 80),
            Image.new("RGBA", (20, 30), (255, 0, 0, 0)),
            Image.new("RGB", (20, 30), "white"),
        ]
        asked = [{"class": name, "count": 1, "color": "white"} for name in CLASSES]  # all there are, whatever is seen
        values = GenEval(**folders)(images=images, prompts=["", "", "p", "p"], include=[asked] * 4, tag=["colors"] * 4)
        assert all(-14 <= value <= 1 for value in values)
        assert values[2] == values[3]  # what is transparent is white

    def test_bfloat16_comes_close(self, folders):
        reward = GenEval(**folders).to("cpu", torch.bfloat16)
        images = pictures()
        asked = [[{"class": name, "count": len(each)} for name, each in detected(image).items()] for image in images]
        values = reward(images=images, prompts=["p"] * 6, include=asked, tag=["two_object"] * 6)
        assert np.mean(values) > 0.8  # 1 without rounding
        assert {parameter.dtype for parameter in reward.model.parameters()} == {torch.bfloat16}
        with torch.inference_mode():
            assert set(reward.name_colors(images[0], "dog", [thing_like(images[0])])) <= set(COLORS)

    def test_a_change_of_dtype_changes_the_texts_too(self, folders):
        reward = GenEval(**folders)
        image = pictures()[0]
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            reward.to("cpu", dtype)
            reward.model.to(dtype)
            with torch.inference_mode():
                reward.name_colors(image, "dog", [thing_like(image)])
        exact, rounded = reward._color_features("dog"), reward._known_color_features["dog", torch.bfloat16]
        assert 0 < (exact - rounded).abs().max() < 0.1

    def test_it_applies_where_something_is_asked_for(self):
        reward = GenEval(detector="nowhere", clip="nowhere")
        assert isinstance(reward, ModelReward)
        include = [None, "", [], "[]", '[{"class": "dog", "count": 1}]']
        tag = [None, "free", None, "free", "colors"]
        assert reward.applies(["p"] * 5, include=include, tag=tag) == [False] * 4 + [True]
        # Nothing is loaded where nothing is asked for.
        assert reward(images=pictures(4), prompts=["p"] * 4, include=include[:4], tag=tag[:4]) == [None] * 4

    def test_bad_rows_are_refused_before_anything_is_loaded(self):
        reward = GenEval(detector="nowhere", clip="nowhere")
        rows = {"include": [None, '[{"class": "dragon", "count": 1}]'], "tag": [None, "colors"]}
        with pytest.raises(ValueError, match="prompt 'a dragon': unknown class 'dragon'"):
            reward(images=pictures(2), prompts=["free", "a dragon"], **rows)
        with pytest.raises(ValueError, match="needs the columns `include` and `tag`; the dataset has include"):
            reward(images=pictures(1), prompts=["p"], include=[None])
        with pytest.raises(ValueError, match="the dataset has no columns"):
            reward(images=pictures(1), prompts=["p"])

    def test_a_detector_of_other_classes_is_refused(self, folders, tmp_path):
        tiny_detector(num_labels=133).save_pretrained(tmp_path)
        Mask2FormerImageProcessorPil().save_pretrained(tmp_path)
        reward = GenEval(detector=str(tmp_path), clip=folders["clip"])
        with pytest.raises(ValueError, match="has 133 classes; use one for COCO instances, which has 80"):
            reward.model  # noqa: B018

    @pytest.mark.parametrize("max_overlap", [0, -1, 1.5])
    def test_impossible_overlaps_are_refused(self, max_overlap):
        with pytest.raises(ValueError, match=f"`max_overlap` must be in .0, 1., got {max_overlap}"):
            GenEval(max_overlap=max_overlap)

    def test_the_range_says_which_score_it_is(self):
        assert GenEval(strict=True).value_range == "0 or 1"
        assert GenEval().value_range.startswith("at most 1, negative")


def thing_like(image):
    """An object that fills an image."""
    return Detection((0, 0, *image.size), 0.9, np.ones(image.size[::-1], dtype=bool))
