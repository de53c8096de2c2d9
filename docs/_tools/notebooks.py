# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Notebooks as Markdown, with their stored outputs."""

import json
import re


TABLE = re.compile(r"<table.*?</table>", re.DOTALL)


def notebook_to_markdown(text: str) -> str:
    """
    A notebook as a page.

    Args:
        text (`str`):
            Content of an `.ipynb` file.

    Returns:
        `str`: Markdown: the texts as they stand, the code, and below it the pictures, tables and texts that it shows.
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(_fenced(source, "python"))
            parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _output(output: dict) -> str:
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]), "text")
    data = {kind: "".join(value) for kind, value in output["data"].items()}
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            picture = data[kind].replace("\n", "")
            return f"![Output of the cell above](data:{kind};base64,{picture})"
    if table := TABLE.search(data.get("text/html", "")):
        return re.sub("<table.*?>", "<table>", table[0], count=1)  # in the style of the other tables
    return _fenced(data["text/plain"], "text")


def _fenced(text: str, language: str) -> str:
    fence = "`" * 6
    return f"{fence} {language}\n{text.rstrip()}\n{fence}"
