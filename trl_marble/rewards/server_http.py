# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How servers answer clients that they do not trust: who is served, how much is read, and for how long."""

import asyncio
import hmac
import json
import logging
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, Self

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from .server_messages import RefusedError, bad_request, read_request


logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # more are answered "503 Service Unavailable"; the client tries again


@dataclass(frozen=True)
class RequestLimits:
    """
    Limits of one request.

    Args:
        max_bytes (`int`, *optional*, defaults to `2**28`):
            Largest body.
        max_images (`int`, *optional*, defaults to `256`):
            Largest number of images.
        max_pixels (`int`, *optional*, defaults to `2**27`):
            Largest number of pixels of all images.
        timeout (`float`, *optional*, defaults to `60.0`):
            Longest time in seconds until the request has arrived.

    Raises:
        `ValueError`: If a limit is not positive and finite.
    """

    max_bytes: int = field(default=2**28, metadata={"help": "Largest body of a request."})
    max_images: int = field(default=256, metadata={"help": "Largest number of images in a request."})
    max_pixels: int = field(default=2**27, metadata={"help": "Largest number of pixels of all images of a request."})
    timeout: float = field(default=60.0, metadata={"help": "Longest time in seconds until a request has arrived."})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be greater than 0.")


def make_server(app: FastAPI, timeout: float) -> uvicorn.Server:
    """A server, not started, that gives up a request which has not arrived after `timeout` seconds."""
    protocol: Any = partial(_Protocol, seconds=timeout)
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("Connection", "close")],  # one request per connection: its time begins with the connection
        limit_concurrency=MAX_CONNECTIONS + 1,
    )
    return uvicorn.Server(config)


class HttpServer:
    """
    An application at an address of this machine. `with HttpServer(...) as server:` serves from a thread.

    Args:
        app (`FastAPI`):
            What is served.
        host (`str`):
            Address to listen on.
        port (`int`):
            Port to listen on; 0 takes a free one, see `url`.
        timeout (`float`):
            Longest time in seconds until a request has arrived.

    Attributes:
        url (`str`): The address for clients on this machine.

    Raises:
        `OSError`: If the address is taken.
    """

    def __init__(self, app: FastAPI, host: str, port: int, timeout: float) -> None:
        self._server = make_server(app, timeout)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self.run, name="http-server", daemon=True)

    def run(self) -> None:
        """
        Serve until [`close`] is called or, on the main thread, until Ctrl-C or SIGTERM. What is being answered then is
        still answered; a second Ctrl-C does not wait for it.
        """
        self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Take no more requests, answer those that have arrived, and stop."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_app(
    score: Callable[..., Awaitable[list]], names: Sequence[str], token: str | None, limits: RequestLimits
) -> FastAPI:
    """
    The application, which answers `POST /score/<name>`.

    Args:
        score (`Callable`):
            Called with name of a reward, images, prompts and columns; returns values as JSON has them.
        names (`Sequence[str]`):
            Names of the rewards that are served.
        token (`str`, *optional*):
            What clients must know. With `None` everybody is served.
        limits ([`RequestLimits`]):
            How much a client may ask for at once.
    """
    app = FastAPI(openapi_url=None)
    paths = {f"score/{name}": name for name in names}

    @app.post("/{path:path}")
    async def score_images(path: str, request: Request) -> Response:
        _check_head(request, path in paths, names, token, limits.max_bytes)
        body = await read_body(request, limits.max_bytes)
        asked = await run_in_threadpool(read_request, body, limits.max_images, limits.max_pixels)
        return _Answer(HTTPStatus.OK, {"values": await score(paths[path], *asked)})

    @app.exception_handler(RefusedError)  # the body has been read
    async def refuse(request: Request, refused: Any) -> Response:
        logger.warning("Refused a request of %s: %d %s", _address(request), refused.status, refused)
        return _Answer(refused.status, {"error": str(refused)})

    @app.exception_handler(HTTPException)  # the body has not been read, or not all of it
    async def refuse_unread(request: Request, refused: Any) -> Response:
        logger.warning("Refused a request of %s: %d %s", _address(request), refused.status_code, refused.detail)
        return _AnswerToUnread(refused.status_code, {"error": refused.detail}, refused.headers)

    return app


class _Answer(Response):
    def __init__(self, status: int, content: dict[str, Any], headers: Any = None) -> None:
        super().__init__(json.dumps(content, allow_nan=False), status, headers, "application/json")


class _AnswerToUnread(_Answer):
    """An answer before the end of the request. Closing then would take it back before the client has read it."""

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.body"})


def check_token(request: Request, token: str | None) -> None:
    """Refuse a request without the token, if there is one."""
    given = request.headers.get("Authorization", "").encode("latin-1")
    if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode("ascii")):
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "Unauthorized.", {"WWW-Authenticate": "Bearer"})


def _check_head(request: Request, known: bool, names: Sequence[str], token: str | None, max_bytes: int) -> None:
    """Refuse what can be refused without reading the body."""
    check_token(request, token)
    if "Origin" in request.headers:  # only browsers send it: a page must not use a server that has no token
        raise HTTPException(HTTPStatus.FORBIDDEN, "Browsers are not served.")
    if not known:
        served = ", ".join(names)
        raise HTTPException(HTTPStatus.NOT_FOUND, f"There is no such reward here. Served are: {served}.")
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be application/json.")
    _check_size(int(request.headers.get("Content-Length", 0)), max_bytes)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request, refused if it is too large."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            _check_size(len(body), max_bytes)
    except ClientDisconnect as error:
        raise bad_request("The body did not arrive.") from error
    return bytes(body)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        reason = f"{size} bytes are more than {max_bytes}, the limit here."
        raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)


def _address(request: Request) -> str:
    return request.client.host if request.client else "an unknown address"


class _Protocol(H11Protocol):
    """uvicorn's protocol, with a limit of the time that a request may take to arrive, and refusals in JSON."""

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds = seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self._seconds, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        if not self._has_arrived:
            self._refuse(HTTPStatus.BAD_REQUEST, "The request breaks off.")
        return self._has_arrived  # a client that has sent everything may close its half of the connection

    def shutdown(self) -> None:
        if self._has_arrived:
            super().shutdown()
        else:  # no client that sends slowly, or nothing, keeps the server from stopping
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    @property
    def _has_arrived(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body

    def _hang_up(self) -> None:
        # A client that was refused and keeps its connection open has to go, too.
        if not self._has_arrived or self.cycle.response_started:
            reason = f"The request did not arrive within {self._seconds:g} seconds."
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, reason)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        logger.info("Refused a request of %s: %d %s", self.client, status, reason)
        if self.cycle is not None:
            self.cycle.disconnected = True  # nothing else is to be sent
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = _Answer(status, {"error": reason}, {"Connection": "close"})
            head = h11.Response(status_code=status, headers=answer.raw_headers, reason=status.phrase)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
