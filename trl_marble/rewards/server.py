# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Serves rewards over HTTP, for a trainer on another machine.

    python -m trl_marble.rewards.server --rewards pickscore my_rewards.brightness --port 8100 --device cuda

The client is [`~trl_marble.rewards.remote.RemoteReward`]. One request, `POST /score/<reward>` with the JSON

    {"images": [<PNG file in base64>, ...], "prompts": [<text>, ...], "columns": {<name>: [<value>, ...], ...}}

is answered with `{"values": [...]}`: a number, `null` where the reward does not apply, or `{"error": <text>}` where it
failed for that image alone. Every other answer is `{"error": <text>}` with a status that says who has to mend what.
"""

import argparse
import base64
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import re
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from PIL import Image
from torch import Tensor

from .model_reward import ModelReward
from .protocol import RewardFunc, check_media, reward_names, reward_tensor, validate_reward_funcs
from .remote import check_secret, refuse_constant
from .scoring import RewardScorer


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_MARBLE_REWARD_TOKEN"
MAX_CONNECTIONS = 64  # more are closed at once; a client tries again
RESERVED = {"images", "videos", "prompts", "trainer_state"}  # names that no column can have
# A folder in a text: after what cannot be part of a URL, a fraction or "and/or".
FOLDERS = re.compile(r"""(?<![\w:/.\\])(?:~|[A-Za-z]:(?=\\))?(?:[/\\][^/\\\s'":]+)*[/\\](?=[^/\\\s'":])""")


class RefusedError(Exception):
    """A request that is answered with a status and a reason instead of values."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer:
    """
    An HTTP server that computes rewards. `with RewardServer(...) as server:` serves from a thread.

    A request is refused before its body is read if it lacks the token, asks for an unknown reward, or is too large.
    Nothing is unpickled; images are decoded as PNG only, and nothing but their pixels is kept. Each reward scores one
    request at a time, on a thread of its own; different rewards score at the same time. Rewards get `None` as
    `trainer_state`.

    The server speaks plain HTTP. Put a proxy with TLS in front of it, or an SSH tunnel, where others can listen.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards, served under the names that the trainer would give them.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to `8100`):
            Port to listen on; 0 takes a free one, see `url`.
        token (`str`, *optional*):
            What clients must know. Needed unless `host` is this machine's own (loopback).
        max_bytes (`int`, *optional*, defaults to `2**28`):
            Largest body of a request.
        max_images (`int`, *optional*, defaults to `256`):
            Largest number of images in a request.
        max_pixels (`int`, *optional*, defaults to `2**27`):
            Largest number of pixels of all images of a request.
        timeout (`float`, *optional*, defaults to `60.0`):
            Longest time in seconds that a request may take to arrive.

    Attributes:
        names (`list[str]`): The name of each reward.
        url (`str`): The address for clients on this machine.

    Raises:
        `ValueError`: If others could reach the server and there is no token, a limit is not positive, or a reward
            scores videos, which clients do not send.
        `OSError`: If the address is taken.
    """

    def __init__(
        self,
        reward_funcs: str | RewardFunc | Sequence[str | RewardFunc],
        host: str = "127.0.0.1",
        port: int = 8100,
        token: str | None = None,
        max_bytes: int = 2**28,
        max_images: int = 256,
        max_pixels: int = 2**27,
        timeout: float = 60.0,
    ) -> None:
        limits = {"max_bytes": max_bytes, "max_images": max_images, "max_pixels": max_pixels, "timeout": timeout}
        for limit, value in limits.items():
            if not 0 < value < math.inf:
                raise ValueError(f"`{limit}` is {value}; it must be greater than 0.")
        token = check_secret(token, "token")
        if token is None and not _is_loopback(host):
            raise ValueError(
                f"`host` is {host!r}, which other machines may reach, and there is no `token`: anyone could use the "
                "rewards. Choose a token, such as `secrets.token_urlsafe(32)`, or listen on '127.0.0.1'."
            )
        self.max_images = max_images
        self.max_pixels = max_pixels
        funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(funcs)
        check_media(funcs, self.names, "image", "a client of the server")
        self._scorers = {name: RewardScorer([func]) for name, func in zip(self.names, funcs, strict=True)}
        self._turns = {name: threading.Lock() for name in self.names}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._http = _HTTPServer(self, host, port, token, max_bytes, timeout)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._http.server_address[1]}"

    def start(self) -> None:
        """Serve from a thread and return."""
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, name="reward-server", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, answer those that are being scored, and stop."""
        self._closing.set()
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.hang_up()
        self._http.server_close()
        for scorer in self._scorers.values():
            scorer.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, name: str, images: list[Image.Image], prompts: list[str], columns: dict[str, list]) -> list:
        """
        What the reward of a name answers, as JSON has it.

        Raises:
            `RefusedError`: If the reward fails, or the server stops before its turn comes.
        """
        with self._turns[name]:
            if self._closing.is_set():
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "The server stops.")
            start = time.monotonic()
            try:
                pending = self._scorers[name].submit(images, prompts, columns, None)
                values = _to_json(pending.futures[0].result(), name, prompts)
            except BaseException as error:  # of another thread: not even an exit there is one of this server
                logger.exception("Reward `%s` failed for %d images.", name, len(images))
                raise RefusedError(
                    HTTPStatus.INTERNAL_SERVER_ERROR, f"Reward `{name}` raised {describe(error)}"
                ) from error
        logger.info("Reward `%s` scored %d images in %.2f s.", name, len(images), time.monotonic() - start)
        return values


