# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Frames, tensors and files of images and videos."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trl_marble.media import (
    evenly_spaced_frames,
    film_strip,
    open_sample,
    sample_suffix,
    save_sample,
    to_tensor,
)


def noise(num_frames: int, width: int = 9, height: int = 7, seed: int = 0) -> list[Image.Image]:
    """Frames of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.mark.parametrize(
    ("length", "num_frames", "places"),
    [(9, 3, [0, 4, 8]), (9, 1, [4]), (4, 4, [0, 1, 2, 3]), (3, 8, [0, 1, 2]), (81, 4, [0, 27, 53, 80]), (1, 1, [0])],
)
def test_frames_are_spread_from_the_first_to_the_last(length, num_frames, places):
    video = noise(length, 2, 2)
    assert [video.index(frame) for frame in evenly_spaced_frames(video, num_frames)] == places


def test_a_strip_shows_its_frames_side_by_side_with_a_gap():
    video = [Image.new("RGB", (8, 6), (60 * k, 0, 0)) for k in range(5)]
    strip = np.asarray(film_strip(video, 3))
    assert strip.shape == (6, 3 * 8 + 2, 3)
    assert [strip[0, x, 0].item() for x in (0, 8, 9, 17, 18)] == [0, 255, 120, 255, 240]
    assert film_strip(video[0]) is video[0]


def test_videos_are_tensors_of_frames():
    videos = [noise(3), noise(3, seed=1)]
    tensor = to_tensor(videos)
    assert tensor.shape == (2, 3, 3, 7, 9) and tensor.dtype == torch.float32
    expected = np.asarray(videos[1][2]).transpose(2, 0, 1) / 255
    assert np.allclose(tensor[1, 2], expected) and torch.equal(tensor[1], to_tensor(videos[1]))


@settings(max_examples=30, deadline=None)
@given(
    pattern=st.lists(st.integers(0, 2), min_size=2, max_size=12).filter(lambda frames: len(set(frames)) > 1),
    width=st.integers(1, 20),
    height=st.integers(1, 20),
)
def test_a_file_gives_a_video_back_frame_by_frame_pixel_by_pixel(tmp_path_factory, pattern, width, height):
    """Also one that stands still for a time, which WebP writes as one longer frame."""
    pictures = noise(3, width, height)
    pictures = [*pictures[:2], pictures[1].copy()]
    pictures[2].putpixel((width - 1, height - 1), (1, 2, 3))  # differs in one pixel only
    video = [pictures[place] for place in pattern]
    file = tmp_path_factory.mktemp("video") / f"video{sample_suffix(video)}"
    save_sample(video, file)
    read = open_sample(file)
    if any(np.asarray(a).tobytes() != np.asarray(video[0]).tobytes() for a in video):
        assert [frame.mode for frame in read] == ["RGB"] * len(video)
        assert [frame.tobytes() for frame in read] == [frame.tobytes() for frame in video]


@pytest.mark.parametrize("num_frames", [1, 4])
def test_of_a_video_that_never_moves_one_frame_is_kept(tmp_path, num_frames):
    video = noise(1) * num_frames
    save_sample(video, tmp_path / "still.webp")
    assert [frame.tobytes() for frame in open_sample(tmp_path / "still.webp")] == [video[0].tobytes()]


@pytest.mark.parametrize("lossless", [True, False])
def test_an_image_is_a_png(tmp_path, lossless):
    (image,) = noise(1)
    file = tmp_path / f"image{sample_suffix(image)}"
    save_sample(image, file, lossless=lossless)
    assert file.suffix == ".png" and open_sample(file).tobytes() == image.tobytes()


def test_what_need_not_be_exact_is_small(tmp_path):
    """Smooth pictures with a little noise, as videos are."""
    waves = 127 + 100 * np.sin(np.arange(120) / 20)[None, :, None] * np.ones((80, 1, 3))
    grain = np.random.default_rng(0).normal(0, 3, (6, 80, 120, 3))
    video = [Image.fromarray((waves + each).clip(0, 255).astype(np.uint8)) for each in grain]
    for lossless in (True, False):
        save_sample(video, tmp_path / f"{lossless}.webp", lossless=lossless)
    assert 10 * (tmp_path / "False.webp").stat().st_size < (tmp_path / "True.webp").stat().st_size
    read = open_sample(tmp_path / "False.webp")
    assert len(read) == 6 and np.abs(np.subtract(read[3], video[3], dtype=float)).mean() < 4


def test_an_animation_plays_sixteen_frames_a_second_for_ever(tmp_path):
    save_sample(noise(5), tmp_path / "a.webp", lossless=False)
    with Image.open(tmp_path / "a.webp") as opened:
        assert opened.is_animated and opened.n_frames == 5 and opened.info["loop"] == 0
        for place in range(5):
            opened.seek(place)
            opened.load()
            assert opened.info["duration"] == 62
