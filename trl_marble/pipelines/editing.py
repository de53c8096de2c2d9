# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompt sets with images to be edited: check them, convert them to RGB, and encode each different row once."""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Image
from PIL.Image import Image as PILImage
from torch import Tensor

from ..media import to_rgb
from .conditioning import Conditioning
from .flow_pipeline import FlowPipeline


def edits_images(flow: FlowPipeline, dataset: Dataset, name: str) -> bool:
    """
    Whether a pipeline edits the images of a prompt set.

    It does if the pipeline takes images and the set has a column `image`. A pipeline that takes no images ignores the
    column, which then goes to the rewards only.

    Args:
        flow ([`FlowPipeline`]):
            The pipeline.
        dataset ([`~datasets.Dataset`]):
            The prompt set.
        name (`str`):
            The name of the dataset in messages.

    Raises:
        `ValueError`: the pipeline needs images and there is no column `image`, the column does not hold images, or a
            row has none.
    """
    kind = type(flow.pipeline).__name__
    if "image" not in dataset.column_names:
        if flow.family.takes_image == "required":
            raise ValueError(
                f"{kind} edits images, but `{name}` has no column `image` (its columns are "
                f"{', '.join(dataset.column_names)}). Rename the column with the images, for example with "
                '`dataset.rename_column("source", "image")`.'
            )
        return False
    if flow.family.takes_image == "no":
        if not flow.is_listed and "image" in inspect.signature(type(flow.pipeline).__call__).parameters:
            warnings.warn(
                f"{kind} takes an image, but is not in the table of tested pipeline classes: the column `image` of "
                f"`{name}` goes to the rewards only, and images are made from text alone. To edit, use a class of the "
                "table (docs/pipelines.md) or add a row for this one.",
                UserWarning,
                stacklevel=3,
            )
        return False
    feature = dataset.features["image"]
    if not isinstance(feature, Image) or not feature.decode:
        raise ValueError(
            f"{kind} edits the images in the column `image` of `{name}`, but the column is of type {feature}. Make it "
            'images with `dataset.cast_column("image", datasets.Image())`, or rename it if it is not to be edited.'
        )
    # Arrow finds empty rows without decoding the images of the others.
    start = 0
    for batch in dataset.select_columns("image").with_format("arrow").iter(batch_size=1000):
        missing = batch.column("image").is_null().to_pylist()
        if any(missing):
            raise ValueError(
                f"Row {start + missing.index(True)} of `{name}` has no image, but {kind} edits the image of every "
                "row. Leave such rows out, for example with `dataset.filter(lambda image: image is not None, "
                'input_columns="image")`.'
            )
        start += len(missing)
    return True


def with_rgb_images(dataset: Dataset) -> Dataset:
    """
    Convert the column `image` of a prompt set to RGB, see [`~trl_marble.media.to_rgb`].

    The images are converted when rows are read, so that pipeline and rewards get the same images.

    Args:
        dataset ([`~datasets.Dataset`]):
            A prompt set for which [`edits_images`] is true.

    Raises:
        `ValueError`: If the set has a format that does not keep images, such as `"torch"`.
    """
    form = dataset.format
    if form["type"] is None:
        return dataset.with_transform(_convert_images, columns=["image"], output_all_columns=True)
    if form["type"] == "custom":
        convert = partial(_convert_images, before=form["format_kwargs"]["transform"])
        return dataset.with_transform(convert, form["columns"], form["output_all_columns"])
    raise ValueError(
        f"The prompt set has the format {form['type']!r}, which converts images to something else. Remove it with "
        "`dataset.with_format(None)`."
    )


def _convert_images(
    rows: dict[str, list[Any]], before: Callable[[dict[str, list[Any]]], dict[str, list[Any]]] | None = None
) -> dict[str, list[Any]]:
    """Convert the images of rows to RGB, after `before`, the transform that the dataset already had."""
    rows = rows if before is None else before(rows)
    return {name: [to_rgb(image) for image in values] if name == "image" else values for name, values in rows.items()}


def row_digests(prompts: Sequence[str], images: Sequence[PILImage] | None = None) -> list[str]:
    """
    Digests of the rows of a prompt set: equal rows have equal digests.

    Args:
        prompts (`Sequence[str]`):
            The prompts.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            The images to be edited, one per prompt.

    Returns:
        `list[str]`: one SHA-256 digest per row.
    """
    digests = []
    for place, prompt in enumerate(prompts):
        digest = hashlib.sha256(prompt.encode())
        if images is not None:
            image = images[place]
            digest.update(f"\0{image.mode} {image.size}".encode() + image.tobytes())
        digests.append(digest.hexdigest())
    return digests


def encode_distinct(
    flow: FlowPipeline, prompts: Sequence[str], images: Sequence[PILImage] | None = None
) -> tuple[Conditioning, Tensor]:
    """
    Encode each different prompt, or pair of prompt and image, once.

    Args:
        flow ([`FlowPipeline`]):
            The pipeline.
        prompts (`Sequence[str]`):
            The prompts; some may be the same.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            The images to be edited, one per prompt.

    Returns:
        `tuple[Conditioning, torch.LongTensor]`: the different rows, in the order in which each comes first, and the
        index of the row of each prompt.
    """
    digests = row_digests(prompts, images)
    numbers = {digest: number for number, digest in enumerate(dict.fromkeys(digests))}
    first = [digests.index(digest) for digest in numbers]
    conditioning = flow.encode(
        [prompts[row] for row in first], None if images is None else [images[row] for row in first]
    )
    return conditioning, torch.tensor([numbers[digest] for digest in digests])
