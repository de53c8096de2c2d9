# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a pipeline makes of a prompt, an image or a video: frames, tensors and files of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


Video = list[Image.Image]
"""A video: its frames in their order, PIL images of one size."""

Sample = Image.Image | Video
"""What a pipeline makes of a prompt."""

FRAME_MILLISECONDS = 62  # 16 frames a second; a pipeline does not say how fast its videos are meant to play
PAPER = "#FFFFFF"


def evenly_spaced_frames(video: Video, num_frames: int) -> Video:
    """
    Some frames of a video, from its first one to its last one.

    Args:
        video (`list[PIL.Image.Image]`):
            The video.
        num_frames (`int`):
            How many frames; 1 takes the one in the middle. A video that has fewer is taken whole.
    """
    if num_frames >= len(video):
        return list(video)
    if num_frames == 1:
        return [video[len(video) // 2]]
    return [video[round(k * (len(video) - 1) / (num_frames - 1))] for k in range(num_frames)]


def film_strip(sample: Sample, num_frames: int = 4) -> Image.Image:
    """
    A picture that shows a video: some of its frames side by side. An image shows itself.

    Args:
        sample (`PIL.Image.Image` or `list[PIL.Image.Image]`):
            An image or a video.
        num_frames (`int`, *optional*, defaults to `4`):
            How many frames, see [`evenly_spaced_frames`].
    """
    if not isinstance(sample, list):
        return sample
    frames = evenly_spaced_frames(sample, num_frames)
    width, height = frames[0].size
    step = width + max(1, width // 40)  # a gap parts a frame from the next
    strip = Image.new("RGB", (step * len(frames) - (step - width), height), PAPER)
    for place, frame in enumerate(frames):
        strip.paste(frame.convert("RGB"), (place * step, 0))
    return strip


def to_tensor(samples: Sequence[Sample]) -> Tensor:
    """
    Images as one tensor `[B, 3, H, W]`, videos of one length as one `[B, F, 3, H, W]`; RGB in [0, 1].

    Args:
        samples (`Sequence[PIL.Image.Image]` or `Sequence[list[PIL.Image.Image]]`):
            Images or videos of one size.
    """
    stacks = [
        to_tensor(sample) if isinstance(sample, list) else torch.from_numpy(np.array(sample.convert("RGB")))
        for sample in samples
    ]
    stacked = torch.stack(stacks)
    return stacked if isinstance(samples[0], list) else stacked.permute(0, 3, 1, 2).float() / 255


def sample_suffix(sample: Sample) -> str:
    """The ending of a file that [`save_sample`] writes: `".png"` for an image, `".webp"` for a video."""
    return ".webp" if isinstance(sample, list) else ".png"


def save_sample(sample: Sample, file: Path, *, lossless: bool = True) -> None:
    """
    Write an image as PNG, or a video as an animated WebP, which browsers play in a loop at 16 frames a second.

    Args:
        sample (`PIL.Image.Image` or `list[PIL.Image.Image]`):
            An image, or a video, which is written in RGB.
        file (`Path`):
            The file, whatever its ending.
        lossless (`bool`, *optional*, defaults to `True`):
            Whether every pixel of a video is kept, as every pixel of an image is; else its file is many times smaller.
    """
    if not isinstance(sample, list):
        sample.save(file, format="PNG")
        return
    first, *others = [frame.convert("RGB") for frame in sample]
    first.save(
        file,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=FRAME_MILLISECONDS,
        loop=0,
        lossless=lossless,
    )


def open_sample(file: Path) -> Sample:
    """
    What [`save_sample`] wrote, in RGB.

    WebP keeps a frame that does not change once, with the time that it lasts, from which the frames are counted.
    Of a video whose frames are all the same there is one frame left.

    Args:
        file (`Path`):
            A file whose ending is that of [`sample_suffix`].
    """
    with Image.open(file, formats=["PNG", "WEBP"]) as opened:  # other decoders are never asked
        if opened.format != "WEBP":
            return opened.convert("RGB")
        video: Video = []
        for place in range(getattr(opened, "n_frames", 1)):
            opened.seek(place)
            opened.load()  # tells the duration
            video += [opened.convert("RGB")] * max(1, round(opened.info["duration"] / FRAME_MILLISECONDS))
        return video
