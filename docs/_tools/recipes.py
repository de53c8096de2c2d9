# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Write what a recipe costs into its head, below the line that says so: python docs/_tools/recipes.py"""

import re
import shlex
from pathlib import Path

from trl_marble.cli.estimate import describe, read_settings


FOLDER = Path(__file__).resolve().parents[2] / "examples" / "configs"
ASKED = re.compile(r"^# What `trl-marble estimate (?P<options>.*)` says of it:$")
WIDTH = 119


def recipes() -> list[Path]:
    """The files, in order."""
    return sorted(FOLDER.glob("*.yaml"))


def updated(recipe: Path) -> str:
    """The file with what it costs now, in place of what it said."""
    lines = recipe.read_text().splitlines()
    found = [(number, match) for number, line in enumerate(lines) if (match := ASKED.match(line))]
    (number, match) = found[0]  # each has one such line
    rest = lines[number + 1 :]
    while rest and rest[0].startswith("#   "):
        del rest[0]
    words = ["--config", str(recipe), *shlex.split(match["options"])]
    says = [f"#   {line}" for text in describe(*read_settings(words)) for line in _wrapped(text)]
    return "\n".join([*lines[: number + 1], *says, *rest]) + "\n"


def _wrapped(text: str) -> list[str]:
    """Lines of a comment, those after the first indented."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > WIDTH - 4:
            lines.append("  " + word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


if __name__ == "__main__":
    for path in recipes():
        path.write_text(updated(path))
