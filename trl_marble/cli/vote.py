# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble vote`: a page on which people vote on the images of a run."""

import os
import secrets
import sys
from argparse import Namespace
from contextlib import suppress
from typing import Any

from .errors import UsageError, usage_errors


HELP = "serve the page on which people vote on a run's images"
TOKEN_VARIABLE = "TRL_MARBLE_VOTE_TOKEN"


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser(
        "vote",
        help=HELP,
        description="Serve the page on which people vote on the images of a run with a `HumanReward`. Who has the "
        f"address can vote: it ends with a token, a new one each time, or the value of {TOKEN_VARIABLE}.",
        allow_abbrev=False,
    )
    command.add_argument("folder", metavar="FOLDER", help="the folder of the `HumanReward`")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    command.add_argument(
        "--port", type=int, default=8200, help="port to listen on, 0 takes a free one; default: %(default)s"
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    from ..extras import require_extra
    from ..rewards.http_client import check_secret
    from ..rewards.votes import VoteFolder

    with usage_errors():
        require_extra("server", "`trl-marble vote`")
        chosen = check_secret(os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE)
    folder = VoteFolder(args.folder)
    if not folder.exists:
        raise UsageError(
            f"`{args.folder}` is not the folder of a `HumanReward`, which makes it when the run starts; start the run "
            "first, or check the path"
        )
    is_terminal = sys.stdout.isatty()
    if chosen is None and not is_terminal:
        raise UsageError(
            "the output is not a terminal, and a log must not have the page's token: choose one of letters and digits "
            f"and set the environment variable {TOKEN_VARIABLE}"
        )
    from ..rewards.vote_server import VoteServer

    try:
        server = VoteServer(folder, chosen or secrets.token_urlsafe(16), args.host, args.port)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {args.host}, port {args.port}: {error}") from error
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
        shown = server.page if is_terminal else f"{server.url}/#token=TOKEN, with the value of {TOKEN_VARIABLE}"
        print(f"Serving the page for votes at {shown}", flush=True)
        server.run()
    server.close()
    return 0
