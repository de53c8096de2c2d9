# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Texts without what tells of a machine's user."""

import getpass
import re


PATH = re.compile(r"(?<![\w./:-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`,;:()\[\]]+){2,}")
TOKEN = re.compile(r"\b(?:hf|sk|ghp|wandb)_?[A-Za-z0-9]{16,}")
LONGEST = 300


def anonymous(text: str) -> str:
    """
    A text in one line, without folders, tokens and the user's name.

    Args:
        text (`str`):
            Such as the message of an error.

    Returns:
        `str`: Of paths only the name of the file is left.
    """
    text = PATH.sub(lambda found: re.split(r"[/\\]", found[0])[-1], " ".join(text.split()))
    text = TOKEN.sub("TOKEN", text)
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user without a name, as in some containers
        name = ""
    if name:
        text = re.sub(rf"\b{re.escape(name)}\b", "USER", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
