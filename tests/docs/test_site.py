# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The site: it builds without a warning, needs nothing from elsewhere, and has every public name once."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import griffe
import pytest


ROOT = Path(__file__).parents[2]
DOCUMENTED = re.compile(r"^::: (?P<path>[\w.]+)$", re.MULTILINE)


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    return folder


class Resources(HTMLParser):
    """What a page loads by itself, and the MathML in it."""

    def __init__(self):
        super().__init__()
        self.loaded = []
        self.formulas = 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.loaded.append(attributes.get("src"))
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(attributes.get("href"))
        self.formulas += tag == "math"


def read(page):
    resources = Resources()
    resources.feed(page.read_text(encoding="utf-8"))
    return resources


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        for address in filter(None, read(page).loaded):
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
            if not address.startswith("data:"):
                assert (page.parent / address.partition("?")[0]).is_file(), f"{page.name} lacks {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_formulas_are_drawn_without_scripts(site):
    pages = list(site.rglob("*.html"))
    assert sum(read(page).formulas for page in pages) >= 5
    for page in pages:
        assert "arithmatex" not in page.read_text(encoding="utf-8"), page.name


def test_the_readme_is_the_home_page_and_its_links_stay_on_the_site(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="rewards.html"' in home and 'href="repository/CONTRIBUTING.html"' in home
    assert 'src="images/before_after.png"' in home
    script = (site / "repository" / "examples" / "scripts" / "sd3_five_rewards.py.html").read_text(encoding="utf-8")
    assert "ScriptArguments" in script


def test_a_notebook_is_a_page_with_its_pictures_and_links(site):
    page = (site / "repository" / "examples" / "notebooks" / "shapeworld.ipynb.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/') >= 4 and "<table" in page
    assert 'href="../../../shapeworld.html"' in page


def test_a_reference_page_links_types_ours_and_others(site):
    page = (site / "api" / "trainer.html").read_text(encoding="utf-8")
    assert 'href="https://huggingface.co/docs/datasets/package_reference/main_classes#datasets.Dataset"' in page
    assert re.search(r'href="rewards\.html#trl_marble\.rewards\.RewardFunc"', page)
    assert 'id="trl_marble.MarbleNFTTrainer.reward_funcs"' in page
    assert 'id="trl_marble.MarbleConfig.num_generations"' in page
    assert "Parameters that control the rollouts" in page and "&gt; Parameters" not in page


CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)


def test_tables_show_no_escapes(site):
    cells = {page: CELL.findall(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert sum(map(len, cells.values())) > 500
    assert [cell for found in cells.values() for cell in found if "\\|" in cell] == []


def test_a_bar_in_the_code_of_a_table_is_drawn():
    tool = load_tool("site")
    drawn = tool.on_page_content(r"<tr><td><code>a\|b</code></td></tr><code>c\|d</code>", None, None, None)
    assert drawn == r"<tr><td><code>a|b</code></td></tr><code>c\|d</code>"


def test_search_works_from_disk(site):
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8").removeprefix("var __index = ")
    locations = {entry["location"] for entry in json.loads(index)["docs"]}
    assert {"index.html", "pipelines.html", "api/trainer.html"} <= locations
    for page in site.rglob("*.html"):
        if page.name != "404.html":
            text = page.read_text(encoding="utf-8")
            # Before the script of the theme, which starts the worker.
            assert 0 < text.index("javascripts/iframe-worker.js") < text.index("javascripts/bundle."), page


def test_the_page_for_what_is_not_found_leads_to_every_page_of_the_navigation(site):
    page = (site / "404.html").read_text(encoding="utf-8")
    # A server shows it at any address, so addresses count from the root of the site; from disk there is no such root.
    assert '<base href="/">' in page and 'querySelector("base").remove()' in page
    addresses = re.findall(r'<a href="([^"]+)"', page)
    assert {"index.html", "quickstart.html", "api/trainer.html"} <= set(addresses)
    assert [address for address in addresses if not (site / address).is_file()] == []
    assert '<form action="index.html">' in page and 'name="q"' in page


def test_every_public_name_is_documented_once():
    package = griffe.load("trl_marble", search_paths=[str(ROOT)])
    public = set(load_tool("hf_docstrings").public_paths(package).values())
    pages = (page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    documented = Counter(match["path"] for page in pages for match in DOCUMENTED.finditer(page))
    assert sorted(public - documented.keys()) == [], "public, but on no page"
    assert sorted(documented.keys() - public) == [], "on a page, but not public"
    assert [name for name, number in documented.items() if number > 1] == []


LINKS = {
    "[a](docs/rewards.md#the-protocol)": ("README.md", "[a](rewards.md#the-protocol)"),
    "![p](docs/images/balance.png)": ("README.md", "![p](images/balance.png)"),
    "[c](CONTRIBUTING.md)": ("README.md", "[c](repository/CONTRIBUTING.md)"),
    "[s](../trl_marble/rewards/jpeg.py)": ("docs/rewards.md", "[s](repository/trl_marble/rewards/jpeg.py.md)"),
    "[h](../README.md)": ("docs/rewards.md", "[h](index.md)"),
    "[r](README.md)": ("CONTRIBUTING.md", "[r](../index.md)"),
    "[n](https://example.org/docs/rewards.md)": ("README.md", "[n](https://example.org/docs/rewards.md)"),
    "[gone](docs/no-such-page.md)": ("README.md", "[gone](docs/no-such-page.md)"),
    "```python\nx = a[0](docs/rewards.md)\n```": ("README.md", "```python\nx = a[0](docs/rewards.md)\n```"),
}


@pytest.mark.parametrize("markdown", LINKS)
def test_links_of_the_repository_become_links_of_the_site(markdown):
    path, expected = LINKS[markdown]
    assert load_tool("site").rewrite_links(markdown, path) == expected


@pytest.mark.parametrize(
    "tex", [r"\operatorname*{arg\,min}_a x", r"\foo", r"\boldsymbol{g}", r"\begin{aligned} a &= b \end{aligned}"]
)
def test_a_formula_that_would_be_drawn_wrong_is_refused(tex):
    with pytest.raises(ValueError, match="cannot be drawn"):
        load_tool("site").draw_formula(tex, display=True)
