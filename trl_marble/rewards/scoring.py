# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Score batches of images or videos with several rewards at once, while the next batch is sampled."""

import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..media import Sample, to_rgb, to_tensor
from .call_log import LOG_KEYWORDS, CallLog, LogKey, join_extras
from .frame_reward import FrameReward
from .model_reward import ModelReward
from .parameters import accepts_log_function
from .protocol import (
    BrokenRewardError,
    InfiniteRewardError,
    RewardError,
    RewardFunc,
    errors_for_infinite,
    most_common_prompts,
    reward_names,
    reward_tensor,
    validate_reward_funcs,
)
from .threads import EventLoopThread, Worker, wait_until


# Exceptions of code that is wrong whatever the image. Leaving out the failed images would hide it.
MISTAKES = (TypeError, NameError, AttributeError, ImportError, NotImplementedError)


class PendingScores(NamedTuple):
    """Scores that are being computed: one future per reward, the prompts, and the log of each call."""

    futures: list[Future]
    prompts: list[str]
    logs: list[CallLog]

    @property
    def done(self) -> bool:
        """Whether all calls have ended."""
        return all(future.done() for future in self.futures)

    def cancel(self) -> None:
        """Drop the calls that have not begun, and cancel async ones."""
        for future in self.futures:
            future.cancel()


class Scores(NamedTuple):
    """
    The scores of a batch by all rewards.

    Args:
        rewards (`Tensor` of shape `[K, B]`, float32):
            The scores; NaN where a reward does not apply or failed.
        failed (`Tensor` of shape `[K, B]`, bool):
            Where a reward failed.
        errors (`list` of [`RewardError`]):
            Each failure, with the exception of the reward as its cause.
        metrics (`Mapping[tuple[str, str], list[float]]`, *optional*):
            Numbers that rewards logged with `log_metric`: reward and metric -> its numbers.
        extras (`Mapping[tuple[str, str], list]`, *optional*):
            Columns that rewards logged with `log_extra`: reward and column -> B values, `None` where there is none.
        seconds (`Mapping[str, float]`, *optional*):
            Reward -> how long its calls took, added up; calls of one batch run beside those of other rewards.
    """

    rewards: Tensor
    failed: Tensor
    errors: list[RewardError]
    metrics: Mapping[LogKey, list[float]] = MappingProxyType({})
    extras: Mapping[LogKey, list[Any]] = MappingProxyType({})
    seconds: Mapping[str, float] = MappingProxyType({})

    @staticmethod
    def concatenate(parts: "Sequence[Scores]") -> "Scores":
        """Join the scores of several batches."""
        keys = dict.fromkeys(key for part in parts for key in part.metrics)
        return Scores(
            torch.cat([part.rewards for part in parts], dim=1),
            torch.cat([part.failed for part in parts], dim=1),
            [error for part in parts for error in part.errors],
            {key: [value for part in parts for value in part.metrics.get(key, [])] for key in keys},
            join_extras([(part.extras, part.rewards.shape[1]) for part in parts]),
            {
                name: math.fsum(part.seconds.get(name, 0.0) for part in parts)
                for name in dict.fromkeys(name for part in parts for name in part.seconds)
            },
        )


