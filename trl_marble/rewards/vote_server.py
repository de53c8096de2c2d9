# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Serves the page on which people vote, for `trl-marble vote`. Needs the extra `server`."""

import json
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import HTTPException

from .server_http import HttpServer, check_token, read_body
from .votes import GROUP_ID, VoteFolder


PAGE = Path(__file__).parent / "vote_page"
FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
LARGEST_VOTE = 2**16  # bytes
ARRIVAL_SECONDS = 30.0


class VoteServer(HttpServer):
    """
    An HTTP server of the page for votes. `with VoteServer(...) as server:` serves from a thread.

    Everything but the page itself, which has no content, needs the token. It stands in the address behind `#`, so
    browsers keep it to themselves, and it appears in no log.

    Args:
        folder (`VoteFolder`):
            The folder of a [`HumanReward`].
        token (`str`):
            What a person must know.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to `8200`):
            Port to listen on; 0 takes a free one.

    Attributes:
        url (`str`): The address without the token.
        page (`str`): The address of the page, with the token.

    Raises:
        `OSError`: If the address is taken.
    """

    def __init__(self, folder: VoteFolder, token: str, host: str = "127.0.0.1", port: int = 8200) -> None:
        super().__init__(make_app(folder, token), host, port, ARRIVAL_SECONDS)
        self.page = f"{self.url}/#token={quote(token, safe='')}"


def make_app(folder: VoteFolder, token: str) -> FastAPI:
    """
    The application: the page, the next group to vote on, its images, and where votes are sent.

    Args:
        folder (`VoteFolder`):
            Where groups are and votes go.
        token (`str`):
            What requests must carry, in the header `Authorization`.
    """
    shown_times: Counter[str] = Counter()

    def check(request: Request) -> None:
        check_token(request, token)

    app = FastAPI(openapi_url=None)
    guarded = APIRouter(dependencies=[Depends(check)])

    @guarded.get("/next")
    def find_next() -> dict[str, Any]:
        """A group without a vote, and how many have one. Several people get different groups, as long as there are."""
        groups = folder.shown()
        waiting = [group for group, content in groups.items() if not content["voted"]]
        answer: dict[str, Any] = {"done": len(groups) - len(waiting), "total": len(groups), "group": None}
        if waiting:
            chosen = min(waiting, key=lambda group: shown_times[group])
            shown_times[chosen] += 1
            about = {key: groups[chosen][key] for key in ("prompt", "num_images")}
            answer["group"] = {"id": chosen} | about
        return answer

    @guarded.get("/groups/{group}/{place}")
    def send_image(group: str, place: int) -> Response:
        try:
            return Response(folder.image(_checked(group), place), media_type="image/png", headers=HEADERS)
        except FileNotFoundError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, "The run does not wait for a vote on this image.") from error

    @guarded.post("/groups/{group}")
    async def take_vote(group: str, request: Request) -> dict[str, str]:
        body = await read_body(request, LARGEST_VOTE)
        await run_in_threadpool(keep, _checked(group), body)
        return {"kept": group}

    def keep(group: str, body: bytes) -> None:
        try:
            folder.keep(group, json.loads(body))
        except FileNotFoundError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, "The run does not wait for a vote on this group.") from error
        except FileExistsError as error:
            raise HTTPException(HTTPStatus.CONFLICT, "Somebody has voted on this group.") from error
        except (ValueError, RecursionError) as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error

    app.include_router(guarded)

    @app.get("/{name:path}")
    def send_page(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such page.")
        file, kind = FILES[name]
        return Response((PAGE / file).read_bytes(), media_type=kind, headers=HEADERS)

    return app


def _checked(group: str) -> str:
    """The id of a group, which becomes part of a path."""
    if not GROUP_ID.fullmatch(group):
        raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such group.")
    return group
