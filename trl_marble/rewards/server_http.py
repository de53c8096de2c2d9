# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How the reward server talks HTTP with clients that it does not trust: who is heard, how long, and how much."""

import hmac
import io
import json
import logging
import math
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

from PIL import Image

from .server_messages import RefusedError, bad_request, read_request


logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64  # more are closed at once; a client tries again

# Name of a reward, images, prompts, columns -> values as JSON has them.
ScoreFunction = Callable[[str, list[Image.Image], list[str], dict[str, list]], list]


@dataclass(frozen=True)
class RequestLimits:
    """
    How much a client may ask for at once.

    Args:
        max_bytes (`int`):
            Largest body of a request.
        max_images (`int`):
            Largest number of images in a request.
        max_pixels (`int`):
            Largest number of pixels of all images of a request.
        timeout (`float`):
            Longest time in seconds that a request may take to arrive.

    Raises:
        `ValueError`: If a limit is not positive and finite.
    """

    max_bytes: int
    max_images: int
    max_pixels: int
    timeout: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be greater than 0.")


class RewardHTTPServer(ThreadingHTTPServer):
    """
    Listens, with a bounded number of connections, and remembers those whose request has not arrived yet.

    Args:
        score (`ScoreFunction`):
            Scores what a request asks for. Called on the thread of the connection, of several at the same time.
        names (`Sequence[str]`):
            Names of the rewards that are served.
        host (`str`):
            Address to listen on.
        port (`int`):
            Port to listen on; 0 takes a free one.
        token (`str`, *optional*):
            What clients must know. With `None` everybody is heard.
        limits ([`RequestLimits`]):
            How much a client may ask for at once.

    Raises:
        `OSError`: If the address is taken.
    """

    daemon_threads = False  # `server_close` waits for what is being answered

    def __init__(
        self,
        score: ScoreFunction,
        names: Sequence[str],
        host: str,
        port: int,
        token: str | None,
        limits: RequestLimits,
    ) -> None:
        self.score = score
        self.paths = {f"/score/{quote(name, safe='')}": name for name in names}
        self.credentials = None if token is None else f"Bearer {token}".encode("ascii")
        self.limits = limits
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._arriving: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the base class would look up the host's name, which may take long

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            request.close()
            return
        self._arriving.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._arriving.discard(request)
            self._connections.release()

    def arrived(self, request: socket.socket) -> None:
        """Tell that the whole request of a connection has been read."""
        self._arriving.discard(request)

    def hang_up(self) -> None:
        """Let no client that sends slowly, or nothing, keep the server from stopping."""
        for request in list(self._arriving):
            try:
                request.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has gone by itself
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        expected = isinstance(sys.exc_info()[1], OSError)  # the client has gone, or is too slow
        logger.log(logging.INFO if expected else logging.ERROR, "A connection broke.", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Answers the one request of a connection."""

    server: RewardHTTPServer
    server_version, sys_version = "trl_marble", ""  # what runs here concerns nobody

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Deadline(self.connection, self.server.limits.timeout))
        self.has_arrived = False

    def do_POST(self) -> None:
        try:
            name = self._check_head()
            limits = self.server.limits
            images, prompts, columns = read_request(self._read_body(), limits.max_images, limits.max_pixels)
            status = HTTPStatus.OK
            answer: dict[str, Any] = {"values": self.server.score(name, images, prompts, columns)}
        except RefusedError as refused:
            logger.warning("Refused a request of %s: %d %s", self.client_address[0], refused.status, refused)
            status, answer = refused.status, {"error": str(refused)}
        self._answer(status, answer)

    def _check_head(self) -> str:
        """The name of the reward that is asked for. What is refused here is refused unread."""
        credentials = self.server.credentials
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if credentials is not None and not hmac.compare_digest(given, credentials):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "Unauthorized.")
        if "Origin" in self.headers:  # only browsers send it: a page must not use a server that has no token
            raise RefusedError(HTTPStatus.FORBIDDEN, "Browsers are not served.")
        name = self.server.paths.get(self.path)
        if name is None:
            served = ", ".join(self.server.paths.values())
            raise RefusedError(HTTPStatus.NOT_FOUND, f"There is no such reward here. Served are: {served}.")
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body must be application/json.")
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed, and no Transfer-Encoding.")
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            raise bad_request("Content-Length must be one number.")
        if int(lengths[0]) > self.server.limits.max_bytes:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{lengths[0]} bytes are more than {self.server.limits.max_bytes}, the limit here.",
            )
        return name

    def _read_body(self) -> bytes:
        length = int(self.headers["Content-Length"])
        try:
            body = self.rfile.read(length)
        except TimeoutError as error:
            raise RefusedError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"The request did not arrive within {self.server.limits.timeout:g} seconds.",
            ) from error
        self.has_arrived = True
        self.server.arrived(self.connection)
        if len(body) < length:
            raise bad_request(f"The body has {len(body)} of {length} bytes.")
        return body

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer, allow_nan=False).encode("ascii")
        self.connection.settimeout(self.server.limits.timeout)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses: a malformed request, and every method but POST."""
        self._answer(code, {"error": f"{HTTPStatus(code).phrase}. Served is only: POST /score/<reward>."})

    def finish(self) -> None:
        # Closing while the client still sends would take the answer back before the client has read it.
        if not self.has_arrived:
            try:
                self.connection.shutdown(socket.SHUT_WR)
                while self.rfile.read1(2**16):
                    pass
            except OSError:  # it waited long enough, or has gone
                pass
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is worth telling is logged where it happens, and no text of a client is."""


class _Deadline(io.RawIOBase):
    """Reads from a socket until a deadline, however small the pieces are in which a slow client sends."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to arrive")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)
