# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What `push_adapter` uploads to a Hub, and what it refuses before it creates a repository."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from adapter_helpers import FILE, add_trained_adapter
from local_hub import TOKEN, local_hub
from PIL import Image

from trl_marble.hub import (
    CardInputs,
    GalleryItem,
    RewardRow,
    build_model_card,
    published_files,
    push_adapter,
    save_adapter,
)


PUBLISHED = ["README.md", "images/a b.png", "model_card.json", FILE]


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path):
    """An adapter with its card, next to private files."""
    folder = tmp_path / "run"
    pipeline = tiny.tiny_sd3(num_layers=1)
    add_trained_adapter(pipeline)
    save_adapter(pipeline, folder)
    picture(folder / "images" / "a b.png")
    inputs = CardInputs("run", [RewardRow("bright", 0.1, 0.2)], gallery=[GalleryItem("images/a b.png", "a dog")])
    inputs.save(folder)
    build_model_card(inputs).save(folder / "README.md")
    for private in ("checkpoint-1/optimizer.pt", "runs/events.out.tfevents.1", "images/step_1.png", "scores.csv"):
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("private")
    return folder


def edited(folder: Path, text: str) -> None:
    with (folder / "README.md").open("a") as card:
        card.write(text)


# Several calls in one process: each line is a folder, a repository and options.
PUSH = """
import json, sys
from trl_marble.hub import push_adapter

for folder, repository, options in json.loads(sys.argv[1]):
    try:
        print("URL", push_adapter(folder, repository, **options))
    except (ValueError, OSError) as error:
        print("REFUSED", type(error).__name__, " ".join(str(error).split()))
"""


@pytest.mark.slow
def test_the_adapter_its_card_and_its_pictures_are_pushed_and_nothing_else(folder, tmp_path):
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    for path in ("README.md", FILE, "model_card.json", "images/a b.png"):
        (by_hand / path).parent.mkdir(exist_ok=True)
        (by_hand / path).write_bytes((folder / path).read_bytes())
    edited(by_hand, "\nA note of mine.\n")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / FILE).write_bytes((folder / FILE).read_bytes())
    (bad / "README.md").write_text("---\nbase_model: /home/someone/model\n---\n# Bad\n")
    calls = [
        (str(folder), "me/first", {}),
        (str(folder), "me/first", {"commit_message": "Again"}),
        (str(folder), "me/second", {"private": True}),
        (str(by_hand), "me/by-hand", {"token": TOKEN}),
        (str(bad), "me/bad", {}),
    ]
    with local_hub() as hub:
        output = hub.run(PUSH, json.dumps(calls), home=tmp_path / "home").stdout.splitlines()
        urls = [line for line in output if line.startswith(("URL", "REFUSED"))]
        assert urls[:4] == [f"URL {hub.url}/me/{name}" for name in ("first", "first", "second", "by-hand")]
        # Refused by the Hub's own rules, before there was a repository.
        assert (
            urls[4].startswith("REFUSED ValueError")
            and "refuses the metadata" in urls[4]
            and "me/bad" not in hub.files
        )
        assert hub.commits["me/first"] == ["Upload the adapter and its card", "Again"]
        assert hub.private == {"me/first": False, "me/second": True, "me/by-hand": False}
        for name in ("first", "second", "by-hand"):
            assert sorted(hub.files[f"me/{name}"]) == PUBLISHED
            assert hub.files[f"me/{name}"][FILE] == (folder / FILE).read_bytes()
            for content in hub.files[f"me/{name}"].values():
                assert TOKEN.encode() not in content and str(tmp_path).encode() not in content
        # The card is rendered again with the repository's name, unless somebody has edited it.
        for name in ("first", "second"):
            card = hub.text(f"me/{name}", "README.md")
            assert f"# {name}\n" in card and f'load_lora_weights("me/{name}")' in card
            assert json.loads(hub.text(f"me/{name}", "model_card.json"))["model_id"] == f"me/{name}"
        assert hub.text("me/by-hand", "README.md") == (by_hand / "README.md").read_text()
        assert "# run\n" in hub.text("me/by-hand", "README.md") and "A note of mine." in hub.text(
            "me/by-hand", "README.md"
        )


def test_pictures_of_edited_cards(folder):
    (folder / "model_card.json").unlink()
    picture(folder / "plots" / "html.png")
    picture(folder / "plots" / "titled.png")
    edited(
        folder,
        '\n<img width="3" src="plots/html.png"> ![a \\] b](plots/titled.png "title") ![far](https://example.com/a.png)\n',
    )
    assert published_files(folder) == ["README.md", "images/a b.png", "plots/html.png", "plots/titled.png", FILE]


def test_several_weight_files_go_together(folder):
    (folder / "pytorch_lora_weights_old.safetensors").write_bytes((folder / FILE).read_bytes())
    assert "pytorch_lora_weights_old.safetensors" in published_files(folder)


# ---- What is refused, without asking a Hub ----


@pytest.mark.parametrize("repo_id", ["name", "me/", "https://huggingface.co/me/name", "../name"])
def test_refuses_names_that_are_not_repository_ids(folder, repo_id):
    with pytest.raises(ValueError, match="is not a repository id. Pass the owner and a name"):
        push_adapter(folder, repo_id)


def test_a_folder_without_an_adapter_or_a_card(folder):
    (folder / FILE).rename(folder / "weights.bin")
    with pytest.raises(FileNotFoundError, match="has no adapter"):
        push_adapter(folder, "me/name")
    (folder / "weights.bin").rename(folder / FILE)
    (folder / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="has no README.md. Write one"):
        push_adapter(folder, "me/name")


def test_a_picture_that_is_missing_or_outside_the_folder(folder, tmp_path):
    before = (folder / "README.md").read_bytes()
    (folder / "images" / "a b.png").rename(tmp_path / "secret.png")
    with pytest.raises(FileNotFoundError, match="The card shows 'images/a b.png', which is not in"):
        push_adapter(folder, "me/name")
    (folder / "images" / "a b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="is outside"):
        push_adapter(folder, "me/name")
    assert (folder / "README.md").read_bytes() == before
    (folder / "images" / "a b.png").unlink()
    picture(folder / "images" / "a b.png")
    edited(folder, "\n![s](../secret.png)\n")
    with pytest.raises(ValueError, match="'../secret.png', which is outside"):
        push_adapter(folder, "me/name")


@pytest.mark.parametrize("metadata", ["tags: 3", "a: [", "widget: 7", "widget: [3]", "- a list"])
def test_metadata_that_cannot_be_read(folder, metadata):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Bad\n")
    with pytest.raises(ValueError, match="metadata at the head of .* cannot be read"):
        push_adapter(folder, "me/name")


def test_an_access_token_in_the_card(folder):
    edited(folder, "\nUse hf_" + "aB3" * 10 + "\n")
    with pytest.raises(ValueError, match="README.md contains an access token"):
        push_adapter(folder, "me/name")
