# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble push`: an adapter and its card to the Hub."""

from argparse import Namespace
from typing import Any

from .errors import check_hub_access, hub_errors, usage_errors


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
    command.add_argument("--private", action="store_true", help="make the repository private, if the push creates it")
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    from ..hub import push_adapter
    from ..hub.push import published_files

    with usage_errors():
        published_files(args.folder)  # what is wrong here comes before what is wrong with the login
    check_hub_access()
    with hub_errors("nothing was pushed"), usage_errors():
        url = push_adapter(args.folder, args.repo_id, private=args.private)
    print(url)
    return 0
