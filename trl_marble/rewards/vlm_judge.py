# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A vision-language model at an HTTP endpoint as a judge of images."""

import asyncio
import base64
import json
import os
from typing import Any
from weakref import WeakKeyDictionary

import httpx2
from PIL import Image

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
from .judge_score import parse_score
from .model_reward import to_rgb
from .protocol import RewardError
from .retry import Attempts, RetryPolicy, asked_delay, is_permanent, means_later


# UnifiedReward was trained with the names of the two criteria, the scale, 'Final Score:' and the last line (pointwise
# scoring of image generation).
UNIFIED_REWARD_TEMPLATE = """\
You see an image that was generated from a text caption. Evaluate this image on two key criteria:
1. Alignment with the Caption: does the image show what the caption asks for? Look at the objects, their attributes \
and how they relate to each other.
2. Overall Image Quality: does the image look good? Look at clarity, fine detail, accurate colors and aesthetic appeal.
Weigh both criteria and assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

LARGEST_ANSWER = 2**22  # bytes; far more than a model writes about an image
# The `finish_reason` of servers for an answer that the model itself ended.
ENDED_BY_MODEL = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")


class NoAnswerError(RewardError):
    """A request that the judge did not answer, for a reason other than its content."""


class UnscoredError(RewardError):
    """An answer of the judge without a certain score for the image."""


class RefusedImageError(UnscoredError):
    """A request that the endpoint refused, because of its image or prompt or for a general reason."""


class VLMJudge:
    """
    A vision-language model that judges how well an image shows its prompt and how good it looks.

    The model is at an OpenAI-compatible endpoint: vLLM, SGLang or a service. Template, label and range are those of
    UnifiedReward (https://huggingface.co/papers/2503.05236) with pointwise scores; with others, every model that
    follows instructions can be a judge. The wording of the template is our own. To compare with numbers published for
    a model, pass the template of its authors.

    The value is `(score - low) / (high - low)`, so 1 to 5 becomes 0 to 1. Papers report the score itself, `1 + 4 *
    value`, or a fifth of it; this does not change the advantages, which are normalized.

    An answer whose score is uncertain is a failure of its image, never a number: one that was cut off, or has several
    scores, a score on another scale, a sum, or a score only in the thoughts of the model (`<think>`).

    Transparent images are put on white. Calls may overlap and may come from different event loops.

    Args:
        model (`str`):
            Name of the model on the endpoint, such as `"CodeGoat24/UnifiedReward-qwen-7b"`.
        base_url (`str`):
            The endpoint, up to and with `/v1`: `"http://127.0.0.1:8000/v1"`.
        api_key (`str`, *optional*):
            Key of the endpoint. Defaults to the environment variable `OPENAI_API_KEY`; an empty string sends none.
        prompt_template (`str`, *optional*, defaults to `UNIFIED_REWARD_TEMPLATE`):
            The question about each image. `{prompt}` is replaced by its prompt; other braces stay.
        score_label (`str`, *optional*, defaults to `"Final Score"`):
            The words before the score in the model's answer, in any case. UnifiedReward 2.0 writes three scores, each
            of which can be a reward: `"Alignment Score"`, `"Coherence Score"` and `"Style Score"`.
        score_range (`tuple[float, float]`, *optional*, defaults to `(1.0, 5.0)`):
            Lowest and highest score. A score outside is a failure; it is not clipped.
        request_options (`dict`, *optional*):
            Further fields of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`. They are
            added to `{"temperature": 0, "max_tokens": 512}`; `None` as a value removes a field.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of simultaneous requests, over all calls of the process.
        timeout (`float`, *optional*, defaults to `300.0`):
            Longest time in seconds for the answer for one image, retries included.
        max_retries (`int`, *optional*):
            How often a request is sent again, within `timeout`, after its connection failed or was refused, or after a
            status that means "later": 408, 425, 429 and 5xx except 501 and 505. The delay doubles each time up to 8
            seconds, with jitter, and is at least what the endpoint asks for. Defaults to no limit but `timeout`.

    Attributes:
        applies_to (`str`): In words, the images that the reward applies to.
        value_range (`str`): In words, the scale of the reward.

    Raises:
        `ValueError`: If an argument has an impossible value. No message contains the key.
    """

    applies_to = "every image"
    value_range = "0 to 1, the score's range made linear: 1 to 5 by default"

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        prompt_template: str = UNIFIED_REWARD_TEMPLATE,
        score_label: str = "Final Score",
        score_range: tuple[float, float] = (1.0, 5.0),
        request_options: dict[str, Any] | None = None,
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int | None = None,
    ) -> None:
        if "{prompt}" not in prompt_template:
            raise ValueError(f"`prompt_template` has no {{prompt}}, which stands for the prompt: {prompt_template!r}.")
        if not score_label.strip():
            raise ValueError("`score_label` is empty; give the words in front of the score, such as 'Final Score'.")
        if not score_range[0] < score_range[1]:
            raise ValueError(f"`score_range` is {score_range}; the lowest score comes first.")
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be at least 1, got {max_concurrency}.")
        taken = {"model", "messages", "n", "stream"} & set(request_options or {})
        if taken:
            raise ValueError(f"`request_options` sets {sorted(taken)}, which the judge sets itself.")
        self.model = model
        self.base_url = check_url(base_url, "base_url")
        self.prompt_template = prompt_template
        self.score_label = score_label
        self.score_range = score_range
        self.request_options = {"temperature": 0, "max_tokens": 512} | (request_options or {})
        self.max_concurrency = max_concurrency
        self._policy = RetryPolicy(timeout, max_retries)
        if api_key is None:
            self._api_key = check_secret(os.environ.get("OPENAI_API_KEY"), "OPENAI_API_KEY")
        else:
            self._api_key = check_secret(api_key, "api_key")
        # A semaphore belongs to the event loop that it is used in, and the trainer may replace its loop.
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: list,
    ) -> list[float | Exception | None]:
        """
        Judge images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any mode and size.
            prompts (`list[str]`):
                Their prompts.
            trainer_state, log_metric, log_extra (*optional*):
                Not used.
            columns (`list`):
                Not used.

        Returns:
            `list[float | Exception | None]`: For each image a value in [0, 1], or a [`RewardError`] if the judge did
            not answer or its answer has no certain score.

        Raises:
            [`RewardError`]: If the endpoint refuses the key or the model, refuses every image (status 403 and the
                like), or is dead: no answer for 8 consecutive images (`max_concurrency` if that is more), or for every
                image of a smaller batch.
        """
        slots = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.max_concurrency))
        unanswered = 0  # consecutive images
        too_many = min(len(images), max(8, self.max_concurrency))

        async def value_of(image: Image.Image, prompt: str) -> float | Exception:
            nonlocal unanswered
            async with slots:
                try:
                    value: float | Exception = await self._judge(client, image, prompt)
                except NoAnswerError as error:
                    unanswered += 1
                    # Not to wait for every image of a large batch in turn.
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
                    tasks = [
                        group.create_task(value_of(image, prompt))
                        for image, prompt in zip(images, prompts, strict=True)
                    ]
            except* Exception as raised:
                failures.extend(raised.exceptions)
            if failures:
                raise failures[0]
        values: list[float | Exception | None] = [task.result() for task in tasks]
        refusals = [value for value in values if isinstance(value, RefusedImageError)]
        if refusals and len(refusals) == len(values):
            raise RewardError(f"The judge refused every image. {refusals[0]} Check `api_key`.") from refusals[0]
        return values

    async def _judge(self, client: httpx2.AsyncClient, image: Image.Image, prompt: str) -> float:
        """The value of one image, asked for until there is an answer."""
        body = await asyncio.to_thread(self._request, image, prompt)  # compression would stop the event loop
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
                    return self._value(response)
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

    def _request(self, image: Image.Image, prompt: str) -> bytes:
        picture = base64.b64encode(encode_png(to_rgb(image))).decode("ascii")
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": self.prompt_template.replace("{prompt}", prompt)},
        ]
        options = {name: value for name, value in self.request_options.items() if value is not None}
        request = {"model": self.model, "messages": [{"role": "user", "content": content}]} | options
        return json.dumps(request).encode("ascii")

    def _value(self, response: httpx2.Response) -> float:
        """The value that an answer gives."""
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
            answers = _texts(choice["message"]["content"])
            reason = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UnscoredError(
                f"What the judge at {self.base_url} answered is not a chat completion: {body}."
            ) from None
        shown = self._quote(answers[0])
        if reason and str(reason).lower() not in ENDED_BY_MODEL:
            fix = " (raise `max_tokens` in `request_options`)" if reason == "length" else ""
            raise UnscoredError(
                f"The answer was cut off: it ended by {self._quote(str(reason))}{fix}. The judge answered {shown}."
            )
        try:
            scores = {parse_score(answer, self.score_label, self.score_range) for answer in answers}
        except ValueError as error:
            raise UnscoredError(f"{error} The judge answered {shown}.") from None
        if len(scores) > 1:
            raise UnscoredError(f"The parts of the answer have different scores. The judge answered {shown}.")
        low, high = self.score_range
        return (scores.pop() - low) / (high - low)

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
