# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The JPEG rewards: minus and plus the size of the file in kilobytes."""

import numpy as np
import pytest
from PIL import Image

from trl_marble.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from trl_marble.rewards.protocol import reward_names, reward_tensor


def noise(contrast, size=(64, 96), seed=0):
    """Grey with noise: the higher the contrast, the larger the file."""
    values = 128 + contrast * np.random.default_rng(seed).standard_normal((size[1], size[0], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def test_it_is_the_size_of_the_file_in_thousands_of_bytes(tmp_path):
    images = [noise(0), noise(20), noise(60, size=(7, 5))]
    sizes = jpeg_incompressibility(images=images, prompts=["a", "b", "c"], trainer_state=None, text=[None] * 3)
    for image, size in zip(images, sizes, strict=True):
        image.save(tmp_path / "image.jpg", quality=95)
        assert size == (tmp_path / "image.jpg").stat().st_size / 1000


def test_one_is_minus_the_other():
    images = [noise(contrast) for contrast in (0, 5, 40)]
    larger, smaller = jpeg_incompressibility(images=images), jpeg_compressibility(images=images)
    assert smaller == [-size for size in larger]
    assert 0 < larger[0] < larger[1] < larger[2]


def test_a_value_does_not_depend_on_the_batch():
    images = [noise(contrast, seed=contrast) for contrast in (3, 30, 60)]
    assert jpeg_compressibility(images=images) == [jpeg_compressibility(images=[image])[0] for image in images]
    assert jpeg_compressibility(images=[]) == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (33, 17)])
def test_images_of_any_mode_and_size(mode, size):
    (value,) = jpeg_incompressibility(images=[noise(30, size).convert("L").convert(mode)])
    assert 0.1 < value < 10


def test_what_is_transparent_is_seen_on_white():
    hidden = noise(60)
    hidden.putalpha(0)
    assert jpeg_incompressibility(images=[hidden]) == jpeg_incompressibility(
        images=[Image.new("RGB", hidden.size, "white")]
    )


def test_they_are_rewards():
    funcs = [jpeg_compressibility, jpeg_incompressibility]
    assert reward_names(funcs) == ["jpeg_compressibility", "jpeg_incompressibility"]
    for func in funcs:
        values = func(images=[noise(9)], prompts=["日本語"], trainer_state=None)
        assert reward_tensor(values, func.__name__, ["日本語"]).isfinite().all()
