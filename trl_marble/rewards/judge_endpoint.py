# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Questions about images to a vision-language model at an OpenAI-compatible endpoint, and what its answers contain."""

import asyncio
import base64
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import httpx2
from PIL import Image

from ..media import to_rgb
from .http_client import (
    ABOUT_ALL,
    PLAIN_JSON,
    bearer,
    check_secret,
    check_url,
    encode_png,
    open_async_client,
    redact,
    start_of,
)
from .judge_score import remove_thoughts
from .protocol import RewardError
from .retry import Attempts, RetryPolicy, asked_delay, is_permanent, means_later


LARGEST_ANSWER = 2**22  # bytes; far more than a model writes about an image
# The `finish_reason` of servers for an answer that the model itself ended.
ENDED_BY_MODEL = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")


class NoAnswerError(RewardError):
    """A request that the judge did not answer, for a reason other than its content."""


class UnscoredError(RewardError):
    """An answer of the judge without a certain score for the image."""


class RefusedImageError(UnscoredError):
    """A request that the endpoint refused, because of its image or prompt or for a general reason."""


class Question(NamedTuple):
    """Images and a text about them. Several images are numbered from 1 on."""

    images: Sequence[Image.Image]
    text: str


class Answer(NamedTuple):
    """
    What the model answered.

    Args:
        texts (`list[str]`):
            The answer, in all ways in which its parts may belong together; thoughts between tags are still in it.
        ended_by (`str`, *optional*):
            What ended the answer, where that was not the model: `"length"`, `"content_filter"`, ...
        was_thinking (`bool`):
            Whether there are thoughts, and nothing after them.
        tokens (`list[dict]`, *optional*):
            The tokens with their log-probabilities, as the endpoint sent them.
        shown (`str`):
            The start of the answer, quoted, for messages.
    """

    texts: list[str]
    ended_by: str | None
    was_thinking: bool
    tokens: list[dict[str, Any]] | None
    shown: str

    def check_complete(self) -> None:
        """
        Refuse an answer that was cut off.

        Raises:
            `UnscoredError`: If it was; says how to fix it.
        """
        if self.ended_by is None:
            return
        fix = " (raise `max_tokens` in `request_options`)" if self.ended_by == "length" else ""
        where = ""
        if self.was_thinking:
            where = (
                " in the middle of the model's thoughts, before it answered. Give it more tokens, or switch thinking "
                'off, for many models by {"chat_template_kwargs": {"enable_thinking": False}} in `request_options`'
            )
        raise UnscoredError(
            f"The answer was cut off: it ended by {start_of(self.ended_by)}{fix}{where}. The judge answered "
            f"{self.shown}."
        )