class RewardScorer:
    """
    Calls the rewards of a run.

    Each sync reward has its own thread, so a reward is never called twice at the same time and need not be
    thread-safe; async rewards share one event loop. Threads are started when they are first used and end with
    [`close`]. No thread prevents the interpreter from ending.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards; strings are names for [`load_reward`]. The list is not changed.
        timeout (`float`, *optional*):
            Longest time in seconds that [`collect`] waits. Defaults to no limit.

    Attributes:
        names (`list[str]`): The unique name of each reward.
    """

    def __init__(
        self, reward_funcs: str | RewardFunc | Sequence[str | RewardFunc], timeout: float | None = None
    ) -> None:
        self.funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(self.funcs)
        self.timeout = timeout
        self._device = torch.device("cpu")
        self._answered: set[str] = set()  # the rewards that have scored an image
        self._threads: dict[str, Worker] = {}
        self._loop: EventLoopThread | None = None

    def __len__(self) -> int:
        return len(self.funcs)

    def submit(
        self, samples: Sequence[Sample], prompts: list[str], columns: dict[str, list], trainer_state: Any
    ) -> PendingScores:
        """
        Start scoring and return at once.

        Args:
            samples (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
                The images or videos, of any mode; rewards get them in RGB.
            prompts (`list[str]`):
                Their prompts.
            columns (`dict[str, list]`):
                The other columns of the dataset, one value per sample.
            trainer_state ([`~transformers.TrainerState`]):
                Passed to the rewards.
        """
        keyword = "videos" if isinstance(samples[0], list) else "images"
        futures, logs = [], []
        for func, name in zip(self.funcs, self.names, strict=True):
            as_tensor = getattr(func, "image_type", "pil") == "pt"
            kwargs: dict[str, Any] = {column: list(values) for column, values in columns.items()}
            kwargs[keyword] = to_tensor(samples) if as_tensor else _own_lists(samples)
            kwargs |= {"prompts": list(prompts), "trainer_state": trainer_state}
            log = CallLog(len(prompts))
            # Only to rewards that accept them: others work without.
            kwargs |= {key: getattr(log, key) for key in LOG_KEYWORDS if accepts_log_function(func, key)}
            futures.append(self._start(func, name, kwargs, log))
            logs.append(log)
        return PendingScores(futures, list(prompts), logs)

    def collect(self, pending: PendingScores, deadline: float | None = None) -> Scores:
        """
        Wait for scores.

        A reward fails for all images of a call if it raises or takes too long, and for single images if it returns an
        exception or an infinite number ([`InfiniteRewardError`]) for them. The result has all failures, and the caller
        decides what to do.

        Args:
            pending ([`PendingScores`]):
                The result of [`submit`].
            deadline (`float`, *optional*):
                When to stop waiting, in the time of `time.monotonic()`. With the same deadline for several batches
                their waits do not add up. Defaults to `timeout` seconds from now.

        Raises:
            [`RewardError`]: If a reward returned something that is neither a reward nor a failure, which is a mistake
                in its code.
        """
        if deadline is None and self.timeout is not None:
            deadline = time.monotonic() + self.timeout
        wait_until(pending.futures, deadline)
        read = [self._read(future, name, pending.prompts) for future, name in self._named(pending)]
        logs = list(zip(self.names, pending.logs, strict=True))
        return Scores(
            torch.stack([part.rewards[0] for part in read]),
            torch.stack([part.failed[0] for part in read]),
            [error for part in read for error in part.errors],
            {(name, metric): values for name, log in logs for metric, values in log.metrics.items()},
            {(name, column): values for name, log in logs for column, values in log.extras.items()},
            {name: log.seconds for name, log in logs},
        )

    def failures(self, pending: PendingScores) -> list[RewardError]:
        """
        The failures of those calls that have ended.

        Args:
            pending ([`PendingScores`]):
                The result of [`submit`].

        Raises:
            [`RewardError`]: As in [`collect`].
        """
        ended = [(future, name) for future, name in self._named(pending) if future.done()]
        return [error for future, name in ended for error in self._read(future, name, pending.prompts).errors]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """
        Set the device of the rewards that are models, and their dtype unless they have their own. It also becomes the
        current device of every thread of a reward.
        """
        self._device = device
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward):
                func.to(device, dtype)

    def release(self) -> None:
        """Move the rewards that are models with `offload` to the CPU."""
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward):
                func.release()

    def close(self) -> None:
        """
        Stop the threads. They start again when needed.

        Calls that have not begun are dropped and async calls are cancelled. A sync call that is running goes on, since
        nothing can end it, but nobody waits for it.
        """
        for worker in self._threads.values():
            worker.stop()
        self._threads.clear()
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def _named(self, pending: PendingScores) -> list[tuple[Future, str]]:
        return list(zip(pending.futures, self.names, strict=True))

    def _read(self, future: Future, name: str, prompts: list[str]) -> Scores:
        """The scores of one reward. A call that has not ended has failed."""
        answer = self._answer(future)
        if isinstance(answer, BaseException):  # also SystemExit: on the thread of a reward it does not end the run
            nothing = torch.full((1, len(prompts)), torch.nan)
            return Scores(nothing, nothing.isnan(), [_failure(name, answer, prompts, name in self._answered)])
        answer = errors_for_infinite(answer, name, prompts)
        rewards = reward_tensor(answer, name, prompts)
        failed = torch.tensor([isinstance(value, Exception) for value in answer])
        errors = [
            value if isinstance(value, InfiniteRewardError) else _failure(name, value, [prompt], True)
            for value, prompt in zip(answer, prompts, strict=True)
            if isinstance(value, Exception)
        ]
        if not failed.all():
            self._answered.add(name)
        return Scores(rewards[None], failed[None], errors)

    def _answer(self, future: Future) -> Any:
        """The value that a call returned, or the exception that it raised, or a `TimeoutError`."""
        if not future.done():
            future.cancel()  # has an effect if the call has not begun or is async
            return TimeoutError(f"no answer after {self.timeout:g} seconds (`reward_timeout`)")
        try:
            error = future.exception()
        except CancelledError as cancelled:
            return cancelled
        return future.result() if error is None else error

    def _start(self, func: Callable, name: str, kwargs: dict[str, Any], log: CallLog) -> Future:
        if _is_async(func):
            if self._loop is None:
                self._loop = EventLoopThread("async-rewards", self._device)
            return self._loop.submit(functools.partial(_timed_async, log, func, kwargs))
        if name not in self._threads:
            self._threads[name] = Worker(f"reward-{name}", self._device)
        return self._threads[name].submit(functools.partial(_timed, log, func, kwargs))


def _failure(name: str, error: BaseException, prompts: list[str], has_answered: bool) -> RewardError:
    """The error for a failure, with the prompts of its images."""
    number = "one image" if len(prompts) == 1 else f"batch of {len(prompts)} images"
    text = f"Reward `{name}` raised {type(error).__name__}: {error} ({number} for {most_common_prompts(prompts)})."
    failure: RewardError
    if isinstance(error, MISTAKES):
        failure = BrokenRewardError(text)
    elif not has_answered:
        failure = BrokenRewardError(f"{text} It has not scored any image so far.")
    else:
        failure = RewardError(text)
    failure.__cause__ = error
    return failure


def _timed(log: CallLog, func: Callable, kwargs: dict[str, Any]) -> Any:
    """Call a reward and note how long it took."""
    start = time.perf_counter()
    try:
        return func(**kwargs)
    finally:
        log.seconds = time.perf_counter() - start


async def _timed_async(log: CallLog, func: Callable, kwargs: dict[str, Any]) -> Any:
    """Call an async reward and note how long it took."""
    start = time.perf_counter()
    try:
        return await func(**kwargs)
    finally:
        log.seconds = time.perf_counter() - start


def _is_async(func: Any) -> bool:
    """Whether a reward is an async function, or an object with an async `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    if isinstance(func, FrameReward):
        return _is_async(func.reward)
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _own_lists(samples: Sequence[Sample]) -> list[Sample]:
    """The images in RGB, in new lists that a reward may change."""
    return [[to_rgb(frame) for frame in sample] if isinstance(sample, list) else to_rgb(sample) for sample in samples]
