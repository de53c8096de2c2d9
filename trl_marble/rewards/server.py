# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Serves rewards over HTTP, for a trainer on another machine. Needs the extra `server`.

    python -m trl_marble.rewards.server --rewards pickscore my_rewards.brightness --port 8100 --device cuda

The client is [`~trl_marble.rewards.remote.RemoteReward`]; what it sends is in `server_messages.py`.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from PIL import Image
from transformers import HfArgumentParser

from ..extras import MissingExtraError, require_extra
from .http_client import check_secret, is_loopback
from .model_reward import ModelReward
from .protocol import RewardFunc, check_media, find_learner, reward_names, reward_scope, validate_reward_funcs
from .scoring import RewardScorer
from .server_messages import RefusedError, describe, encode_values


require_extra("server", "The reward server")

from .server_http import HttpServer, RequestLimits, make_app  # noqa: E402, it needs the extra


logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TRL_MARBLE_REWARD_TOKEN"


class RewardServer(HttpServer):
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
        limits (`Any`):
            `max_bytes`, `max_images`, `max_pixels` and `timeout` of
            [`~trl_marble.rewards.server_http.RequestLimits`].

    Attributes:
        names (`list[str]`): The name of each reward.
        url (`str`): The address for clients on this machine.

    Raises:
        `ValueError`: If others could reach the server and there is no token, a limit is not positive, or a reward
            scores videos, which clients do not send, compares images with each other, or learns.
        `OSError`: If the address is taken.
    """

    def __init__(
        self,
        reward_funcs: str | RewardFunc | Sequence[str | RewardFunc],
        host: str = "127.0.0.1",
        port: int = 8100,
        token: str | None = None,
        **limits: Any,
    ) -> None:
        checked = RequestLimits(**limits)
        token = check_secret(token, "token")
        if token is None and not is_loopback(host):
            raise ValueError(
                f"`host` is {host!r}, which other machines may reach, and there is no `token`: anyone could use the "
                "rewards. Choose a token, such as `secrets.token_urlsafe(32)`, or listen on '127.0.0.1'."
            )
        funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(funcs)
        check_media(funcs, self.names, "image", "a client of the server")
        for func, name in zip(funcs, self.names, strict=True):
            if reward_scope(func) != "image":
                raise ValueError(
                    f"Reward `{name}` compares images with each other, and a request need not have whole groups. Use "
                    "it in the training process."
                )
            if find_learner(func) is not None:
                raise ValueError(
                    f"Reward `{name}` learns, and nobody would call its `update` here: what it learns is part of a "
                    "run's checkpoints. Use it in the training process."
                )
        self._scorers = {name: RewardScorer([func]) for name, func in zip(self.names, funcs, strict=True)}
        self._turns = {name: asyncio.Lock() for name in self.names}
        super().__init__(make_app(self._score, self.names, token, checked), host, port, checked.timeout)

    def close(self) -> None:
        """Take no more requests, answer those that are being scored, and stop."""
        super().close()
        for scorer in self._scorers.values():
            scorer.close()

    async def _score(self, name: str, images: list[Image.Image], prompts: list[str], columns: dict[str, list]) -> list:
        """
        Score with the reward of a name; the values are as JSON has them.

        Raises:
            `RefusedError`: If the reward fails, or the server stops before its turn comes.
        """
        async with self._turns[name]:
            if self._server.should_exit:
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "The server stops.")
            start = time.monotonic()
            try:
                pending = self._scorers[name].submit(images, prompts, columns, None)
                values = encode_values(await asyncio.wrap_future(pending.futures[0]), name, prompts)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # of another thread: not even an exit there is one of this server
                logger.exception("Reward `%s` failed for %d images.", name, len(images))
                reason = f"Reward `{name}` raised {describe(error)}"
                raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, reason) from error
        logger.info("Reward `%s` scored %d images in %.2f s.", name, len(images), time.monotonic() - start)
        return values


@dataclass
class ServerArguments:
    """What to serve, and where."""

    rewards: list[str] = field(metadata={"help": "Known names, or dotted paths such as my_rewards.brightness."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8100, metadata={"help": "Port to listen on; 0 takes a free one."})
    device: str = field(default="cpu", metadata={"help": "Device of the rewards that are models."})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    kinds: Any = (ServerArguments, RequestLimits)
    parser = HfArgumentParser(
        kinds,
        prog="python -m trl_marble.rewards.server",
        description="Serve rewards over HTTP. The token that clients must know is the value of the environment "
        f"variable {TOKEN_VARIABLE}: every user of the machine could see an argument.",
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        args, limits = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        rewards = validate_reward_funcs(args.rewards)
        for reward in rewards:
            if isinstance(reward, ModelReward):
                reward.to(args.device)
        server = RewardServer(rewards, args.host, args.port, os.environ.get(TOKEN_VARIABLE), **vars(limits))
    except (ValueError, OSError, MissingExtraError) as error:
        parser.error(str(error))
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when it has stopped
        print(f"Serving {', '.join(server.names)} at {server.url}", flush=True)
        server.run()
    server.close()


if __name__ == "__main__":
    main()
