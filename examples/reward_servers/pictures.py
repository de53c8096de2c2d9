# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Pictures for scorers and for the rewards that ask them.

A reward server gets one image for each score. What is scored with several, a video or a picture before and after
editing, travels as one *film strip*: all of them side by side, and their sizes as a column. `of_videos` and `of_edits`
make the reward for the trainer; `frames_of` takes a strip apart again in the scorer. Needs Pillow only.
"""

import os
import tempfile
from contextlib import contextmanager

from PIL import Image


def film_strip(frames):
    """Several images as one, side by side, and the size of each."""
    sizes = [list(frame.size) for frame in frames]
    strip = Image.new("RGB", (sum(width for width, _ in sizes), max(height for _, height in sizes)))
    left = 0
    for frame in frames:
        strip.paste(frame.convert("RGB"), (left, 0))
        left += frame.width
    return strip, sizes


def frames_of(strip, sizes):
    """The images of a film strip."""
    frames, left = [], 0
    for width, height in sizes:
        frames.append(strip.crop((left, 0, left + width, height)))
        left += width
    return frames


def of_videos(remote):
    """A reward of videos for the trainer, which a `RemoteReward` gets as film strips."""

    def score(videos, prompts, **columns):
        return _ask(remote, videos, prompts)

    score.__name__ = remote.name
    return score


def of_edits(remote):
    """A reward of edited images for the trainer: a `RemoteReward` gets film strips of them behind what was edited."""

    def score(images, prompts, image, **columns):
        return _ask(remote, list(zip(image, images)), prompts)  # noqa: B905 (older Pythons)

    score.__name__ = remote.name
    return score


def _ask(remote, pictures, prompts):
    strips = [film_strip(frames) for frames in pictures]
    return remote(images=[strip for strip, _ in strips], prompts=prompts, sizes=[sizes for _, sizes in strips])


@contextmanager
def saved(images):
    """The paths of PNG files of images, for scorers that take only paths."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{number}.png") for number in range(len(images))]
        for image, path in zip(images, paths):  # noqa: B905
            image.save(path)
        yield paths
