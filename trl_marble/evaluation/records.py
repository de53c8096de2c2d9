# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation leaves on disk batch by batch, so that it can go on where it was interrupted."""

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..media import Sample, sample_suffix, save_sample
from ..rollout.diversity import thumbnails


# What a folder was evaluated with may be called by another name when it is continued.
NAMES = ("pipeline", "adapter")


@dataclass(frozen=True)
class ImageRecord:
    """
    One scored image or video.

    Args:
        index (`int`):
            Its number in the evaluation.
        file (`str`):
            Where it is, relative to the folder of the evaluation.
        sha256 (`str`):
            Of the file.
        rewards (`list[float | None]`):
            One value per reward; `None` where it does not apply or failed.
        failed (`list[bool]`):
            Which rewards failed.
        thumbnail (`str`):
            The 16 x 16 RGB pixels that its diversity is measured by, of a video those of some frames, one byte each,
            in base64.
        kl (`float`, *optional*):
            The policy's distance from the base model at a noised version of it; `None` where it was not measured.
    """

    index: int
    file: str
    sha256: str
    rewards: list[float | None]
    failed: list[bool]
    thumbnail: str
    kl: float | None = None

    def thumbnail_features(self) -> Tensor:
        """The thumbnail as [`thumbnails`] gives it: shape `[768]` (an image's), float32, in [0, 1]."""
        pixels = np.frombuffer(base64.b64decode(self.thumbnail), dtype=np.uint8)
        return torch.from_numpy(pixels.copy()).float() / 255


class BatchRecords:
    """
    The records of an evaluation, one file per batch.

    A batch's images are written first and its record last, each under another name until it is whole, so that a record
    that is there is that of a finished batch. The record holds a digest of itself and of its images.

    Args:
        folder (`Path`):
            The folder of the evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settings = folder / "records" / "settings.json"

    def begin(self, settings: Mapping[str, Any]) -> None:
        """
        Claim the folder for an evaluation, or find that it is being continued.

        Args:
            settings (`Mapping[str, Any]`):
                What every batch depends on, ready for JSON.

        Raises:
            `ValueError`: if the folder has an evaluation with other settings.
        """
        if self._settings.is_file():
            earlier = json.loads(self._settings.read_text(encoding="utf-8"))
            wanted = json.loads(json.dumps(settings))
            differing = [
                f"`{key}` was {earlier.get(key)!r} and is {wanted.get(key)!r}"
                for key in {**earlier, **wanted}
                if key not in NAMES and earlier.get(key) != wanted.get(key)
            ]
            if differing:
                raise ValueError(
                    f"`{self.folder}` has an evaluation with other settings: {'; '.join(differing)}. Pass another "
                    "`output_dir`, or remove that folder."
                )
        write_atomically(self._settings, json.dumps(settings, indent=2).encode())

    def write(self, batch: int, records: Sequence[ImageRecord]) -> None:
        """Write the record of a finished batch, whose images are saved."""
        content = [dataclasses.asdict(record) for record in records]
        write_atomically(self._file(batch), json.dumps({"images": content, "digest": _digest(content)}).encode())

    def read(self, batch: int) -> list[ImageRecord] | None:
        """
        The record of a batch.

        Returns:
            `list[ImageRecord]`, or `None` where the batch is not finished.

        Raises:
            `ValueError`: if the record or one of its images is not what was written.
        """
        file = self._file(batch)
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            images, digest = content["images"], content["digest"]
            records = [ImageRecord(**image) for image in images]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"The record `{file}` is damaged ({error}).") from error
        if _digest(images) != digest:
            raise ValueError(f"The record `{file}` is damaged: its content does not fit its digest.")
        root = self.folder.resolve()
        for record in records:
            if not is_within(root, record.file):
                raise ValueError(f"The record `{file}` names the image {record.file!r}, which is not in the folder.")
            image_file = self.folder / record.file
            if not image_file.is_file() or file_digest(image_file) != record.sha256:
                raise ValueError(f"The image `{image_file}` is missing or was changed since it was scored.")
        return records

    def save_image(
        self, index: int, name: str, image: Sample, rewards: Tensor, failed: Tensor, kl: float | None = None
    ) -> ImageRecord:
        """
        Save an image, or a video as one file, and say what its record is.

        Args:
            index (`int`):
                Its number in the evaluation.
            name (`str`):
                Name of the file, without ending.
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`):
                The image, or the frames of a video.
            rewards (`Tensor` of shape `[K]`):
                Its rewards; NaN where a reward does not apply or failed.
            failed (`Tensor` of shape `[K]`, bool):
                Which rewards failed.
            kl (`float`, *optional*):
                Its distance from the base model; NaN where its latents are not finite.
        """
        file = f"images/{name}{sample_suffix(image)}"
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_sample(image, unfinished)
        os.replace(unfinished, path)
        pixels = (thumbnails([image])[0] * 255).round().to(torch.uint8).numpy().tobytes()
        return ImageRecord(
            index=index,
            file=file,
            sha256=file_digest(path),
            rewards=[None if value != value else value for value in rewards.tolist()],
            failed=failed.tolist(),
            thumbnail=base64.b64encode(pixels).decode("ascii"),
            kl=None if kl is None or kl != kl else kl,
        )

    def _file(self, batch: int) -> Path:
        return self.folder / "records" / f"batch_{batch:05d}.json"


def is_within(folder: Path, name: str) -> bool:
    """Whether a relative path leads to a place in a folder (which is given resolved), links followed."""
    try:
        return (folder / name).resolve().is_relative_to(folder)
    except (ValueError, TypeError, OSError):  # no path: no text, a zero byte in it, too long, or a link to itself
        return False


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all; its folder is made if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
