# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Images and videos: convert, select frames, make tensors, read and write files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor


Video = list[Image.Image]
"""A video: its frames in their order, PIL images of one size."""

Sample = Image.Image | Video
"""An image or a video, the output of a pipeline for one prompt."""

FRAME_MILLISECONDS = 62  # 16 frames per second; pipelines do not define the speed of their videos
PAPER = "#FFFFFF"

# Pillow's modes of 32 bits do not define which value is white; these two are common.
WHITE = {"I": (255, 65535), "F": (1, 255)}


def to_rgb(image: Image.Image | np.ndarray | Tensor) -> Image.Image:
    """
    Convert an image of any type to RGB with 8 bits per colour, upright, and on white where it is transparent.

    Images for pipelines and for rewards are converted by this function, so that both see the same colours.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            An image of any mode. Values of 16 bits (`I;16`) are scaled to 8 bits. White is 255 or 65535 in mode `I`,
            and 1 or 255 in mode `F`, whichever fits the largest value. The orientation in the metadata (EXIF) is
            applied. An array has the shape `[H, W]` or `[H, W, C]`, a tensor `[H, W]` or `[C, H, W]`, with 1 to 4
            channels (grey, grey and alpha, RGB, RGBA); its values are bool, uint8, uint16, or floats in [0, 1].

    Returns:
        `PIL.Image.Image`: the image itself if nothing has to be converted, otherwise a new one.

    Raises:
        `ValueError`: If the shape, the dtype or the values are not as above, or it is unclear which value is white.
    """
    if isinstance(image, Tensor):
        image = _tensor_to_array(image)
    if isinstance(image, np.ndarray):
        image = _array_to_image(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image of mode `I`, `I;16` or `F` to mode `L`."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    small, large = WHITE.get(image.mode, (65535, 65535))
    white = small if high <= small else large
    if not (low >= 0 and high <= large):  # also for NaN
        raise ValueError(
            f"An image of mode {image.mode!r} has values from {low:g} to {high:g}; they must be in [0, {small}] or "
            f"[0, {large}]. Scale them, or convert it to 8 bits."
        )
    if small < high < large / 16:  # overshoot from resizing, or a nearly black image
        raise ValueError(
            f"An image of mode {image.mode!r} has values up to {high:g}, which may be too large for [0, {small}], or "
            f"nearly black in [0, {large}]. Convert it to 8 bits yourself."
        )
    grey = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if "transparency" in image.info:  # the value that is transparent
        alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(alpha))
    return grey


def _tensor_to_array(image: Tensor) -> np.ndarray:
    image = image.detach().cpu()
    if image.dtype == torch.bfloat16:  # numpy has no such type
        image = image.float()
    return image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()


def _array_to_image(values: np.ndarray) -> Image.Image:
    if values.ndim not in (2, 3) or values.size == 0 or (values.ndim == 3 and values.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(
            f"An image has the shape {values.shape}, the channels last; it must be [H, W] or [H, W, C] with 1 to 4 "
            "channels. (A tensor has its channels first, [C, H, W].)"
        )
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also for NaN
            raise ValueError(
                f"An image of {values.dtype} has values from {low:g} to {high:g}; floats must be in [0, 1]. Scale or "
                "clip them."
            )
        values = np.rint(values.astype(np.float64) * 255)
    elif values.dtype == np.uint16:
        values = np.rint(values / 257)
    elif values.dtype == np.bool_:
        values = values * 255
    elif values.dtype != np.uint8:
        raise ValueError(
            f"An image has values of {values.dtype}; they must be bool, uint8, uint16, or floats in [0, 1]. Convert "
            "them."
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(values.astype(np.uint8)))


def evenly_spaced_frames(video: Video, num_frames: int) -> Video:
    """
    Select frames of a video at equal distances, from the first to the last.

    Args:
        video (`list[PIL.Image.Image]`):
            The video.
        num_frames (`int`):
            Number of frames; 1 is the frame in the middle. If the video has fewer, all are selected.
    """
    if num_frames >= len(video):
        return list(video)
    if num_frames == 1:
        return [video[len(video) // 2]]
    return [video[round(k * (len(video) - 1) / (num_frames - 1))] for k in range(num_frames)]


def film_strip(sample: Sample, num_frames: int = 4) -> Image.Image:
    """
    An image of a video: some of its frames side by side. An image is returned unchanged.

    Args:
        sample (`PIL.Image.Image` or `list[PIL.Image.Image]`):
            An image or a video.
        num_frames (`int`, *optional*, defaults to `4`):
            Number of frames, see [`evenly_spaced_frames`].
    """
    if not isinstance(sample, list):
        return sample
    frames = evenly_spaced_frames(sample, num_frames)
    width, height = frames[0].size
    step = width + max(1, width // 40)  # with a gap between frames
    strip = Image.new("RGB", (step * len(frames) - (step - width), height), PAPER)
    for place, frame in enumerate(frames):
        strip.paste(to_rgb(frame), (place * step, 0))
    return strip


def to_tensor(samples: Sequence[Sample]) -> Tensor:
    """
    Convert images to one tensor `[B, 3, H, W]`, or videos of one length to `[B, F, 3, H, W]`; RGB in [0, 1].

    Args:
        samples (`Sequence[PIL.Image.Image]` or `Sequence[list[PIL.Image.Image]]`):
            Images or videos of one size.
    """
    stacks = [
        to_tensor(sample) if isinstance(sample, list) else torch.from_numpy(np.array(to_rgb(sample)))
        for sample in samples
    ]
    stacked = torch.stack(stacks)
    return stacked if isinstance(samples[0], list) else stacked.permute(0, 3, 1, 2).float() / 255


def sample_suffix(sample: Sample) -> str:
    """The suffix of a file for [`save_sample`]: `".png"` for an image, `".webp"` for a video."""
    return ".webp" if isinstance(sample, list) else ".png"


def save_sample(sample: Sample, file: Path, *, lossless: bool = True) -> None:
    """
    Write an image as PNG, or a video as an animated WebP, which browsers play in a loop at 16 frames per second.

    Args:
        sample (`PIL.Image.Image` or `list[PIL.Image.Image]`):
            An image, or a video, which is written in RGB.
        file (`Path`):
            The file, with any suffix.
        lossless (`bool`, *optional*, defaults to `True`):
            Whether a video is compressed without loss, as an image always is; otherwise its file is many times
            smaller.
    """
    if not isinstance(sample, list):
        sample.save(file, format="PNG")
        return
    first, *others = [to_rgb(frame) for frame in sample]
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
    Read a file of [`save_sample`], in RGB.

    WebP stores consecutive equal frames once, with their duration, which gives their number. A video whose frames are
    all equal has one frame afterwards.

    Args:
        file (`Path`):
            A file with the suffix of [`sample_suffix`].
    """
    with Image.open(file, formats=["PNG", "WEBP"]) as opened:  # no other decoder is used
        if opened.format != "WEBP":
            return to_rgb(opened).copy()  # of the pixels, since the file is closed
        video: Video = []
        for place in range(getattr(opened, "n_frames", 1)):
            opened.seek(place)
            opened.load()  # reads the duration
            video += [to_rgb(opened.copy())] * max(1, round(opened.info["duration"] / FRAME_MILLISECONDS))
        return video
