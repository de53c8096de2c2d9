# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompts in the form of conversations, as in TRL's trainers of language models."""

import warnings
from collections.abc import Sequence
from typing import Any


def plain_prompts(prompts: Sequence[Any], name: str) -> list[Any]:
    """
    Take the last user message of each conversation as the prompt.

    Warns if conversations have other messages, which no pipeline reads.

    Args:
        prompts (`Sequence`):
            The prompts. A conversation is a list of `{"role": ..., "content": ...}`, whose content is text or a list
            of parts (`{"type": "text", "text": ...}`). Prompts that are not conversations stay as they are.
        name (`str`):
            The name of the dataset in messages.

    Raises:
        `ValueError`: If a conversation has no message of the user, or the last one has parts other than text.
    """
    plain = []
    longer = 0
    for row, prompt in enumerate(prompts):
        if is_conversation(prompt):
            longer += len(prompt) > 1
            prompt = _last_user_message(prompt, f"Row {row} of `{name}`")
        plain.append(prompt)
    if longer:
        warnings.warn(
            f"{longer} of the {len(plain)} prompts of `{name}` are conversations with several messages. The last "
            "message of the user is the prompt; system prompts and other turns are left out.",
            stacklevel=3,
        )
    return plain


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    )


def _last_user_message(messages: list[dict[str, Any]], where: str) -> str:
    contents = [message["content"] for message in messages if message["role"] == "user"]
    if not contents:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(
            f"{where} is a conversation without a message of the user (its roles are {roles}), which would be the "
            "prompt. Remove the row, or make its prompt a string."
        )
    content = contents[-1]
    if not isinstance(content, list):
        return content
    return " ".join(filter(None, [_text(part, where) for part in content]))


def _text(part: Any, where: str) -> str:
    """The text of a part of a message; empty for the place of an image, which comes from a column."""
    if isinstance(part, dict):
        given = {key for key, value in part.items() if value is not None}
        if part.get("type") == "text" and given == {"type", "text"}:
            return part["text"]
        if part.get("type") == "image" and given == {"type"}:
            return ""
    raise ValueError(
        f"{where} has {str(part)[:80]} in the last message of the user; only text can be a prompt. Put images that "
        "are to be edited into a column `image`."
    )
