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
    to_rgb,
    to_tensor,
)


def noise(num_frames: int, width: int = 9, height: int = 7, seed: int = 0) -> list[Image.Image]:
    """Frames of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


# ---- Colours ----

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
EXPECTED = np.repeat(GREY[:, :, None], 3, axis=2)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("LA"),
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(GREY).convert("RGBA"),
        Image.fromarray(GREY).convert("I"),
        Image.fromarray(GREY).convert("F"),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray(GREY.astype(">u2") * 257),
        Image.fromarray(GREY.astype(np.int32) * 257),
        Image.fromarray(GREY.astype(np.float32) / 255),
    ],
    ids=lambda image: image.mode,
)
def test_the_same_picture_has_the_same_colours_in_every_mode(image):
    assert np.array_equal(pixels(to_rgb(image)), EXPECTED)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_colours_are_the_same_from_a_file(tmp_path, format, mode):
    image = Image.fromarray(GREY.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    image.save(tmp_path / "image", format=format)
    with Image.open(tmp_path / "image") as opened:
        assert np.array_equal(pixels(to_rgb(opened)), EXPECTED)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_arrays_and_tensors_of_any_bit_depth_are_images(dtype, channels):
    scale = {"u1": 1, "u2": 257}.get(np.dtype(dtype).str[1:], 1 / 255)
    values = (GREY * np.float64(scale)).astype(dtype)
    if channels is not None:
        values = np.repeat(values[:, :, None], channels, axis=2)
        if channels in (2, 4):
            values[:, :, -1] = 255 * scale  # opaque
    assert np.array_equal(pixels(to_rgb(values)), EXPECTED)
    tensor = torch.from_numpy(values)
    assert np.array_equal(pixels(to_rgb(tensor if channels is None else tensor.movedim(-1, 0))), EXPECTED)


def test_of_two_colours_there_is_black_and_white():
    bits = GREY > 99
    for image in (Image.fromarray(bits), bits, torch.from_numpy(bits), torch.from_numpy(bits).bfloat16()):
        assert np.array_equal(pixels(to_rgb(image)), np.repeat(bits[:, :, None], 3, axis=2) * np.uint8(255))


def test_what_is_transparent_is_white_in_every_mode():
    red, half = (255, 0, 0, 0), (255, 0, 0, 128)
    assert to_rgb(Image.new("RGBA", (1, 1), red)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), half)).getpixel((0, 0)) == (255, 127, 127)
    assert to_rgb(Image.new("RGBA", (1, 1), half).convert("RGBa")).getpixel((0, 0)) == (255, 127, 127)
    assert to_rgb(Image.new("LA", (1, 1), (0, 128))).getpixel((0, 0)) == (127, 127, 127)
    assert to_rgb(Image.new("LA", (1, 1), (0, 128)).convert("La")).getpixel((0, 0)) == (127, 127, 127)
    for mode, colour in (("RGB", (9, 8, 7)), ("L", 9), ("P", 9), ("1", 0), ("I;16", 9)):
        image = Image.new(mode, (1, 1), colour)
        image.info["transparency"] = colour
        assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_ink_is_what_it_prints():
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


def test_a_photograph_is_upright(tmp_path):
    """Also one that need not be converted otherwise, and without turning it twice."""
    image = Image.new("RGB", (4, 2), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        turned = to_rgb(opened)
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (0, 0, 255)
    assert to_rgb(turned).size == (2, 4)
    assert to_tensor([Image.open(tmp_path / "a.png")]).shape == (1, 3, 4, 2)


def test_what_is_right_already_is_not_copied():
    (image,) = noise(1)
    assert to_rgb(image) is image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.new("F", (1, 1), -0.1),
            r"mode 'F' has values from -0.1 to -0.1; they must be in \[0, 1\] or \[0, 255\]",
        ),
        (Image.new("F", (1, 1), float("nan")), "mode 'F' has values from nan to nan"),
        (Image.new("F", (1, 1), 256), "mode 'F' has values from 256 to 256"),
        (Image.new("F", (1, 1), 1.05), r"values up to 1.05, which may be too large for \[0, 1\], or nearly black"),
        (Image.new("I", (1, 1), -1), "mode 'I' has values from -1 to -1"),
        (Image.new("I", (1, 1), 65536), "mode 'I' has values from 65536 to 65536"),
        (Image.new("I", (1, 1), 300), r"values up to 300, which may be too large for \[0, 255\]"),
        (np.full((2, 2), 1.01), r"An image of float64 has values from 1.01 to 1.01; floats must be in \[0, 1\]"),
        (torch.full((3, 2, 2), -1.0), "An image of float32 has values from -1 to -1"),
        (np.full((2, 2, 3), np.nan), "has values from nan to nan"),
        (np.zeros((2, 2), np.int64), "has values of int64; they must be bool, uint8, uint16, or floats"),
        (np.zeros((3, 8, 8), np.uint8), r"has the shape \(3, 8, 8\), the channels last; it must be"),
        (np.zeros((0, 8), np.uint8), r"has the shape \(0, 8\)"),
        (np.zeros((2, 2, 8, 3), np.uint8), r"has the shape \(2, 2, 8, 3\)"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


# ---- Frames ----


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
