# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A reward that another machine computes."""

import base64
import json
import threading
import time
from typing import Any
from urllib.parse import quote

import httpx2
from PIL import Image

from .http_client import (
    PLAIN_JSON,
    bearer,
    check_patience,
    check_secret,
    check_url,
    encode_png,
    redact,
    refuse_constant,
    retry_delay,
    start_of,
)
from .protocol import FLOAT32_MAX, RewardError


LARGEST_ANSWER = 2**24  # bytes; far more than the values of any batch


class RemoteReward:
    """
    A reward that a [`~trl_marble.rewards.server.RewardServer`] computes.

    Images travel as PNG, bit for bit; prompts and columns as JSON. The reward has the name that it has on the server,
    in logs too. The token is sent with every request, so use `https://` (a proxy with TLS in front of the server) or
    an SSH tunnel where others can listen.

    Args:
        url (`str`):
            Address of the server, such as `"http://127.0.0.1:8100"`.
        name (`str`):
            Name of the reward on the server.
        token (`str`, *optional*):
            The token that the server asks for.
        timeout (`float`, *optional*, defaults to `300.0`):
            Longest time in seconds for the answer to one request, retries and the waiting for other requests on the
            server included.
        max_retries (`int`, *optional*, defaults to `5`):
            How often a request is sent again after its connection failed, within `timeout`. The time in between
            doubles each time.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one request.
        columns (`list[str]`, *optional*):
            Columns of the dataset to send. Defaults to all of them.

    Raises:
        `ValueError`: If an argument makes no sense.
    """

    def __init__(
        self,
        url: str,
        name: str,
        token: str | None = None,
        timeout: float = 300.0,
        max_retries: int = 5,
        batch_size: int = 16,
        columns: list[str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not name:
            raise ValueError("`name` is empty; give the name that the reward has on the server.")
        check_patience(timeout, max_retries)
        self.url = check_url(url, "url")
        self.name = self.__name__ = name  # the latter is what `reward_names` reads
        self.timeout = timeout
        self.max_retries = max_retries
        self.batch_size = batch_size
        self.columns = columns
        self._token = check_secret(token, "token")

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: list,
    ) -> list[float | Exception | None]:
        """
        Score images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any mode, bit depth and size. They are sent in RGB, see [`~trl_marble.media.to_rgb`].
            prompts (`list[str]`):
                Their prompts.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Not sent: rewards on the server get `None`.
            log_metric, log_extra (`Callable`, *optional*):
                Not used.
            columns (`list`):
                The other columns of the dataset by name, one value an image.

        Returns:
            `list[float | Exception | None]`: One value an image, `None` where the reward does not apply, a
            [`RewardError`] where the reward failed for that image alone.

        Raises:
            [`RewardError`]: If the server cannot be reached, takes too long, refuses, or answers something else than
                one value an image; and if the reward itself raised there.
            `TypeError`: If a column holds what JSON cannot carry unchanged; names the column.
            `ValueError`: If an image cannot be converted to RGB, or a column of `columns` is missing.
        """
        sent = self._columns_to_send(columns)
        values: list[float | Exception | None] = []
        with httpx2.Client() as client:
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                request = {
                    "images": [base64.b64encode(encode_png(image)).decode("ascii") for image in images[part]],
                    "prompts": prompts[part],
                    "columns": {name: column[part] for name, column in sent.items()},
                }
                status, answer = self._post(client, json.dumps(request).encode("ascii"))
                values += self._values(status, answer, len(images[part]))
        return values

    def _columns_to_send(self, columns: dict[str, list]) -> dict[str, list]:
        if self.columns is not None:
            missing = [name for name in self.columns if name not in columns]
            if missing:
                raise ValueError(f"The data has no column {missing[0]!r}, which `columns` of {self.name!r} asks for.")
            columns = {name: columns[name] for name in self.columns}
        for name, values in columns.items():
            try:
                unchanged = json.loads(json.dumps(values, allow_nan=False)) == values
            except (TypeError, ValueError, RecursionError):
                unchanged = False
            if not unchanged:
                raise TypeError(
                    f"Column {name!r} cannot be sent to the reward server: JSON does not carry its values unchanged "
                    "(it has strings, finite numbers, booleans, None, lists, and dicts with string keys). Convert "
                    "the column, or leave it out by naming the columns that the reward needs in `columns`."
                )
        return columns

    def _post(self, client: httpx2.Client, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to a request."""
        deadline = time.monotonic() + self.timeout
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._exchange(client, body, deadline)
            except httpx2.TimeoutException as error:
                raise RewardError(
                    f"The reward server at {self.url} did not answer within {self.timeout:g} seconds. It hangs, or "
                    "it is slow: then give it more time with `timeout` or less work with `batch_size`."
                ) from error
            except httpx2.TransportError as error:
                delay = retry_delay(attempt)
                if attempt > self.max_retries or time.monotonic() + delay > deadline:
                    raise RewardError(
                        f"The connection to the reward server at {self.url} failed (attempts: {attempt}; the last: "
                        f"{type(error).__name__}: {redact(str(error), self._token)}). Does it run there?"
                    ) from error
                time.sleep(delay)

    def _exchange(self, client: httpx2.Client, body: bytes, deadline: float) -> tuple[int, bytes]:
        path = f"{self.url}/score/{quote(self.name, safe='')}"
        headers = PLAIN_JSON | bearer(self._token)
        left = max(deadline - time.monotonic(), 0.001)
        # The client's own timeout is for one piece of the answer, and its head may come in many.
        hang_up = threading.Timer(left + 0.1, client.close)
        hang_up.daemon = True
        hang_up.start()
        try:
            with client.stream("POST", path, content=body, headers=headers, timeout=left) as response:
                answer = bytearray()
                for chunk in response.iter_raw():
                    answer += chunk
                    if len(answer) > LARGEST_ANSWER:
                        raise RewardError(
                            f"The reward server at {self.url} answered more than {LARGEST_ANSWER} bytes."
                        )
                    if time.monotonic() > deadline:
                        raise httpx2.ReadTimeout("the answer came too slowly")
                return response.status_code, bytes(answer)
        except httpx2.TransportError as error:
            if time.monotonic() < deadline:
                raise
            raise httpx2.ReadTimeout("the answer came too slowly") from error
        finally:
            hang_up.cancel()

    def _values(self, status: int, answer: bytes, number: int) -> list[float | Exception | None]:
        """The values in an answer, checked."""
        try:
            content = json.loads(answer, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            content = None
        told = redact(answer.decode("utf-8", "replace"), self._token)
        if status != 200:
            reason = content.get("error") if isinstance(content, dict) else None
            reason = redact(reason, self._token) if isinstance(reason, str) else start_of(told)
            mend = {
                401: " Is `token` the token that the server was started with?",
                413: " Send fewer images at once: lower `batch_size`.",
            }.get(status, "")
            raise RewardError(f"The reward server at {self.url} answered {status}: {reason}{mend}")
        values = content.get("values") if isinstance(content, dict) else None
        if not isinstance(values, list):
            raise RewardError(f"What answers at {self.url} is no reward server; it said {start_of(told)}.")
        if len(values) != number:
            raise RewardError(f"The reward server at {self.url} answered {len(values)} values for {number} images.")
        return [self._value(value) for value in values]

    def _value(self, value: Any) -> float | Exception | None:
        match value:
            case None:
                return None
            case {"error": str(message)}:
                return RewardError(redact(message, self._token))
            case int() | float() if not isinstance(value, bool) and abs(value) <= FLOAT32_MAX:
                return float(value)
        told = start_of(redact(json.dumps(value), self._token))
        raise RewardError(
            f"The reward server at {self.url} answered {told} for an image; a value is a finite number, or null where "
            "the reward does not apply."
        )
