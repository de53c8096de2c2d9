# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Get the pictures of the emoji: Noto Emoji, as the npm package `emoji-datasource-google` has them."""

import base64
import hashlib
import tarfile
from io import BytesIO
from pathlib import Path

import httpx2
from PIL import Image

from .captions import emoji_images


TARBALL = "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
# `dist.integrity` of the package in npm's registry.
SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
IMAGES = "img/google/64"  # the folder of the pictures in the package


def download(path: Path) -> Path:
    """Download the tarball of the package (74 MB), unless it is there already.

    Args:
        path (`Path`): Where to write it.

    Returns:
        `Path`: `path`.
    """
    if not path.exists():
        partial = path.with_suffix(".partial")
        with httpx2.stream("GET", TARBALL, follow_redirects=True, timeout=60) as response, partial.open("wb") as file:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
        partial.replace(path)
    return path


def check_integrity(tarball: Path) -> None:
    """Refuse a tarball that is not the one that the captions were made for."""
    with tarball.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if digest != SHA512:
        raise ValueError(
            f"{tarball} has the SHA-512 {digest}, not {SHA512}: it is incomplete, or another version. Delete it, and "
            f"download {TARBALL}"
        )


def _read_tarball(path: Path) -> dict[str, Image.Image]:
    check_integrity(path)
    wanted = {f"package/{IMAGES}/{image}": name for name, image in emoji_images().items()}
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name in wanted and (file := archive.extractfile(member)) is not None:
                found[wanted[member.name]] = Image.open(BytesIO(file.read())).convert("RGBA")
    return {name: found[name] for name in emoji_images()}


def _read_folder(path: Path) -> dict[str, Image.Image]:
    folder = path / IMAGES if (path / IMAGES).is_dir() else path
    missing = [image for image in emoji_images().values() if not (folder / image).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the {len(emoji_images())} pictures, such as {missing[0]}. Pass the "
            f"tarball {TARBALL}, or the folder `package` in it."
        )
    return {name: Image.open(folder / image).convert("RGBA") for name, image in emoji_images().items()}


def read_emoji(path: Path) -> dict[str, Image.Image]:
    """Read the picture of every emoji.

    Args:
        path (`Path`): The tarball of the npm package, the folder in it, or a folder with the files of `emoji.json`.

    Returns:
        `dict[str, PIL.Image.Image]`: RGBA pictures by name, without transparent margins.

    Raises:
        `FileNotFoundError`: If there is no such path, or pictures are missing in the folder.
        `ValueError`: If the tarball is not the one that the captions were made for.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; leave the option out to download the pictures")
    emoji = _read_folder(path) if path.is_dir() else _read_tarball(path)
    return {name: image.crop(image.getchannel("A").getbbox()) for name, image in emoji.items()}
