# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scripts for completion by tab. They hold all options, so that a tab press starts no Python."""

from argparse import ArgumentParser
from typing import Any

import shtab

from ..rewards import KNOWN_REWARDS
from .launch_options import launch_parser
from .sources import SHAPEWORLD


FILES = ("config", "config_file", "model", "prompts", "eval_prompts", "adapter", "output")
FOLDERS = ("output_dir", "resume_from_checkpoint", "folder", "evaluations", "before", "after")
REWARDS = ("rewards", "eval_rewards")


def completion_script(parser: ArgumentParser, commands: dict[str, ArgumentParser], shell: str) -> str:
    """
    The script that makes a shell complete a command line.

    Args:
        parser (`ArgumentParser`):
            The whole parser. It is changed, and of no other use afterwards.
        commands (`dict[str, ArgumentParser]`):
            The parsers of its commands, with all their options, by name.
        shell (`str`):
            `"bash"`, `"zsh"` or `"tcsh"`.

    Returns:
        `str`: the script.
    """
    for name in ("train", "eval"):
        _add_launch_options(commands[name])
    paths = dict.fromkeys(FILES, shtab.FILE) | dict.fromkeys(FOLDERS, shtab.DIR)
    for command in commands.values():
        action: Any
        for action in command._actions:
            if action.dest in paths:
                action.complete = paths[action.dest]
            if action.dest in REWARDS:
                action.choices = [SHAPEWORLD, *KNOWN_REWARDS]
    return shtab.complete(parser, shell)


def _add_launch_options(command: ArgumentParser) -> None:
    """Options of `accelerate launch`, but for those that the command has itself."""
    taken = set(command._option_string_actions)
    for action in launch_parser()._actions:
        if action.option_strings and not taken.intersection(action.option_strings):
            command._add_action(action)
