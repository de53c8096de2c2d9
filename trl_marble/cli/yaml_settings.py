# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""YAML files of settings, whose values are read as they are written: what they mean is said by the option's type."""

import re
from typing import Any

import yaml


NULLS = ("", "~", "null", "Null", "NULL")
_INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


class Plain(str):
    """A value that stands without quotes, as it is written: `007`, `no` and `1e-3` are text until a type is known."""


class TextLoader(yaml.SafeLoader):
    """
    Builds nothing but mappings, lists, text and `None` (for a value that is missing, `~` or `null`).

    YAML 1.1 would make `True` or `False` of `yes`, `no`, `on` and `off`, another number of `0512` and `1:30`, text of
    `1e-3`, and a date of `2026-01-02`. Refused are aliases, a few lines of which can stand for a billion values; tags;
    and keys that stand twice, of which the first would be lost.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"`*{event.anchor}` is an alias; write the value itself", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Nothing: `<<` is a key like any other."""

    def _read_scalar(self, node: Any) -> str | None:
        if node.style is not None:
            return str(node.value)
        return None if node.value in NULLS else Plain(node.value)

    def _refuse_tag(self, node: Any) -> None:
        raise yaml.constructor.ConstructorError(
            None, None, f"the tag `{node.tag}` is not read; write the value itself", node.start_mark
        )


TextLoader.yaml_constructors = {
    "tag:yaml.org,2002:str": TextLoader._read_scalar,
    "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
    "tag:yaml.org,2002:map": yaml.SafeLoader.construct_yaml_map,
    None: TextLoader._refuse_tag,
}


def read_boolean(text: str) -> bool | None:
    """
    A truth value as YAML writes it.

    Args:
        text (`str`):
            Such as `yes`, `off` or `True`.

    Returns:
        `bool`: The value, or `None` if it is none.
    """
    word = text.lower()
    if word in ("true", "yes", "on"):
        return True
    return False if word in ("false", "no", "off") else None


def guess_types(value: Any) -> Any:
    """
    A value inside a mapping, for which no option says the type: numbers, truth values (`no` and `off` too), or text.

    Args:
        value (`Any`):
            What [`TextLoader`] built.

    Returns:
        `Any`: The same with plain text turned into what it looks like. Text in quotes stays text.
    """
    if isinstance(value, dict):
        return {str(key): guess_types(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [guess_types(entry) for entry in value]
    if not isinstance(value, Plain):
        return value
    if (chosen := read_boolean(value)) is not None:
        return chosen
    if _INTEGER.fullmatch(value):
        return int(value)
    return float(value) if _NUMBER.fullmatch(value) else str(value)