def serve_rewards(
    reward_funcs: str | RewardFunc | Sequence[str | RewardFunc],
    host: str = "127.0.0.1",
    port: int = 8100,
    token: str | None = None,
    **limits: Any,
) -> None:
    """
    Serve rewards until the process is asked to stop (Ctrl-C or SIGTERM). Call it from the main thread.

    What is being scored then is still answered. A second Ctrl-C or SIGTERM ends the process at once.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on.
        port (`int`, *optional*, defaults to `8100`):
            Port to listen on; 0 takes a free one.
        token (`str`, *optional*):
            What clients must know. Needed unless `host` is this machine's own (loopback).
        limits:
            `max_bytes`, `max_images`, `max_pixels` and `timeout` of [`RewardServer`].
    """
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def ask_to_stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    with RewardServer(reward_funcs, host, port, token, **limits) as server:
        for number in signals:
            signal.signal(number, ask_to_stop)
        try:
            print(f"Serving {', '.join(server.names)} at {server.url}", flush=True)
            stop.wait()
        finally:
            print("Stopping", flush=True)
    for number, handler in before.items():
        signal.signal(number, handler)


def read_request(
    body: bytes, max_images: int, max_pixels: int
) -> tuple[list[Image.Image], list[str], dict[str, list]]:
    """
    Images, prompts and columns of a request.

    Args:
        body (`bytes`):
            JSON, from anyone.
        max_images (`int`):
            Largest number of images.
        max_pixels (`int`):
            Largest number of pixels of all images.

    Raises:
        `RefusedError`: If anything is not as it must be; says what.
    """
    try:
        request = json.loads(body, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(f"The body is not JSON in UTF-8: {error}.") from error
    if not isinstance(request, dict) or request.keys() != {"images", "prompts", "columns"}:
        raise _bad("The body must be a JSON object with `images`, `prompts` and `columns`, and no more.")
    files, prompts, columns = request["images"], request["prompts"], request["columns"]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files) or not files:
        raise _bad("`images` must be a list of at least one PNG file as a base64 string.")
    if len(files) > max_images:
        raise RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{len(files)} images are more than {max_images}, the limit here."
        )
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _bad("`prompts` must be a list of strings.")
    if len(prompts) != len(files):
        raise _bad(f"There are {len(prompts)} prompts for {len(files)} images.")
    if not isinstance(columns, dict):
        raise _bad("`columns` must be an object of lists.")
    for name, values in columns.items():
        if name in RESERVED:
            raise _bad(f"A column cannot have the name {name!r}.")
        if not isinstance(values, list) or len(values) != len(files):
            raise _bad(f"Column {name!r} must be a list with one value for each of the {len(files)} images.")
    images = []
    for position, file in enumerate(files):
        image = _open_png(file, position)
        max_pixels -= image.width * image.height
        if max_pixels < 0:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The images have too many pixels: image {position} of {image.width} x {image.height} goes over the "
                "limit here.",
            )
        try:
            image.load()
        except Exception as error:  # a decoder may raise anything for a broken file
            raise _bad(f"Image {position} is a broken PNG file.") from error
        images.append(_only_pixels(image))
    return images, prompts, columns


