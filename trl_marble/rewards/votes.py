# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
The folder in which a run asks people, and people answer.

    groups/<id>/group.json, 0.png, 1.png, ...   a group of images that the run asks about
    votes/<id>.parquet                          the vote on it, with its images: a dataset

The id is a digest of the prompt and the pixels. Only the run writes and removes groups, only the page writes votes.
Both are written under another name and get their own when they are whole, so that nothing that is read is half
written. The first vote on a group gets the name, also where several servers of the page write into one folder. The
page hears that its vote is kept when it is on the disk, whatever is killed afterwards.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import Image as PILImage

from .http_client import encode_png


STARS = 5
GROUP_ID = re.compile(r"[0-9a-f]{64}")
# What file systems without hard links answer.
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
FEATURES = Features(
    {
        "prompt": Value("string"),
        "images": List(Image()),
        "best": Value("int32"),
        "worst": Value("int32"),
        "stars": List(Value("int32")),
        "step": Value("int64"),
        "time": Value("timestamp[ms, tz=UTC]"),
    }
)


@dataclass(frozen=True)
class Vote:
    """
    What a person said of a group. One who skipped it said nothing.

    Args:
        best, worst (`int`, *optional*):
            The places of the best and the worst image.
        stars (`list[int | None]`, *optional*):
            For each image 1 to 5 stars, or `None`.
    """

    best: int | None = None
    worst: int | None = None
    stars: list[int | None] | None = None

    def scores(self, num_images: int) -> list[float | None]:
        """
        One score per image. The best image has 1, the worst -1, the others 0. Of stars, 1 to 5 become -1 to 1, and an
        image without stars has `None`. A skipped group has `None` for all.
        """
        if self.stars is not None:
            return [None if stars is None else (2 * stars - STARS - 1) / (STARS - 1) for stars in self.stars]
        if self.best is None and self.worst is None:
            return [None] * num_images
        return [float(place == self.best) - float(place == self.worst) for place in range(num_images)]


def read_vote(content: Any, num_images: int) -> Vote:
    """
    The vote that a page sent.

    Args:
        content (`Any`):
            JSON: `{"best": 3, "worst": null}`, `{"stars": [5, null, 2, 1]}` or `{"skip": true}`.
        num_images (`int`):
            The number of images of the group.

    Raises:
        `ValueError`: If it is anything else.
    """
    keys = content.keys() if isinstance(content, dict) else None
    if keys == {"skip"} and content["skip"] is True:
        return Vote()
    if keys == {"best", "worst"}:
        best, worst = content["best"], content["worst"]
        given = [place for place in (best, worst) if place is not None]
        if given and best != worst and all(_is_within(place, 0, num_images - 1) for place in given):
            return Vote(best, worst)
    if keys == {"stars"} and isinstance(content["stars"], list) and len(content["stars"]) == num_images:
        stars = content["stars"]
        given = [number for number in stars if number is not None]
        if given and all(_is_within(number, 1, STARS) for number in given):
            return Vote(stars=stars)
    raise ValueError(
        f"A vote on {num_images} images is the best and the worst image (from 0 on, two different ones, one may be "
        f"null), stars from 1 to {STARS} (or null) for each image, or a skip; this is {str(content)[:100]!r}."
    )


