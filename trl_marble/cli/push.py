# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble push`: an adapter and its card to the Hub."""

from argparse import Namespace
from typing import Any

from .errors import UsageError, usage_errors


HELP = "push a trained adapter with its card to the Hub"


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser(
        "push",
        help=HELP,
        description="Push an adapter, its card and the card's pictures, and nothing else of the folder, to the Hub. "
        "Uses the token of `hf auth login` or of the environment variable HF_TOKEN.",
        allow_abbrev=False,
    )
    command.add_argument("folder", metavar="FOLDER", help="the output folder of the training")
    command.add_argument("repo_id", metavar="REPO_ID", help="the repository, such as me/sd3.5m-marble")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from ..hub import push_adapter

    try:
        with usage_errors():
            url = push_adapter(args.folder, args.repo_id, private=args.private)
    except (HTTPError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UsageError(f"the Hub did not take it: {error}") from error
    print(url)
    return 0
