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
    ABOUT_ALL,
    PLAIN_JSON,
    bearer,
    check_secret,
    check_url,
    encode_png,
    open_client,
    redact,
    refuse_constant,
    start_of,
)
from .protocol import FLOAT32_MAX, RewardError
from .retry import Attempts, RetryPolicy, asked_delay, is_permanent, means_later


LARGEST_ANSWER = 2**24  # bytes; far more than the values of any batch


class RefusedRequestError(RewardError):
    """A request that was refused, perhaps because of one of its images, perhaps as any would be."""


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
        max_retries (`int`, *optional*):
            How often a request is sent again, within `timeout`, after its connection failed (refused ones included) or
            the answer was a status that means "later": 408, 425, 429 and 5xx but 501 and 505. Not after the server
            said that the reward itself failed. The time in between doubles each time up to 8 seconds, with jitter,
            and is at least what the server asks for. Defaults to as often as there is time for.
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
        max_retries: int | None = None,
        batch_size: int = 16,
        columns: list[str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not name:
            raise ValueError("`name` is empty; give the name that the reward has on the server.")
        self._policy = RetryPolicy(timeout, max_retries)
        self.url = check_url(url, "url")
        self.name = self.__name__ = name  # the latter is what `reward_names` reads
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
                The other columns of the dataset by name, one value per image.

        Returns:
            `list[float | Exception | None]`: One value per image, `None` where the reward does not apply, a
            [`RewardError`] where the reward failed for that image alone, or where the request with it was refused
            and another one was not.

        Raises:
            [`RewardError`]: If the server cannot be reached, takes too long, refuses the token or every request, or
                answers something else than one value per image; and if the reward itself raised there.
            `TypeError`: If a column holds what JSON cannot carry unchanged; names the column.
            `ValueError`: If an image cannot be converted to RGB, or a column of `columns` is missing.
        """
        sent = self._columns_to_send(columns)
        values: list[float | Exception | None] = []
        refusals: list[RefusedRequestError] = []
        with open_client(self.url) as client:
            for start in range(0, len(images), self.batch_size):
                part = slice(start, start + self.batch_size)
                request = {
                    "images": [base64.b64encode(encode_png(image)).decode("ascii") for image in images[part]],
                    "prompts": prompts[part],
                    "columns": {name: column[part] for name, column in sent.items()},
                }
                status, answer = self._post(client, json.dumps(request).encode("ascii"))
                try:
                    values += self._values(status, answer, len(images[part]))
                except RefusedRequestError as error:
                    refusals.append(error)
                    values += [error] * len(images[part])
        if refusals and all(isinstance(value, RefusedRequestError) for value in values):
            raise refusals[0]
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
        attempts = Attempts(f"The reward server at {self.url}", self._policy)
        while True:
            asked, cause = 0.0, None  # seconds that the server asks to wait, and what broke the connection
            try:
                response = self._exchange(client, body, attempts.deadline)
            except httpx2.TimeoutException as error:
                before = f" ({attempts.summary})" if attempts.made else ""
                raise RewardError(
                    f"The reward server at {self.url} did not answer within {self._policy.timeout:g} seconds{before}. "
                    "It hangs, or it is slow: then give it more time with `timeout` or less work with `batch_size`."
                ) from error
            except httpx2.TransportError as error:
                cause = error
                problem = f"{type(error).__name__}: {redact(str(error), self._token)}"
            else:
                if not means_later(response.status_code) or _is_of_reward(response):
                    return response.status_code, response.content
                problem = f"answered {response.status_code}: {self._reason(response.content)}"
                asked = asked_delay(response.headers.get("Retry-After"))
            delay = attempts.pause(problem, asked, permanent=cause is not None and is_permanent(cause))
            if delay is not None:
                time.sleep(delay)
                continue
            if cause is None:
                raise RewardError(f"The reward server at {self.url} is not available ({attempts.summary}).")
            raise RewardError(
                f"The connection to the reward server at {self.url} failed ({attempts.summary}). Does it run there?"
            ) from cause

    def _exchange(self, client: httpx2.Client, body: bytes, deadline: float) -> httpx2.Response:
        """The answer to a request, as it came over the line."""
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
                kept = {name: value for name, value in response.headers.items() if name == "retry-after"}
                return httpx2.Response(response.status_code, headers=kept, content=bytes(answer))
        except httpx2.TransportError as error:
            if time.monotonic() < deadline:
                raise
            raise httpx2.ReadTimeout("the answer came too slowly") from error
        finally:
            hang_up.cancel()

    def _values(self, status: int, answer: bytes, number: int) -> list[float | Exception | None]:
        """The values in an answer, checked."""
        if status != 200:
            fix = {
                401: " Is `token` the token that the server was started with?",
                413: " Send fewer images at once: lower `batch_size`.",
            }.get(status, "")
            kind = RefusedRequestError if 400 <= status < 500 and status not in ABOUT_ALL else RewardError
            raise kind(f"The reward server at {self.url} answered {status}: {self._reason(answer)}{fix}")
        content = _parse(answer)
        values = content.get("values") if isinstance(content, dict) else None
        if not isinstance(values, list):
            raise RewardError(f"What answers at {self.url} is no reward server; it said {self._quote(answer)}.")
        if len(values) != number:
            raise RewardError(f"The reward server at {self.url} answered {len(values)} values for {number} images.")
        return [self._value(value) for value in values]

    def _reason(self, answer: bytes) -> str:
        """Why a request was not answered with values: what a reward server says, or the start of anything else."""
        reason = _error_of(answer)
        return self._quote(answer) if reason is None else redact(reason, self._token)

    def _quote(self, answer: bytes) -> str:
        return start_of(redact(answer.decode("utf-8", "replace"), self._token))

    def _value(self, value: Any) -> float | Exception | None:
        match value:
            case None:
                return None
            case {"error": str(message)}:
                return RewardError(redact(message, self._token))
            case int() | float() if not isinstance(value, bool) and abs(value) <= FLOAT32_MAX:
                return float(value)
        quoted = self._quote(json.dumps(value).encode("ascii"))
        raise RewardError(
            f"The reward server at {self.url} answered {quoted} for an image; a value is a finite number, or null "
            "where the reward does not apply."
        )


def _is_of_reward(response: httpx2.Response) -> bool:
    """Whether a reward server tells that the reward failed, which is no reason to ask again."""
    return response.status_code == 500 and _error_of(response.content) is not None


def _error_of(answer: bytes) -> str | None:
    """The reason that a reward server gives, `None` in the answer of anything else, such as a proxy."""
    content = _parse(answer)
    reason = content.get("error") if isinstance(content, dict) else None
    return reason if isinstance(reason, str) else None


def _parse(answer: bytes) -> Any:
    """What the JSON of an answer holds, `None` if it is none."""
    try:
        return json.loads(answer, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
