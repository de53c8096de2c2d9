# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Command lines and YAML files as dataclasses, checked before anything is built."""

import argparse
import os
import re
from inspect import get_annotations
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from trl import TrlParser

from .errors import UsageError
from .launch_options import launch_parser
from .yaml_settings import Plain, TextLoader, guess_types, read_boolean


# What PyYAML lets through from below, such as for a character that cannot be, or deep nesting.
CONSTRUCTORS_RAISE = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def read_config(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """
    Read the file of `--config` and set the environment variables of its key `env`.

    Args:
        words (`list[str]`):
            The command line after the command's name.

    Returns:
        `tuple[dict[str, Any], list[str]]`: The settings of the file, empty where there is none, and the other words.

    Raises:
        [`UsageError`]: If there is no such file, its content is not a YAML mapping or has aliases, or `env` holds what
            no environment variable can be.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    if "--config" in words and words[-1] == "--config":
        raise UsageError("`--config` needs the path of a YAML file")
    found, others = finder.parse_known_args(words)
    if found.config is None:
        return {}, others
    path = Path(found.config).expanduser()
    if not path.is_file():
        raise UsageError(f"`--config {found.config}`: there is no such file")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=TextLoader)
    except (yaml.YAMLError, *CONSTRUCTORS_RAISE) as error:
        raise UsageError(f"`{path}` is not YAML: {error}") from error
    if not isinstance(config, dict) or None in config:
        raise UsageError(f"`{path}` has no settings; write one `option: value` per line")
    os.environ.update(_environment(config.pop("env", {}), path))
    return {str(key): value for key, value in config.items()}, others


def _environment(variables: Any, path: Path) -> dict[str, str]:
    """The variables of `env`, checked. No message quotes a value: tokens stand here."""
    if not isinstance(variables, dict):
        raise UsageError(f"`env` in `{path}` is no mapping; write variables with their values below it")
    for name, value in variables.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"`env` in `{path}` has the variable {name!r}; a name is of letters, digits and `_`")
        if value is None or isinstance(value, list | dict):
            raise UsageError(f"`{name}` of `env` in `{path}` needs one value")
        try:
            usable = b"\0" not in os.fsencode(str(value))
        except ValueError:  # a number of thousands of digits, or half of a surrogate pair
            usable = False
        if not usable:
            raise UsageError(f"`{name}` of `env` in `{path}` has a value that no environment variable can have")
    return {name: str(value) for name, value in variables.items()}


class ConfigParser(TrlParser):
    """
    A [`~trl.TrlParser`] that is strict: no abbreviations, values of a YAML file checked like those of the command
    line, unknown options known before anything is built, and errors of one line.

    Args:
        dataclass_types (`type` or `Iterable[type]`):
            The dataclasses whose fields are the options.
        kwargs (`Any`):
            For [`argparse.ArgumentParser`].
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._hints: dict[str, Any] = {}
        for kind in self.dataclass_types:
            self._hints |= get_type_hints(kind)
            self._show_inherited_last(kind)
        self.add_argument(
            "--config", metavar="FILE", help="YAML file of options. Options on the command line override it."
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    @property
    def option_strings(self) -> list[str]:
        """All options, as they are written."""
        return [option for action in self._actions for option in action.option_strings]

    def take(self, words: list[str], config: dict[str, Any]) -> list[str]:
        """
        Make the settings of a file the defaults, and check all names and values.

        Args:
            words (`list[str]`):
                The command line after the command's name, without `--config`.
            config (`dict[str, Any]`):
                The settings of the file.

        Returns:
            `list[str]`: What is not for this parser, as words of a command line.

        Raises:
            [`UsageError`]: For a missing option, or a value that an option cannot have.
        """
        actions = {action.dest: action for action in self._actions}
        for key in config:
            if key not in actions and (name := key.replace("-", "_")) in actions:
                raise UsageError(f"there is no option `{key}` in files; write `{name}`")
        known = {key: self._checked(actions[key], value) for key, value in config.items() if key in actions}
        self.set_defaults_with_config(**known)
        others = [word for key, value in config.items() if key not in actions for word in _as_words(key, value)]
        return others + self.parse_known_args(words)[1]

    def is_set(self, name: str, words: list[str]) -> bool:
        """
        Whether a switch is on.

        Args:
            name (`str`):
                An option, which may not exist.
            words (`list[str]`):
                As for [`take`], which has been called.

        Returns:
            `bool`: Its value, `False` where there is no such option.
        """
        return bool(getattr(self.parse_known_args(words)[0], name, False))

    def build(self, words: list[str]) -> tuple[Any, ...]:
        """
        The dataclasses, from words and settings that [`take`] has seen.

        Args:
            words (`list[str]`):
                As for [`take`]. What is not for this parser is passed over.

        Returns:
            `tuple`: One object for each dataclass.

        Raises:
            [`UsageError`]: For values that a dataclass refuses.
        """
        try:
            built = self.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        except (OSError, ImportError, OverflowError) as error:  # a file or package that an option needs, or infinity
            raise UsageError(f"the options cannot be used ({type(error).__name__}: {error})") from error
        return built[: len(list(self.dataclass_types))]

    def _show_inherited_last(self, kind: type) -> None:
        """Group the help: the options that a dataclass declares itself, then those of each of its bases."""
        owners = {name: base for base in reversed(kind.__mro__) for name in get_annotations(base)}
        shown = self._optionals._group_actions
        for base in kind.__mro__:
            if actions := [action for action in shown if owners.get(action.dest) is base]:
                self.add_argument_group(f"options of {base.__name__}")._group_actions += actions
                shown[:] = [action for action in shown if action not in actions]

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        """A value of a YAML file as the option has it; `TrlParser` itself takes anything."""
        if value is None:
            if action.required:
                raise UsageError(f"`{action.dest}` has no value")
            if action.default is None:
                return None
            raise UsageError(f"`{action.dest}` has no value; leave it out to keep {action.default!r}")
        if isinstance(value, list | dict):
            if type(value).__name__ not in str(self._hints.get(action.dest)):
                wanted = "a list" if action.nargs == "+" else "one value"
                raise UsageError(f"`{action.dest}` is {guess_types(value)!r}; it takes {wanted}")
            if action.nargs != "+":
                return guess_types(
                    value
                )  # of `TrainingArguments`, which has fields that the command line cannot write in full
        values = value if isinstance(value, list) else [value]
        if any(isinstance(entry, list | dict) for entry in values):
            raise UsageError(f"`{action.dest}` is {guess_types(value)!r}; it takes a list of single values")
        texts = [str(entry) for entry in values]
        kinds = _kinds(self._hints.get(action.dest))
        if bool in kinds and str not in kinds:
            texts = [text if read_boolean(text) is None else str(read_boolean(text)) for text in texts]
        try:
            checked = [self._get_value(action, text) for text in texts]
            for entry in checked:
                self._check_value(action, entry)
        except argparse.ArgumentError as error:
            raise UsageError(str(error)) from error
        return checked if action.nargs == "+" else checked[0]


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(hint) or (hint,)


def _as_words(key: str, value: Any) -> list[str]:
    """A setting of `accelerate launch` as words of its command line."""
    action = launch_parser()._option_string_actions.get(f"--{key}")
    if action is None or action.nargs != 0:
        return [f"--{key}", *([str(value)] if value is not None else [])]
    if not isinstance(value, Plain) or (chosen := read_boolean(value)) is None:
        raise UsageError(f"`{key}` is {value!r}; it takes `true` or `false`")
    return [f"--{key}"] if chosen else []
