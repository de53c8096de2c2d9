# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
What the reward server reads and answers.

One request, `POST /score/<reward>` with the JSON

    {"images": [<PNG file in base64>, ...], "prompts": [<text>, ...], "columns": {<name>: [<value>, ...], ...}}

is answered with `{"values": [...]}`: a number, `null` where the reward does not apply, or `{"error": <text>}` where it
failed for that image only. Every other answer is `{"error": <text>}` with an error status.
"""

import base64
import io
import json
import math
import re
from http import HTTPStatus
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..media import to_rgb
from .http_client import refuse_constant
from .protocol import reward_tensor
from .reward_value import to_number


# Names that no column can have.
RESERVED = {"images", "videos", "prompts", "trainer_state", "log_metric", "log_extra"}
# A folder in a text: after what cannot be part of a URL, a fraction or "and/or".
FOLDERS = re.compile(r"""(?<![\w:/.\\])(?:~|[A-Za-z]:(?=\\))?(?:[/\\][^/\\\s'":]+)*[/\\](?=[^/\\\s'":])""")


class RefusedError(Exception):
    """A request that is answered with a status and a reason instead of values."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def read_request(
    body: bytes, max_images: int, max_pixels: int
) -> tuple[list[Image.Image], list[str], dict[str, list]]:
    """
    Images, prompts and columns of a request.

    Args:
        body (`bytes`):
            JSON, from anyone.
        max_images (`int`):
            Largest number of images.
        max_pixels (`int`):
            Largest number of pixels of all images.

    Returns:
        `tuple[list[PIL.Image.Image], list[str], dict[str, list]]`: the images are in RGB, see
        [`~trl_marble.media.to_rgb`].

    Raises:
        `RefusedError`: If anything is not as it must be; says what.
    """
    try:
        request = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not JSON in UTF-8: {error}.") from error
    if not isinstance(request, dict) or request.keys() != {"images", "prompts", "columns"}:
        raise bad_request("The body must be a JSON object with `images`, `prompts` and `columns`, and no more.")
    files, prompts, columns = request["images"], request["prompts"], request["columns"]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files) or not files:
        raise bad_request("`images` must be a list of at least one PNG file as a base64 string.")
    if len(files) > max_images:
        raise RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{len(files)} images are more than {max_images}, the limit here."
        )
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise bad_request("`prompts` must be a list of strings.")
    if len(prompts) != len(files):
        raise bad_request(f"There are {len(prompts)} prompts for {len(files)} images.")
    if not isinstance(columns, dict):
        raise bad_request("`columns` must be an object of lists.")
    for name, values in columns.items():
        if name in RESERVED:
            raise bad_request(f"A column cannot have the name {name!r}.")
        if not isinstance(values, list) or len(values) != len(files):
            raise bad_request(f"Column {name!r} must be a list with one value for each of the {len(files)} images.")
    images = []
    for position, file in enumerate(files):
        image = _open_png(file, position)
        max_pixels -= image.width * image.height
        if max_pixels < 0:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The images have too many pixels: image {position} of {image.width} x {image.height} goes over the "
                "limit here.",
            )
        try:
            image.load()
        except Exception as error:  # a decoder may raise anything for a broken file
            raise bad_request(f"Image {position} is a broken PNG file.") from error
        images.append(_only_pixels(image))
    return images, prompts, columns


def describe(error: BaseException) -> str:
    """Type and message of an error, without the folders of this machine."""
    message = FOLDERS.sub("", str(error))
    return f"{type(error).__name__}: {message if len(message) <= 500 else message[:497] + '...'}"


def _open_png(file: str, position: int) -> Image.Image:
    """The image, of which only the header is read."""
    try:
        content = base64.b64decode(file, validate=True)
    except ValueError as error:
        raise bad_request(f"Image {position} is not base64.") from error
    try:
        return Image.open(io.BytesIO(content), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Image {position} has more pixels than any image may have."
        ) from error
    except Exception as error:  # a decoder may raise anything for a broken file
        raise bad_request(f"Image {position} is not a PNG file.") from error


def _only_pixels(image: Image.Image) -> Image.Image:
    """
    The image in RGB without the file that it came from, and what that held beside pixels: a kilobyte of compressed
    text can become a megabyte, over and over in one file.
    """
    pixels = image.copy()
    pixels.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return to_rgb(pixels)


def encode_values(values: Any, name: str, prompts: list[str]) -> list[float | dict[str, str] | None]:
    """
    What a reward returned, as the answer's JSON has it.

    Args:
        values (`list`, `np.ndarray` or `torch.Tensor`):
            One value per image: a number, `None` or NaN where the reward does not apply, or an exception where it
            failed for that image alone.
        name (`str`):
            Name of the reward, for messages.
        prompts (`list[str]`):
            The prompts of the images.

    Raises:
        [`RewardError`]: If the values are not those of a reward, see `reward_tensor`.
    """
    reward_tensor(values, name, prompts)  # raises for what is not a reward, as it would in the trainer
    encoded: list[float | dict[str, str] | None] = []
    for value in values.tolist() if isinstance(values, Tensor | np.ndarray) else values:
        if isinstance(value, Exception):
            encoded.append({"error": describe(value)})
        else:
            number = to_number(value)
            encoded.append(None if math.isnan(number) else number)
    return encoded


def bad_request(reason: str) -> RefusedError:
    """The refusal of a request that is not as it must be, to be raised; `reason` says what is wrong."""
    return RefusedError(HTTPStatus.BAD_REQUEST, reason)
