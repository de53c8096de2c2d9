# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The page shows every image with its scores, and a prompt is never markup."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from evaluation_helpers import made_results

from trl_marble.evaluation import compare_evaluations
from trl_marble.evaluation.contact_sheet import write_contact_sheet


ATTACK = """</h3><script>alert("x")</script><img src=x onerror='alert(1)'> {{ 7 * 7 }} & "quotes" '"""


class Page(HTMLParser):
    """The elements of a page, and the text of its headings."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "h3":
            self.headings.append(data.strip())

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def results(tmp_path):
    prompts = [ATTACK, ATTACK, "a cat", "a cat"]
    rewards = {"calm <i>": [0.1, 0.2, 0.3, 0.4], "reader": [float("nan")] * 2 + [2, 3]}
    return made_results(tmp_path / "base #1 & more", rewards, prompt=prompts, tag=["</option>"] * 2 + [None] * 2)


def test_prompts_are_text(results, tmp_path) -> None:
    page = Page(write_contact_sheet({"<u>": results}, tmp_path / "page.html"))
    assert len(page.of("script")) == 1 and not page.of("i") and not page.of("u")
    assert all("onerror" not in attributes for _, attributes in page.elements)
    first, second = page.of("article")
    assert first["data-prompt"] == ATTACK and first["data-tag"] == "</option>"
    assert "data-tag" not in second
    assert "a cat" in page.headings


def test_every_image_is_found_from_the_page_and_loaded_late(results, tmp_path) -> None:
    file = write_contact_sheet({"base": results}, tmp_path / "pages" / "page.html")
    images = Page(file).of("img")
    assert len(images) == 4
    for image, name in zip(images, results.table["image"], strict=True):
        assert (file.parent / unquote(image["src"])).resolve() == (results.folder / name).resolve()
        assert not image["src"].startswith(("/", "file:")) and "#" not in image["src"]
        assert image["loading"] == "lazy" and (image["width"], image["height"]) == ("16", "16")
    inside = Page(write_contact_sheet({"base": results}, results.folder / "page.html")).of("img")
    assert inside[0]["src"] == "images/0.png"


def test_rows_have_the_values_they_are_sorted_by(results, tmp_path) -> None:
    first, second = Page(write_contact_sheet({"base": results}, tmp_path / "page.html")).of("article")
    assert json.loads(first["data-keys"]) == [[pytest.approx(0.15), None, 0.25]]
    assert json.loads(second["data-keys"]) == [[pytest.approx(0.35), 2.5, 0.25]]


def test_a_comparison_shows_pairs_and_sorts_by_changes(results, tmp_path) -> None:
    prompts = results.table["prompt"].tolist()
    rewards = {"calm <i>": [0.2, 0.2, 0.1, 0.4], "reader": [float("nan")] * 2 + [2, 4]}
    after = made_results(tmp_path / "after", rewards, prompt=prompts, tag=results.table["tag"].tolist())
    compare_evaluations({"base": results, "ours": after}, tmp_path / "compared")
    file = tmp_path / "compared" / "contact_sheet.html"
    page = Page(file)
    sources = [unquote(image["src"]) for image in page.of("img")]
    assert sources[:2] == ["../base #1 & more/images/0.png", "../after/images/0.png"] and len(sources) == 8
    keys = [json.loads(row["data-keys"]) for row in page.of("article")]
    assert keys[0] == [[pytest.approx(0.05), None, 0]]
    assert keys[1] == [[pytest.approx(-0.1), 0.5, 0]]
    text = file.read_text()
    # Twice the root mean square of 0 and 1 has the full tint of 60%.
    assert '<span class="tinted up" style="--tint: 42%">+1.000</span>' in text
    assert ">+0.100</span>" in text and ">-0.200</span>" in text and "-0.000" not in text
