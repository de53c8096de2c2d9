# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Mistakes of a command's user, shown without a traceback."""

import sysconfig
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..setting_names import suggest_name


PACKAGE = Path(__file__).parents[1]
USAGE_ERROR = 2  # the exit status, argparse's own
RUN_ERROR = 1
LOG_IN = "run `hf auth login`, or set the environment variable HF_TOKEN"


class UsageError(Exception):
    """A command cannot be run as it was written. The message says what to change."""


class RunError(Exception):
    """A command stopped while it ran, and not by a fault of this package. The message says why, and what is saved."""


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


@contextmanager
def run_errors() -> Iterator[None]:
    """
    Turn what stops a run from outside into [`RunError`]: a reward that fails, numbers that are not finite, memory or a
    disk that is full. Other errors keep their traceback.

    Where a reward failed in the user's own code, the traceback of that is printed first.

    Raises:
        [`RunError`]: With the message and the notes of the error.
    """
    import torch

    from ..checkpoint.folder import CheckpointWriteError
    from ..rewards import RewardError

    try:
        yield
    except (RewardError, FloatingPointError, CheckpointWriteError, torch.OutOfMemoryError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(error, RewardError) and cause is not error and _is_of_user(cause):
            traceback.print_exception(cause)
        raise RunError("\n".join([str(error), *getattr(error, "__notes__", [])])) from error


def _is_of_user(error: BaseException) -> bool:
    """Whether a function that is neither of this package nor an installed one had a part in an error."""
    installed = [PACKAGE, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))]
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(not any(file.is_relative_to(folder) for folder in installed) for file in files)


def check_hub_access(token: str | None = None) -> None:
    """
    See that something can be pushed, without asking the Hub.

    Args:
        token (`str`, *optional*):
            An access token. Defaults to the one of `hf auth login` or of the environment.

    Raises:
        [`UsageError`]: If the Hub is switched off by the environment, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError("nothing can be pushed offline: the environment variable HF_HUB_OFFLINE is set; unset it")
    if token is None and get_token() is None:
        raise UsageError(f"you are not logged in to the Hub: {LOG_IN}")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """
    Turn the refusals of the Hub and of the network into [`RunError`].

    Args:
        what (`str`):
            What is not done then, such as `"nothing was pushed"`.

    Raises:
        [`RunError`]: With the reason, and what to do.
    """
    from httpx2 import HTTPError, HTTPStatusError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise RunError(f"{what}: you are not logged in to the Hub; {LOG_IN}") from error
    except OfflineModeIsEnabled as error:
        raise RunError(f"{what}: the environment variable HF_HUB_OFFLINE is set; unset it") from error
    except (HfHubHTTPError, HTTPStatusError) as error:
        how = {
            401: f"\nThe access token is not valid; {LOG_IN}.",
            403: f"\nThe access token has no right to write there; {LOG_IN} with one that has.",
        }
        raise RunError(f"{what}: {error}{how.get(error.response.status_code, '')}") from error
    except HTTPError as error:
        raise RunError(f"{what}: the Hub cannot be reached ({error}); look at the network connection") from error


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
