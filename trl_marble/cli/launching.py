# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Runs a command here, or starts it again in several processes through `accelerate launch`."""

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..setting_names import OTHER_TRAINERS
from .errors import UsageError, unknown_option
from .launch_options import launch_parser


if TYPE_CHECKING:
    from .parsing import ConfigParser

MakeParser = Callable[[], "ConfigParser"]

MODULE = "trl_marble.cli.main"
# Set for the processes that are started here, so that they do not start others.
LAUNCHED = "TRL_MARBLE_LAUNCHED"


def run_command(name: str, words: list[str], parsers: Mapping[str, MakeParser], function: Callable[..., None]) -> int:
    """
    Run a command whose options are dataclasses.

    Args:
        name (`str`):
            The command, such as `"train"`.
        words (`list[str]`):
            What stands after its name: its own options, and those of `accelerate launch`, which start it in new
            processes.
        parsers (`Mapping[str, Callable[[], ConfigParser]]`):
            Makes its parser, and those of the other commands of this kind, whose options are explained where they are
            given to this one. Called after the environment variables of the configuration file are set.
        function (`Callable[..., None]`):
            The command itself, called with the dataclasses.

    Returns:
        `int`: the exit status.

    Raises:
        [`UsageError`]: If the words do not fit the options.
    """
    from .parsing import read_config

    config, own_words = read_config(words)
    parser = parsers[name]()
    others = parser.take(own_words, config)
    if others:
        arguments = launch_arguments(others, parser, parsers, [name, *words])
        arguments.cpu = arguments.cpu or parser.is_set("use_cpu", own_words)
        # `LOCAL_RANK`: the user's own `accelerate launch` or torchrun is at work.
        if LAUNCHED not in os.environ and "LOCAL_RANK" not in os.environ:
            return _launch(arguments)
    function(*parser.build(own_words))
    return 0


def launch_arguments(
    others: list[str], parser: "ConfigParser", parsers: Mapping[str, MakeParser], command: list[str]
) -> argparse.Namespace:
    """
    What `accelerate launch` makes of the words that are not the command's own.

    Args:
        others (`list[str]`):
            These words.
        parser (`ConfigParser`):
            The parser of the command.
        parsers (`Mapping[str, Callable[[], ConfigParser]]`):
            As for [`run_command`].
        command (`list[str]`):
            The command with all its words.

    Raises:
        [`UsageError`]: If a word is no option of either, the file of `--accelerate_config` is missing, or there would
            be no process.
    """
    launcher = launch_parser()
    known = [*parser.option_strings, *launcher._option_string_actions]
    unknown = [word for word in others if word.startswith("-") and word.partition("=")[0] not in known]
    if unknown:
        _explain_options_of_other_command(unknown, command[0], parsers)
        raise unknown_option(unknown[0], known)
    arguments = launcher.parse_args([*others, "--module", MODULE, *command])
    if arguments.training_script != MODULE:
        raise UsageError(f"unexpected {arguments.training_script!r}")
    if arguments.config_file is not None and not Path(arguments.config_file).is_file():
        raise UsageError(f"`--accelerate_config {arguments.config_file}`: there is no such file")
    if arguments.num_processes is not None and arguments.num_processes < 1:
        raise UsageError(f"`num_processes` is {arguments.num_processes}; at least one process has to train")
    return arguments


def _explain_options_of_other_command(words: list[str], name: str, parsers: Mapping[str, MakeParser]) -> None:
    """Raise an error that says so if unknown options are those of `train` where `eval` is run, or the other way."""
    names = [word.partition("=")[0] for word in words]
    for other in parsers.keys() - {name}:
        others = parsers[other]().option_strings
        found = [option for option in names if option in others and option.lstrip("-") not in OTHER_TRAINERS]
        if found:
            shown = ", ".join(f"`{word.lstrip('-')}`" for word in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UsageError(
                f"{shown}{more}: options of `trl-marble {other}`, which `trl-marble {name}` does not have. Each of "
                "the two commands needs a file of its own (`--config`); they share the model, the prompts and the "
                "rewards"
            )


def _launch(arguments: argparse.Namespace) -> int:
    """Start the command and wait for it. The exit status is that of the process that failed first."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHED] = "1"
    # What it would add to the processes' own messages is said below where it matters.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        if arguments.cpu and (arguments.num_processes or 1) > 1 and arguments.mpirun_hostfile is None:
            _launch_on_cpu(arguments)
        else:
            launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status < 0:  # it was killed; else it has said itself what was wrong, and that shall be the last thing said
            print(error, file=sys.stderr)
        return max(status, 1)
    except SignalException as signal:
        return 128 + signal.sigval
    return 0


def _launch_on_cpu(arguments: argparse.Namespace) -> None:
    """As torchrun does: without MPI, `accelerate launch --cpu` starts one process, whatever the number."""
    from accelerate.commands.launch import _validate_launch_command, multi_gpu_launcher

    os.environ["ACCELERATE_USE_CPU"] = "true"
    arguments, *_ = _validate_launch_command(arguments)
    multi_gpu_launcher(arguments)