def describe(error: BaseException) -> str:
    """Type and message of an error, without the folders of this machine."""
    message = FOLDERS.sub("", str(error))
    return f"{type(error).__name__}: {message if len(message) <= 500 else message[:497] + '...'}"


def _open_png(file: str, position: int) -> Image.Image:
    """The image, of which only the header is read."""
    try:
        content = base64.b64decode(file, validate=True)
    except ValueError as error:
        raise _bad(f"Image {position} is not base64.") from error
    try:
        return Image.open(io.BytesIO(content), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Image {position} has more pixels than any image may have."
        ) from error
    except Exception as error:  # a decoder may raise anything for a broken file
        raise _bad(f"Image {position} is not a PNG file.") from error


def _only_pixels(image: Image.Image) -> Image.Image:
    """
    The image without the file that it came from, and what that held beside pixels: a kilobyte of compressed text can
    become a megabyte, over and over in one file.
    """
    pixels = image.copy()
    pixels.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return pixels


def _to_json(values: Any, name: str, prompts: list[str]) -> list[float | dict[str, str] | None]:
    reward_tensor(values, name, prompts)  # raises for what is not a reward, as it would in the trainer
    encoded: list[float | dict[str, str] | None] = []
    for value in values.tolist() if isinstance(values, Tensor | np.ndarray) else values:
        if isinstance(value, Exception):
            encoded.append({"error": describe(value)})
        elif value is None or math.isnan(value):
            encoded.append(None)
        else:
            encoded.append(float(value))
    return encoded


def _bad(reason: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, reason)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _HTTPServer(ThreadingHTTPServer):
    """Listens, with a bounded number of connections, and remembers those whose request has not arrived yet."""

    daemon_threads = False  # `server_close` waits for what is being answered

    def __init__(
        self, rewards: RewardServer, host: str, port: int, token: str | None, max_bytes: int, timeout: float
    ) -> None:
        self.rewards = rewards
        self.paths = {f"/score/{quote(name, safe='')}": name for name in rewards.names}
        self.credentials = None if token is None else f"Bearer {token}".encode("ascii")
        self.max_bytes = max_bytes
        self.patience = timeout
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

    server: _HTTPServer
    server_version, sys_version = "trl_marble", ""  # what runs here concerns nobody

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Deadline(self.connection, self.server.patience))
        self.has_arrived = False

    def do_POST(self) -> None:
        try:
            name = self._check_head()
            images, prompts, columns = read_request(
                self._read_body(), self.server.rewards.max_images, self.server.rewards.max_pixels
            )
            status = HTTPStatus.OK
            answer: dict[str, Any] = {"values": self.server.rewards.score(name, images, prompts, columns)}
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
            raise _bad("Content-Length must be one number.")
        if int(lengths[0]) > self.server.max_bytes:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{lengths[0]} bytes are more than {self.server.max_bytes}, the limit here.",
            )
        return name

    def _read_body(self) -> bytes:
        length = int(self.headers["Content-Length"])
        try:
            body = self.rfile.read(length)
        except TimeoutError as error:
            raise RefusedError(
                HTTPStatus.REQUEST_TIMEOUT, f"The request did not arrive within {self.server.patience:g} seconds."
            ) from error
        self.has_arrived = True
        self.server.arrived(self.connection)
        if len(body) < length:
            raise _bad(f"The body has {len(body)} of {length} bytes.")
        return body

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer, allow_nan=False).encode("ascii")
        self.connection.settimeout(self.server.patience)
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trl_marble.rewards.server",
        description="Serve rewards over HTTP. The token that clients must know is the value of the environment "
        f"variable {TOKEN_VARIABLE}: an argument could be seen by every user of the machine.",
    )
    parser.add_argument("--rewards", nargs="+", required=True, help="known names or dotted paths: my_rewards.func")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of rewards that are models (default: %(default)s)")
    parser.add_argument("--max-bytes", type=int, default=2**28, help="largest body (default: %(default)s)")
    parser.add_argument("--max-images", type=int, default=256, help="images in a request (default: %(default)s)")
    parser.add_argument("--max-pixels", type=int, default=2**27, help="pixels in a request (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to send a request (default: %(default)s)")
    chosen = vars(parser.parse_args(arguments))
    device = chosen.pop("device")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        rewards = validate_reward_funcs(chosen.pop("rewards"))
        for reward in rewards:
            if isinstance(reward, ModelReward):
                reward.to(device)
        serve_rewards(rewards, token=os.environ.get(TOKEN_VARIABLE), **chosen)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