class JudgeEndpoint:
    """
    A model at an endpoint. Calls may overlap and may come from different event loops.

    Args:
        model, base_url, api_key, request_options, max_concurrency, timeout, max_retries:
            See [`VLMJudge`].

    Raises:
        `ValueError`: If an argument has an impossible value. No message contains the key.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None,
        request_options: dict[str, Any] | None,
        max_concurrency: int,
        timeout: float,
        max_retries: int | None,
    ) -> None:
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be at least 1, got {max_concurrency}.")
        taken = {"model", "messages", "n", "stream"} & set(request_options or {})
        if taken:
            raise ValueError(f"`request_options` sets {sorted(taken)}, which the judge sets itself.")
        self.model = model
        self.base_url = check_url(base_url, "base_url")
        self.request_options = {"temperature": 0, "max_tokens": 512} | (request_options or {})
        self.max_concurrency = max_concurrency
        self._policy = RetryPolicy(timeout, max_retries)
        if api_key is None:
            self._api_key = check_secret(os.environ.get("OPENAI_API_KEY"), "OPENAI_API_KEY")
        else:
            self._api_key = check_secret(api_key, "api_key")
        # A semaphore belongs to the event loop that it is used in, and the trainer may replace its loop.
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def ask(self, questions: Sequence[Question], read: Callable[[Answer, Question], Any]) -> list[Any]:
        """
        Ask questions.

        Args:
            questions (`Sequence[Question]`):
                What to ask.
            read (`Callable[[Answer, Question], Any]`):
                Gives the value of an answer to a question, or raises `ValueError` or `UnscoredError` if it is
                uncertain.

        Returns:
            `list`: for each question the value, or a [`RewardError`] if there was no answer or an uncertain one.

        Raises:
            [`RewardError`]: If the endpoint refuses the key or the model, refuses every question (status 403 and the
                like), or is dead: no answer to 8 consecutive questions (`max_concurrency` if that is more), or to
                every one of fewer questions.
        """
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.max_concurrency))
        unanswered = 0  # consecutive questions
        too_many = min(len(questions), max(8, self.max_concurrency))

        async def value_of(question: Question) -> Any:
            nonlocal unanswered
            async with slots:
                try:
                    value = self._value(await self._answer(client, question), question, read)
                except NoAnswerError as error:
                    unanswered += 1
                    # Not to wait for every question of a large batch in turn.
                    if unanswered >= too_many:
                        raise
                    return error
                except UnscoredError as error:
                    value = error
                unanswered = 0
                return value

        # A client for each call: connections belong to an event loop, too.
        async with open_async_client(self.base_url, self.max_concurrency) as client:
            failures: list[Exception] = []
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(value_of(question)) for question in questions]
            except* Exception as raised:
                failures.extend(raised.exceptions)
            if failures:
                raise failures[0]
        values = [task.result() for task in tasks]
        refusals = [value for value in values if isinstance(value, RefusedImageError)]
        if refusals and len(refusals) == len(values):
            raise RewardError(f"The judge refused every image. {refusals[0]} Check `api_key`.") from refusals[0]
        return values

    async def _answer(self, client: httpx2.AsyncClient, question: Question) -> httpx2.Response:
        """The response to a question, which is asked until there is one."""
        body = await asyncio.to_thread(self._request, question)  # compression would stop the event loop
        headers = PLAIN_JSON | bearer(self._api_key)
        attempts = Attempts(f"The judge at {self.base_url}", self._policy)
        while True:
            asked, permanent = 0.0, False
            try:
                async with asyncio.timeout(attempts.left):
                    response = await self._exchange(client, body, headers)
            except TimeoutError as error:
                before = f" ({attempts.summary})" if attempts.made else ""
                raise NoAnswerError(
                    f"The judge at {self.base_url} did not answer within {self._policy.timeout:g} seconds{before}. It "
                    "hangs, or it is slow: then give it more time with `timeout` or less work with `max_concurrency`."
                ) from error
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {redact(str(error), self._api_key)}"
                permanent = is_permanent(error)
            else:
                if not means_later(response.status_code):
                    return response
                problem = f"status {response.status_code}: {self._quote(response.text)}"
                asked = asked_delay(response.headers.get("Retry-After"))
            delay = attempts.pause(problem, asked, permanent)
            if delay is None:
                raise NoAnswerError(f"The judge at {self.base_url} did not answer ({attempts.summary}).")
            await asyncio.sleep(delay)

    async def _exchange(self, client: httpx2.AsyncClient, body: bytes, headers: dict[str, str]) -> httpx2.Response:
        """The answer to a request, as it came over the line."""
        async with client.stream(
            "POST", f"{self.base_url}/chat/completions", content=body, headers=headers
        ) as response:
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > LARGEST_ANSWER:
                    raise UnscoredError(f"The judge at {self.base_url} answered more than {LARGEST_ANSWER} bytes.")
        kept = {name: value for name, value in response.headers.items() if name == "retry-after"}
        return httpx2.Response(response.status_code, headers=kept, content=bytes(content))

    def _request(self, question: Question) -> bytes:
        content: list[dict[str, Any]] = []
        for number, image in enumerate(question.images, 1):
            picture = base64.b64encode(encode_png(to_rgb(image))).decode("ascii")
            if len(question.images) > 1:
                content.append({"type": "text", "text": f"Image {number}:"})
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}})
        content.append({"type": "text", "text": question.text})
        options = {name: value for name, value in self.request_options.items() if value is not None}
        request = {"model": self.model, "messages": [{"role": "user", "content": content}]} | options
        return json.dumps(request).encode("ascii")

    def _value(self, response: httpx2.Response, question: Question, read: Callable[[Answer, Question], Any]) -> Any:
        """The value of an answer."""
        answer = self._read(response)
        try:
            return read(answer, question)
        except ValueError as error:
            raise UnscoredError(f"{error} The judge answered {answer.shown}.") from None

    def _read(self, response: httpx2.Response) -> Answer:
        """What a response contains, if it is that of a chat."""
        body = self._quote(response.text)
        status = response.status_code
        if status in (400, 413, 422):  # about this image or prompt: too large, too long, ...
            raise UnscoredError(f"The judge refused a request with status {status}: {body}.")
        if 400 <= status < 500 and status not in ABOUT_ALL:
            raise RefusedImageError(f"The judge at {self.base_url} refused a request with status {status}: {body}.")
        if status != 200:
            fix = {
                401: " Check `api_key`.",
                404: f" Check `base_url` and the model {self.model!r}.",
            }.get(status, "")
            raise RewardError(f"The judge at {self.base_url} answered status {status}: {body}.{fix}")
        try:
            choice = response.json()["choices"][0]
            message = choice["message"]
            texts = _texts(message["content"])
            reason = choice.get("finish_reason")
            apart = message.get("reasoning_content") or message.get("reasoning")
            tokens = (choice.get("logprobs") or {}).get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UnscoredError(
                f"What the judge at {self.base_url} answered is not a chat completion: {body}."
            ) from None
        return Answer(
            texts,
            ended_by=redact(str(reason), self._api_key)
            if reason and str(reason).lower() not in ENDED_BY_MODEL
            else None,
            was_thinking=bool(apart or texts[0].strip()) and not remove_thoughts(texts[0]).strip(),
            tokens=tokens,
            shown=self._quote(texts[0]),
        )

    def _quote(self, text: str) -> str:
        return start_of(redact(text, self._api_key))


def _texts(content: Any) -> list[str]:
    """
    The text of an answer, which is a string, `None` where a model said nothing, or a list of parts.

    Of parts those count that are text, not what the model thought or made. It is not said whether a line ends where a
    part ends, so the text comes in both ways, unless there is one part.

    Raises:
        `TypeError` or `KeyError`: If it is anything else.
    """
    if isinstance(content, list):
        parts = [part["text"] for part in content if part["type"] in ("text", "output_text")]
        joined = ["".join(parts), "\n".join(parts)]
        return joined if len(parts) > 1 else joined[:1]
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content of type {type(content).__name__}")
    return [content or ""]
