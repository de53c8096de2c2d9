# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Serves rewards over HTTP, for a trainer on another machine.

    python -m trl_marble.rewards.server --rewards pickscore my_rewards.brightness --port 8100 --device cuda

The client is [`~trl_marble.rewards.remote.RemoteReward`]; what it sends is in `server_messages.py`.
"""

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Self

from PIL import Image

from .http_client import check_secret, is_loopback
from .model_reward import ModelReward
from .protocol import RewardFunc, check_media, reward_names, validate_reward_funcs
from .scoring import RewardScorer
from .server_http import RequestLimits, RewardHTTPServer
from .server_messages import RefusedError, describe, encode_values


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_MARBLE_REWARD_TOKEN"


class RewardServer:
    """
    An HTTP server that computes rewards. `with RewardServer(...) as server:` serves from a thread.

    A request is refused before its body is read if it lacks the token, asks for an unknown reward, or is too large.
    Nothing is unpickled; images are decoded as PNG only, and nothing but their pixels is kept. Each reward scores one
    request at a time, on a thread of its own; different rewards score at the same time. Rewards get `None` as
    `trainer_state`, and what they log with `log_metric` and `log_extra` stays behind: answers hold scores only.

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
        limits = RequestLimits(max_bytes, max_images, max_pixels, timeout)
        token = check_secret(token, "token")
        if token is None and not is_loopback(host):
            raise ValueError(
                f"`host` is {host!r}, which other machines may reach, and there is no `token`: anyone could use the "
                "rewards. Choose a token, such as `secrets.token_urlsafe(32)`, or listen on '127.0.0.1'."
            )
        funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(funcs)
        check_media(funcs, self.names, "image", "a client of the server")
        self._scorers = {name: RewardScorer([func]) for name, func in zip(self.names, funcs, strict=True)}
        self._turns = {name: threading.Lock() for name in self.names}
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._http = RewardHTTPServer(self.score, self.names, host, port, token, limits)
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
                values = encode_values(pending.futures[0].result(), name, prompts)
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
