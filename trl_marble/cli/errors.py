# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Mistakes of a command's user, shown without a traceback."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..setting_names import suggest_name


PACKAGE = Path(__file__).parents[1]
USAGE_ERROR = 2  # the exit status, argparse's own


class UsageError(Exception):
    """A command cannot be run as it was written. The message says what to change."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """
    Turn the refusals of this package into [`UsageError`].

    Only what the package itself raised is meant for the user; anything that comes from deeper down, such as an error
    in the module of the user's own reward, keeps its traceback.

    Raises:
        [`UsageError`]: With the message of a `ValueError`, `OSError` or `ImportError`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        innermost = error.__traceback__
        while innermost is not None and innermost.tb_next is not None:
            innermost = innermost.tb_next
        if innermost is None or not Path(innermost.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
            raise
        raise UsageError(str(error)) from error


def unknown_option(word: str, known: Collection[str]) -> UsageError:
    """
    The error for an option that does not exist.

    Args:
        word (`str`):
            The word as it was written, an option such as `--resoluton` or `--resoluton=512`, or a key of a YAML file.
        known (`Collection[str]`):
            The options or keys that there are.

    Returns:
        [`UsageError`]: names the nearest of them.
    """
    name = word.partition("=")[0]
    options = {option.lstrip("-"): option for option in known}
    how = suggest_name(name.lstrip("-"), options, "--" if name.startswith("-") else "")
    return UsageError(f"there is no option `{name}`" + (f"; {how}" if how else ""))
