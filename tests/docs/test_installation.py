# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How the package and what it needs are said to be installed works, and what it is said to train is what it trains."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trl_marble.cli.main import DESCRIPTION
from trl_marble.extras import EXTRAS


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS = sorted((ROOT / "examples" / "scripts").glob("*.py"))
HEADER = re.compile(r"^# /// script\n(?P<lines>(?:#.*\n)*?)# ///$", re.MULTILINE)


def texts():
    """What users read: documents, examples, cards, and the package's own words."""
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pyproject.toml", "mkdocs.yml"))
    for folder in ("docs", "examples", "model_cards", "trl_marble"):
        for suffix in ("md", "py", "ipynb", "yaml"):
            yield from (ROOT / folder).rglob(f"*.{suffix}")


def found(pattern):
    return [(path.name, text) for path in texts() for text in re.findall(pattern, path.read_text(encoding="utf-8"))]


def test_nothing_tells_to_install_the_package_by_name():
    assert len(list(texts())) > 100
    assert found(r"pip3? install[^`\n]*trl[_-]marble.*") == []
    assert len(found(r"pip install \"?\.")) >= 3


def test_the_extras_that_error_messages_name_install_what_is_missing():
    for extra, modules in EXTRAS.items():
        assert set(modules) <= {Requirement(text).name for text in PROJECT["optional-dependencies"][extra]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_header_of_a_script_finds_the_package(script):
    lines = HEADER.search(script.read_text(encoding="utf-8"))["lines"].splitlines()
    header = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))
    assert header["requires-python"] == PROJECT["requires-python"]
    (package,) = (r for r in map(Requirement, header["dependencies"]) if r.name == PROJECT["name"])
    assert package.extras <= set(PROJECT["optional-dependencies"])
    source = script.parent / header["tool"]["uv"]["sources"][PROJECT["name"]]["path"]
    assert source.resolve() == ROOT


def test_only_flow_matching_is_claimed():
    assert found(r"(?i)diffusion (?:and|or) flow[- ]matching") == []
    head = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[0]
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nsite_url")[0]
    for text in (head, site, DESCRIPTION, PROJECT["description"]):
        assert "flow-matching pipeline" in text and "SD3.5, Flux, Qwen-Image, Wan" in text


def test_the_readme_begins_with_what_was_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 0 < readme.index("**Status:**") < readme.index("![") < readme.index("\n## ")
