# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Evaluating a pipeline of videos: files, scores, diversity, pages, comparisons and cards."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluation_helpers import bright, prompt_set, random_adapter, small_evaluation
from PIL import Image
from tiny_videos import tiny_wan

from trl_marble.evaluation import compare_evaluations, evaluate_pipeline, thumbnails
from trl_marble.hub import card_from_evaluations
from trl_marble.media import open_sample
from trl_marble.pipelines import FlowPipeline
from trl_marble.rewards import FrameReward, RewardError


SIZE = {"height": 16, "width": 32, "num_frames": 9, "num_generations": 2}


def motion(videos, **kwargs):
    """Mean absolute difference between a frame and the next, in [0, 1]."""
    return [np.abs(np.diff([np.asarray(f, dtype=float) / 255 for f in video], axis=0)).mean() for video in videos]


def evaluate(folder, **overrides):
    rewards = [motion, FrameReward(bright, num_frames=3)]
    return evaluate_pipeline(tiny_wan(), rewards, prompt_set(), small_evaluation(folder, **SIZE | overrides))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    random_adapter(tiny_wan(), folder, attention="attn1")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("evaluations") / "base")


@pytest.fixture(scope="module")
def tuned(base, adapter):
    return evaluate(base.folder.parent / "tuned", adapter=str(adapter))


def videos_of(results):
    return [open_sample(results.folder / file) for file in results.table["image"]]


def test_the_files_are_the_videos_that_were_scored(base):
    assert base.table["image"].tolist()[:2] == ["images/00000_00.webp", "images/00000_01.webp"]
    videos = videos_of(base)
    assert [len(video) for video in videos] == [9] * 8
    assert base.table["motion"].tolist() == pytest.approx(motion(videos))
    middles = [np.mean(bright([video[0], video[4], video[8]])) for video in videos]
    assert base.table["bright"].tolist() == pytest.approx(middles)
    assert base.settings["num_frames"] == 9


def test_the_files_are_bit_by_bit_what_the_pipeline_made(base):
    flow = FlowPipeline(tiny_wan(), 16, 32, 1.0, 16, num_frames=9)
    seed = int(base.table["seed"][3])
    conditioning = flow.encode([base.table["prompt"][3]])
    (made,) = flow.rollout(conditioning, [seed], 2).images
    read = videos_of(base)[3]
    difference = np.abs(np.subtract([np.asarray(f, dtype=int) for f in made], [np.asarray(f) for f in read]))
    assert difference.max() <= 1  # by the rounding of another batch size


def test_diversity_is_that_of_several_frames(base):
    features = thumbnails(videos_of(base))
    assert features.shape == (8, 4 * 768)
    pairs = features.view(4, 2, -1).double()
    assert base.prompt_diversity == pytest.approx((pairs[:, 0] - pairs[:, 1]).square().mean(dim=1).sqrt().tolist())


def test_videos_that_differ_only_in_their_movement_are_diverse():
    there = [Image.new("RGB", (4, 4), (20 * k, 0, 0)) for k in (0, 1, 2, 3, 4)]
    features = thumbnails([there, there[::-1]])
    assert not features[0].equal(features[1])


def test_it_continues_where_it_was_interrupted(base, tmp_path):
    interrupted = {"left": 1}

    def breaks(videos, **kwargs):
        if interrupted["left"] == 0:
            interrupted["left"] = -1
            raise KeyboardInterrupt
        interrupted["left"] -= 1
        return motion(videos)

    args = small_evaluation(
        tmp_path,
        **SIZE,
    )
    with pytest.raises(RewardError, match="KeyboardInterrupt"):
        evaluate_pipeline(tiny_wan(), breaks, prompt_set(), args)
    interrupted["left"] = 5
    results = evaluate_pipeline(tiny_wan(), breaks, prompt_set(), args)
    assert interrupted["left"] == 4  # one batch of two was left
    assert results.table["breaks"].tolist() == pytest.approx(base.table["motion"].tolist(), abs=1e-3)


def test_a_changed_video_is_noticed(base, tmp_path):
    results = evaluate(tmp_path)
    first = results.folder / results.table["image"][0]
    first.write_bytes((results.folder / results.table["image"][1]).read_bytes())
    evaluate(tmp_path)  # samples that batch again
    assert open_sample(first)[4].tobytes() == videos_of(base)[0][4].tobytes()


class _Images(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.sources = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.sources.append(dict(attributes))


def test_the_page_plays_the_videos(base):
    images = _Images((base.folder / "contact_sheet.html").read_text()).sources
    assert [image["src"] for image in images] == base.table["image"].tolist()
    assert {(image["width"], image["height"]) for image in images} == {("32", "16")}
    for image in images:
        with Image.open(base.folder / image["src"]) as opened:
            assert opened.n_frames == 9 and opened.info["loop"] == 0


def test_comparisons_show_both(base, tuned, tmp_path):
    comparison = compare_evaluations({"base": base, "ours": tuned}, tmp_path)
    change = np.mean(np.subtract(motion(videos_of(tuned)), motion(videos_of(base))))
    assert comparison.changes["ours"]["motion"][0] == pytest.approx(change, abs=1e-6)  # rewards are float32
    assert abs(change) > 1e-5
    images = _Images((tmp_path / "contact_sheet.html").read_text()).sources
    assert len(images) == 16 and all(image["src"].endswith(".webp") for image in images)


def test_another_number_of_frames_is_another_evaluation(base, tmp_path):
    other = evaluate(tmp_path, num_frames=5)
    assert {len(video) for video in videos_of(other)} == {5}
    with pytest.raises(ValueError, match="num_frames"):
        compare_evaluations({"base": base, "other": other})
    with pytest.raises(ValueError, match="`num_frames` was 5 and is 9"):
        evaluate(tmp_path)


def test_the_card_shows_videos_before_and_after(base, tuned, adapter):
    card = card_from_evaluations(adapter, {"before": base, "after": tuned}, base_model="me/wan")
    assert "(images/sample_0.webp)" in card.content and "(before_after.png)" in card.content
    shown, kept = open_sample(adapter / "images" / "sample_0.webp"), videos_of(tuned)[0]
    assert len(shown) == 9 and np.abs(np.subtract(shown[4], kept[4], dtype=float)).mean() < 12
    with Image.open(adapter / "before_after.png") as still, Image.open(adapter / "before_after.webp") as playing:
        assert playing.n_frames == 9 and still.width > playing.width  # frames side by side are wider


def test_rewards_of_images_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=re.escape("`FrameReward(bright)`, which averages its scores")):
        evaluate_pipeline(tiny_wan(), [motion, bright], prompt_set(), small_evaluation(tmp_path / "new", **SIZE))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_a_number_of_frames_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"`num_frames` is {value}; it must be an integer of at least 1"):
        small_evaluation(tmp_path, num_frames=value)
