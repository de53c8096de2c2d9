# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Hooks of mkdocs: the repository's Markdown, written to be read in the repository, as a site.

The README is the home page. A link to a file outside of `docs/` leads to a page made of that file, so that the site
needs no other host. Formulas become MathML, which browsers draw themselves.
"""

import html
import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads this file alone

from notebooks import notebook_to_markdown  # noqa: E402


logger = get_plugin_logger("site")

ROOT = Path(__file__).resolve().parents[2]
HOME = "README.md"
NOTEBOOKS = ("examples/notebooks/shapeworld.ipynb",)  # in the navigation, whether or not a page leads to them
LANGUAGES = {
    ".ipynb": "json",
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".md": "markdown",
    ".toml": "toml",
    ".sh": "bash",
    "": "text",
}
PICTURES = (".png", ".jpg", ".svg")
TEXTS = (".md", ".ipynb")  # what has links; all else is shown as code

FENCED = re.compile(r"(^ *(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence)$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)(?P<rest>[^)]*)\)")
CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def site_path(path: str) -> str:
    """
    Where a file of the repository is on the site.

    Args:
        path (`str`):
            Path in the repository.

    Returns:
        `str`: path of its source in the site: the name of a Markdown file, or of a picture.
    """
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith((".md", *PICTURES)) else f"repository/{path}.md"


def linked_files(markdown: str, path: str) -> list[str]:
    """
    The files that a page leads to.

    Args:
        markdown (`str`):
            The page.
        path (`str`):
            Its path in the repository.

    Returns:
        `list[str]`: paths in the repository of files that exist.
    """
    targets = (match["target"] for prose in _prose(markdown) for match in LINK.finditer(prose))
    return [found for target in targets if (found := _in_repository(target, path))]


def rewrite_links(markdown: str, path: str) -> str:
    """
    A page of the repository with its links as the site needs them.

    Args:
        markdown (`str`):
            The page.
        path (`str`):
            Its path in the repository.
    """
    here = posixpath.dirname(site_path(path))

    def replace(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        found = _in_repository(target, path)
        if found is None:
            return match[0]
        relative = posixpath.relpath(site_path(found), here or ".")
        return f"]({relative}{'#' + anchor if anchor else ''}{match['rest']})"

    return "".join(
        part if index % 2 else LINK.sub(replace, part) for index, part in enumerate(_split_fences(markdown))
    )


def _in_repository(target: str, path: str) -> str | None:
    """Path in the repository of the file that a link on a page leads to; `None` if it leads to no file."""
    target = target.partition("#")[0]
    if not target or "://" in target or target.startswith(("mailto:", "data:", "/")):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return found if not found.startswith("..") and (ROOT / found).is_file() else None


def _split_fences(markdown: str) -> list[str]:
    """A page in pieces; those at odd places are fenced code."""
    pieces, end = [], 0
    for match in FENCED.finditer(markdown):
        pieces += [markdown[end : match.start()], match[0]]
        end = match.end()
    return [*pieces, markdown[end:]]


def _prose(markdown: str) -> list[str]:
    return _split_fences(markdown)[::2]


def _page_of(path: str) -> str:
    """The Markdown of a page that is made of a file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return notebook_to_markdown(text)
    return f"# {path}\n\n`````` {{ .{LANGUAGES[Path(path).suffix]} }}\n{text}\n``````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the notebooks, and every file outside of `docs/` that a page leads to."""
    waiting = [HOME, *NOTEBOOKS] + [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in done:
            continue
        done.add(path)
        if not path.startswith("docs/"):
            if path.endswith(PICTURES):
                files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
            else:
                files.append(File.generated(config, site_path(path), content=_page_of(path)))
        if path.endswith(TEXTS):
            waiting += linked_files(_page_of(path), path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to pages of the site."""
    uri = page.file.src_uri
    if uri == "index.md":
        path = HOME
    elif uri.startswith("repository/"):
        path = uri.removeprefix("repository/")
        if not (ROOT / path).is_file():
            path = path.removesuffix(".md")  # the name of a page made of another file
        if not path.endswith(TEXTS):
            return markdown
    else:
        path = f"docs/{uri}"
    return rewrite_links(markdown, path)


def draw_formula(tex: str, display: bool) -> str:
    """
    A formula as MathML.

    Args:
        tex (`str`):
            LaTeX.
        display (`bool`):
            Whether it stands on a line of its own.

    Raises:
        `ValueError`: If it uses what latex2mathml does not know, or what browsers do not draw.
    """
    drawn = convert(tex, display="block" if display else "inline")
    if "\\operatorname*" in tex:
        unknown = ["\\operatorname*; use \\underset{...}{\\operatorname{...}}"]
    elif 'mathvariant="bold' in drawn:
        unknown = ["bold letters, which browsers draw thin"]
    else:
        unknown = re.findall(r"\\\w+|<mi>&(?:amp;)?</mi>", drawn)  # the last: aligned columns, use {align}
    if unknown:
        raise ValueError(f"the formula {tex.strip()!r} has what cannot be drawn: {', '.join(unknown)}")
    return drawn


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the formulas of a page, and the `|` of its tables, which Python-Markdown leaves escaped in code."""

    def replace(match: re.Match[str]) -> str:
        try:
            return draw_formula(html.unescape(match["tex"]), display=match["tag"] == "div")
        except ValueError as error:
            logger.warning(f"{page.file.src_uri}: {error}")
            return match[0]

    content = CELL.sub(lambda cell: cell[0].replace("\\|", "|"), content)
    return FORMULA.sub(replace, content)
