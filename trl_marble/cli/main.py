# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The command `trl-marble`."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

from ..extras import MissingExtraError, require_extra
from ..termination import EXIT_STATUS, RunTerminated
from . import card, compare, demo, env, estimate, eval, push, selftest, train, vote
from .environment import prepare_environment
from .errors import RUN_ERROR, USAGE_ERROR, RunError, UsageError, unknown_option


DESCRIPTION = "Align flow-matching pipelines (SD3.5, Flux, Qwen-Image, Wan, ...) with several rewards at once."
EPILOG = """`trl-marble COMMAND --help` shows the options of a command.

Completion by tab: write the script once, and again after an update,

  mkdir -p ~/.local/share/bash-completion/completions
  trl-marble --print-completion bash > ~/.local/share/bash-completion/completions/trl-marble
  trl-marble --print-completion zsh > ~/.zfunc/_trl-marble     # with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc
  trl-marble --print-completion tcsh > ~/.trl-marble.tcsh      # with `source ~/.trl-marble.tcsh` in ~/.tcshrc"""
COMMANDS = (train, estimate, eval, compare, card, push, demo, vote, selftest, env)
INTERRUPTED = 130


def make_parser(whole: bool = False) -> ArgumentParser:
    """
    The parser of the command line.

    Args:
        whole (`bool`, *optional*, defaults to `False`):
            Whether it has all options of all commands, which takes seconds to import.

    Returns:
        `ArgumentParser`: the parser.
    """
    from .. import __version__

    parser = ArgumentParser(
        prog="trl-marble",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--print-completion", choices=("bash", "zsh", "tcsh"), help="print a shell's script for tab completion"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.register(subparsers, whole)
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            The words after `trl-marble`. Defaults to those of the process.

    Returns:
        `int`: The exit status: 0, 1 if the run stopped, 2 if the command cannot be run as it was written, 130 if it
        was interrupted, 143 if SIGTERM ended a training.
    """
    prepare_environment()
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args, others = parser.parse_known_args(argv)
    if args.print_completion is not None:
        try:
            require_extra("completion", "`--print-completion`")
        except MissingExtraError as error:
            parser.error(str(error))
        from .completion import completion_script

        whole = make_parser(whole=True)
        print(completion_script(whole, _commands(whole), args.print_completion))
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if "takes_words" in args:
            args.words = argv[argv.index(args.command) + 1 :]
            args.parsers = {"train": train.make_parser, "eval": eval.make_parser}
        elif others:
            raise _leftover(others[0], _commands(parser)[args.command])
        return args.run(args)
    except UsageError as error:
        name = f"trl-marble {args.command}"
        print(f"{name}: error: {error}\nSee `{name} --help`.", file=sys.stderr)
        return USAGE_ERROR
    except RunError as error:
        print(f"trl-marble {args.command}: error: {error}", file=sys.stderr)
        return RUN_ERROR
    except KeyboardInterrupt:
        _say_how_to_continue("Interrupted.", args.command)
        return INTERRUPTED
    except RunTerminated:
        _say_how_to_continue("Ended by SIGTERM.", args.command)
        return EXIT_STATUS


def _say_how_to_continue(what: str, command: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        advice = " Continue from the latest checkpoint, if there is one, with `--resume_from_checkpoint auto`."
        print(what + (advice if command == "train" else ""), file=sys.stderr)


def _commands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    choices: Any = next(action.choices for action in parser._actions if action.dest == "command")
    return choices


def _leftover(word: str, command: ArgumentParser) -> UsageError:
    known = list(command._option_string_actions)
    return unknown_option(word, known) if word.startswith("-") else UsageError(f"unexpected {word!r}")


if __name__ == "__main__":
    sys.exit(main())