def _is_within(number: Any, low: int, high: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and low <= number <= high


def group_id(images: Sequence[PILImage], prompt: str) -> str:
    """A digest of a prompt and the pixels of its images, which are in RGB."""
    digest = hashlib.sha256(json.dumps(prompt).encode())  # in ASCII, which any text has
    for image in images:
        digest.update(str(image.size).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


class VoteFolder:
    """
    Groups to vote on, and the votes.

    Args:
        folder (`str` or `os.PathLike`):
            The folder. Nothing is made before it is needed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).absolute()
        self._groups, self._votes = self.folder / "groups", self.folder / "votes"

    def create(self) -> None:
        """Make the folder, if it is not there."""
        self._groups.mkdir(parents=True, exist_ok=True)
        self._votes.mkdir(exist_ok=True)

    @property
    def exists(self) -> bool:
        """Whether a run has made the folder."""
        return self._groups.is_dir()

    # ---- What the run does ----

    def ask(self, group: str, images: Sequence[PILImage], prompt: str, step: int | None) -> None:
        """Show a group to people; if it is shown already, nothing changes."""
        if (self._groups / group).is_dir():
            return
        unfinished = self._groups / f".{group}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for place, image in enumerate(images):
            (unfinished / f"{place}.png").write_bytes(encode_png(image))
        prompt = prompt.encode("utf-8", errors="replace").decode()  # half of a surrogate pair cannot be sent or kept
        content = {"prompt": prompt, "num_images": len(images), "step": step, "time": time.time()}
        (unfinished / "group.json").write_text(json.dumps(content))
        unfinished.rename(self._groups / group)

    def vote_on(self, group: str) -> Vote | None:
        """The vote on a group, `None` if nobody voted yet."""
        file = self._vote_file(group)
        if not file.is_file():
            return None
        (row,) = pq.read_table(file, columns=["best", "worst", "stars"]).to_pylist()
        return Vote(**row)

    def withdraw(self, group: str) -> None:
        """Do not show a group any more. The vote on it stays."""
        shutil.rmtree(self._groups / group, ignore_errors=True)

    def withdraw_older(self, moment: float) -> None:
        """Do not show the groups any more that were asked before a moment, by runs that were killed."""
        for group, content in self._read_groups().items():
            if content["time"] < moment:
                self.withdraw(group)

    # ---- What the page does ----

    def shown(self) -> dict[str, dict[str, Any]]:
        """The groups that are shown, in the order of asking: id -> prompt, number of images, step, and `voted`."""
        groups = sorted(self._read_groups().items(), key=lambda item: item[1]["time"])
        return {group: content | {"voted": self._vote_file(group).is_file()} for group, content in groups}

    def image(self, group: str, place: int) -> bytes:
        """
        An image of a group that is shown, as a PNG file.

        Raises:
            `FileNotFoundError`: If there is no such image, or the run waits no more.
        """
        if not 0 <= place < self._asked(group)["num_images"]:  # of any size: it becomes part of a path
            raise FileNotFoundError(f"The group {group} has no image {place}.")
        return (self._groups / group / f"{place}.png").read_bytes()

    def keep(self, group: str, content: Any) -> None:
        """
        Keep a vote, which is on the disk when this returns.

        Args:
            group (`str`):
                The id of a group that is shown.
            content (`Any`):
                What the page sent, see [`read_vote`].

        Raises:
            `FileNotFoundError`: If the run waits for this vote no more.
            `FileExistsError`: If somebody has voted on the group.
            `ValueError`: If it is no vote.
        """
        asked = self._asked(group)
        vote = read_vote(content, asked["num_images"])
        self._check_no_vote(group)
        row: Mapping[str, Any] = {
            "prompt": asked["prompt"],
            "images": [{"bytes": self.image(group, place), "path": None} for place in range(asked["num_images"])],
            **vars(vote),
            "step": asked["step"],
            "time": datetime.now(UTC).replace(microsecond=0),
        }
        # Another server of the page may write a vote on the same group at this moment.
        unfinished = self._votes / f".{group}.{secrets.token_hex(8)}.tmp"
        try:
            with unfinished.open("xb") as file:
                rows = Dataset.from_dict({name: [value] for name, value in row.items()}, features=FEATURES)
                pq.write_table(rows.data.table, file)
                file.flush()
                os.fsync(file.fileno())
            self._name_vote(unfinished, group)
        finally:
            unfinished.unlink(missing_ok=True)

    def _name_vote(self, unfinished: Path, group: str) -> None:
        """Give a vote that is whole its name, unless there is one."""
        try:
            os.link(unfinished, self._vote_file(group))
        except OSError as error:
            self._check_no_vote(group)
            if error.errno not in NO_HARD_LINKS:
                raise
            # A USB stick, some network folders: two votes within the same moment may both count as kept, the last is.
            unfinished.replace(self._vote_file(group))

    def _check_no_vote(self, group: str) -> None:
        if self._vote_file(group).exists():
            raise FileExistsError(f"There is a vote on {group}.")

    def _asked(self, group: str) -> dict[str, Any]:
        """What is asked about a group that is shown: prompt, number of images, step and time."""
        return json.loads((self._groups / group / "group.json").read_text())

    def _vote_file(self, group: str) -> Path:
        return self._votes / f"{group}.parquet"

    def _read_groups(self) -> dict[str, dict[str, Any]]:
        """The groups that are shown; one that is withdrawn at this moment is left out."""
        found = {}
        for path in self._groups.iterdir():
            if GROUP_ID.fullmatch(path.name):
                try:
                    found[path.name] = self._asked(path.name)
                except FileNotFoundError:
                    continue
        return found
