# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The options of `accelerate launch`, which commands that start processes take beside their own."""

from argparse import ArgumentParser
from typing import NoReturn

from .errors import UsageError


def launch_parser() -> ArgumentParser:
    """The parser of `accelerate launch`, with `--accelerate_config` as another name of its `--config_file`."""
    from accelerate.commands.launch import launch_command_parser  # takes seconds

    parser = launch_command_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # its own prints a page of options
    parser.add_argument("--accelerate_config", dest="config_file")
    return parser


def _refuse(message: str) -> NoReturn:
    raise UsageError(message)
