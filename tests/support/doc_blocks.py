# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The code blocks of the documents."""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
# What is executed or checked, and what is only shown.
CHECKED = ("python", "bash", "yaml")
SHOWN = ("text", "bibtex", "mermaid")

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<info>[^`]*)$")
TITLE = re.compile(r'\btitle="(?P<title>[^"]+)"')
DIRECTIVE = re.compile(r"^ *<!-- doctest: (?P<directive>.*?) -->$")


@dataclass(frozen=True)
class Block:
    """
    A fenced block.

    Args:
        page (`str`):
            Path of the page in the repository.
        line (`int`):
            The line of its first line of code.
        language (`str`):
            The first word after the fence; empty if there is none.
        code (`str`):
            What is between the fences.
        title (`str`, *optional*):
            Name of the file that it shows, from ``python title="my_rewards.py"``.
        alone (`bool`, *optional*, defaults to `False`):
            Whether the names of earlier blocks of the page are not its own: `<!-- doctest: alone -->` stands above it.
    """

    page: str
    line: int
    language: str
    code: str
    title: str | None = None
    alone: bool = False


def pages() -> list[str]:
    """The README and every document, as paths in the repository."""
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *found]


def read_blocks(page: str) -> list[Block]:
    """
    The blocks of a page.

    Args:
        page (`str`):
            Its path in the repository.

    Raises:
        `ValueError`: If a block does not end, a directive is not known, or stands above no block.
    """
    return parse_blocks((ROOT / page).read_text(encoding="utf-8"), page)


def parse_blocks(markdown: str, page: str) -> list[Block]:
    """The blocks of a text, see [`read_blocks`]."""
    lines = markdown.splitlines()
    blocks: list[Block] = []
    directive: str | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if match := DIRECTIVE.match(line):
            if match["directive"] != "alone":
                raise ValueError(f"{page}:{number}: there is no `doctest: {match['directive']}`, only `alone`.")
            directive = match["directive"]
            continue
        match = FENCE.match(line)
        if match is None:
            if directive is not None and line.strip():
                raise ValueError(f"{page}:{number}: `doctest: {directive}` must stand right above a block.")
            continue
        start = number
        while number < len(lines) and lines[number].strip() != match["fence"]:
            number += 1
        if number == len(lines):
            raise ValueError(f"{page}:{start}: this block has no end.")
        indent = len(match["indent"])
        code = "".join(each[indent:] + "\n" for each in lines[start:number])
        number += 1
        language, _, attributes = match["info"].strip().partition(" ")
        title = TITLE.search(attributes)
        blocks.append(Block(page, start + 1, language, code, title["title"] if title else None, directive is not None))
        directive = None
    return blocks
