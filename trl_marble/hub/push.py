# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Push an adapter with its card to the Hub, and nothing else of its folder."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from ..evaluation.records import is_within
from .card_inputs import ACCESS_TOKEN, INPUTS_FILE, CardInputs, is_hub_id
from .model_card import build_model_card
from .slider import part_file


CARD_FILE = "README.md"
WEIGHTS = "pytorch_lora_weights*.safetensors"
# Pictures that a card can show. The card of an adapter that somebody else made must not publish any other file.
PICTURES = frozenset({".apng", ".avif", ".gif", ".jpeg", ".jpg", ".mp4", ".png", ".svg", ".webm", ".webp"})

# A Markdown image, with or without a title; and an HTML one.
_IMAGE = re.compile(r"!\[(?:\\.|[^\]\\])*\]\(\s*<?([^)\s>]+)>?[^)]*\)|<img\b[^>]*\bsrc=[\"']([^\"']+)[\"']")


def published_files(folder: str | os.PathLike) -> list[str]:
    """
    The files of a folder that are pushed to the Hub: the adapter, its parts where the card has some, the card, the
    pictures that the card shows, and `model_card.json`, from which the card is rendered. Logs, checkpoints and all
    other files stay local.

    Args:
        folder (`str` or `os.PathLike`):
            A trainer's output folder, or another folder with an adapter and its card.

    Returns:
        `list[str]`: paths relative to the folder, sorted, with `/` between their parts.

    Raises:
        `FileNotFoundError`: the folder has no adapter or no card, or lacks a part of the adapter or a picture that the
            card shows.
        `ValueError`: the card's metadata cannot be read, it shows a file that is not a picture, a file is outside the
            folder (possibly through a link), or a text contains an access token.
    """
    folder = Path(folder)
    weights = sorted(file.name for file in folder.glob(WEIGHTS))
    if not weights:
        raise FileNotFoundError(
            f"The folder {str(folder)!r} has no adapter (no {WEIGHTS}). Pass the output folder of a run, or the "
            "folder that `save_adapter` wrote to."
        )
    if not (folder / CARD_FILE).is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} has no {CARD_FILE}. Write one with `trainer.create_model_card()` or "
            "`trl_marble.hub.card_from_evaluations(folder, ...)`."
        )
    texts = [name for name in (CARD_FILE, INPUTS_FILE) if (folder / name).is_file()]
    _refuse_links([*weights, *texts], folder)
    parts = _parts(folder)
    _refuse_links(parts, folder)
    for name in texts:
        if ACCESS_TOKEN.search((folder / name).read_text(encoding="utf-8")):
            raise ValueError(f"{folder / name} contains an access token (hf_...). Remove it, and revoke the token.")
    return sorted({*weights, *parts, *texts, *_pictures(folder)})


def push_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload the adapter and its card",
) -> str:
    """
    Push an adapter with its card to the Hub.

    A card that nobody has edited by hand is rendered again with the name of the repository. Nothing is created on the
    Hub before the Hub has found the card's metadata valid.

    Args:
        folder (`str` or `os.PathLike`):
            The folder with the adapter and the card. Its [`published_files`] are uploaded. The card in the folder is
            the one that is pushed.
        repo_id (`str`):
            The repository, `"user/name"`. It is created if it does not exist.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        token (`str`, *optional*):
            An access token with write permission. Defaults to the one that `hf auth login` saved.
        commit_message (`str`, *optional*, defaults to `"Upload the adapter and its card"`):
            Title of the commit.

    Returns:
        `str`: the URL of the repository.

    Raises:
        `FileNotFoundError`: see [`published_files`].
        `ValueError`: `repo_id` is not a repository id, the Hub refuses the card's metadata, or as
            [`published_files`].
    """
    folder = Path(folder)
    if not is_hub_id(repo_id):
        raise ValueError(f"{repo_id!r} is not a repository id. Pass the owner and a name: 'user/name'.")
    published_files(folder)  # refuses before the card is changed
    _name_repository(folder, repo_id)
    try:
        ModelCard.load(folder / CARD_FILE).validate()
    except ValueError as error:
        raise ValueError(f"The Hub refuses the metadata at the head of {folder / CARD_FILE}: {error}") from error
    paths = published_files(folder)
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in paths]
    api.create_commit(repo_id, operations, commit_message=commit_message)
    return str(url)


def is_rendered_card(folder: str | os.PathLike) -> bool:
    """
    Whether a folder's `README.md` is a rendered card that nobody has edited.

    Args:
        folder (`str` or `os.PathLike`):
            A folder with a `README.md`.

    Returns:
        `bool`: whether the text is equal to the card that is rendered from the folder's `model_card.json`.

    Raises:
        `ValueError`: `model_card.json` is damaged.
    """
    folder = Path(folder)
    if not (folder / INPUTS_FILE).is_file():
        return False
    return str(build_model_card(CardInputs.load(folder))) == _read(folder / CARD_FILE)


def _name_repository(folder: Path, repo_id: str) -> None:
    """Render the card again with the repository's name, unless somebody has edited it."""
    if not is_rendered_card(folder):
        return
    inputs = CardInputs.load(folder)
    named = dataclasses.replace(inputs, repo_name=repo_id.split("/")[1], model_id=repo_id)
    named.save(folder)
    build_model_card(named).save(folder / CARD_FILE)


def _refuse_links(names: Sequence[str], folder: Path) -> None:
    for name in names:
        if not is_within(folder.resolve(), name):
            raise ValueError(f"{folder / name} is a link to a file outside the folder. Put the file itself there.")


def _parts(folder: Path) -> list[str]:
    """The files of the parts that the adapter was trained with, see [`CardInputs`]."""
    if not (folder / INPUTS_FILE).is_file():
        return []
    files = [part_file(name) for name in CardInputs.load(folder).parts]
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"The card explains the adapter {name!r}, which is not in {str(folder)!r}. Save it again with "
                "`trainer.save_model()`."
            )
    return files


def _pictures(folder: Path) -> list[str]:
    """The pictures in the folder that the card shows."""
    paths = [unquote(url) for url in _shown_urls(folder / CARD_FILE) if not urlparse(url).scheme]
    for path in paths:
        if not is_within(folder.resolve(), path):
            raise ValueError(f"The card shows {path!r}, which is outside {str(folder)!r}. Copy it into the folder.")
        if Path(path).suffix.lower() not in PICTURES:
            raise ValueError(f"The card shows {path!r}, which is not the name of a picture. Remove it from the card.")
        if not (folder / path).is_file():
            raise FileNotFoundError(f"The card shows {path!r}, which is not in {str(folder)!r}. Write the card again.")
    return [Path(path).as_posix() for path in paths]


def _shown_urls(file: Path) -> list[str]:
    """The pictures in a card's text and in the widget of its metadata."""
    try:
        card = ModelCard.load(file)
        urls = ["".join(groups) for groups in _IMAGE.findall(card.text)]
        outputs = [item.get("output", {}) for item in card.data.get("widget", [])]
        return urls + [output["url"] for output in outputs if "url" in output]
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata at the head of {file} cannot be read ({error}). Correct it, or write the card again."
        ) from error


def _read(file: Path) -> str:
    with file.open(encoding="utf-8", newline="") as opened:  # without conversion of line ends
        return opened.read()
