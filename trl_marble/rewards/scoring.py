# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scores batches of images or videos with several rewards at once, while the next batch is being sampled."""

import functools
import inspect
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
from .parameters import accepts_certainly
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


# What is raised for code that cannot work, whatever the image. To leave out failed images would hide it.
MISTAKES = (TypeError, NameError, AttributeError, ImportError, NotImplementedError)


class PendingScores(NamedTuple):
    """Scores on their way: a future for each reward, the prompts they are for, and what each call logs."""

    futures: list[Future]
    prompts: list[str]
    logs: list[CallLog]

    @property
    def done(self) -> bool:
        """Whether all calls have ended."""
        return all(future.done() for future in self.futures)

    def cancel(self) -> None:
        """Drop the calls that have not begun, and interrupt async ones."""
        for future in self.futures:
            future.cancel()


class Scores(NamedTuple):
    """
    What the rewards said.

    Args:
        rewards (`Tensor` of shape `[K, B]`, float32):
            NaN where a reward does not apply or failed.
        failed (`Tensor` of shape `[K, B]`, bool):
            Where a reward failed.
        errors (`list` of [`RewardError`]):
            Each failure, with what raised it as its cause.
        metrics (`Mapping[tuple[str, str], list[float]]`, *optional*):
            What rewards logged with `log_metric`: reward and metric -> its numbers.
        extras (`Mapping[tuple[str, str], list]`, *optional*):
            What rewards logged with `log_extra`: reward and column -> B values, `None` where there is none.
    """

    rewards: Tensor
    failed: Tensor
    errors: list[RewardError]
    metrics: Mapping[LogKey, list[float]] = MappingProxyType({})
    extras: Mapping[LogKey, list[Any]] = MappingProxyType({})

    @staticmethod
    def concatenate(parts: "Sequence[Scores]") -> "Scores":
        """The scores of several batches as those of one."""
        keys = dict.fromkeys(key for part in parts for key in part.metrics)
        return Scores(
            torch.cat([part.rewards for part in parts], dim=1),
            torch.cat([part.failed for part in parts], dim=1),
            [error for part in parts for error in part.errors],
            {key: [value for part in parts for value in part.metrics.get(key, [])] for key in keys},
            join_extras([(part.extras, part.rewards.shape[1]) for part in parts]),
        )


class RewardScorer:
    """
    Calls the rewards of a run.

    Sync rewards run on one thread each, so a reward is never called twice at the same time and need not be
    thread-safe; async rewards share one event loop. Threads are started on first use and end with [`close`]. No thread
    keeps the interpreter from ending.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards; strings are those of [`load_reward`]. The list is not changed.
        timeout (`float`, *optional*):
            Longest time in seconds that [`collect`] waits. Defaults to waiting for ever.

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
                The other columns of the dataset, one value a sample.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.
        """
        keyword = "videos" if isinstance(samples[0], list) else "images"
        futures, logs = [], []
        for func, name in zip(self.funcs, self.names, strict=True):
            as_tensor = getattr(func, "image_type", "pil") == "pt"
            kwargs: dict[str, Any] = {column: list(values) for column, values in columns.items()}
            kwargs[keyword] = to_tensor(samples) if as_tensor else _own_lists(samples)
            kwargs |= {"prompts": list(prompts), "trainer_state": trainer_state}
            log = CallLog(len(prompts))
            # Rewards that were written without them, and take no others, go on working.
            kwargs |= {keyword: getattr(log, keyword) for keyword in LOG_KEYWORDS if accepts_certainly(func, keyword)}
            futures.append(self._start(func, name, kwargs))
            logs.append(log)
        return PendingScores(futures, list(prompts), logs)

    def collect(self, pending: PendingScores, deadline: float | None = None) -> Scores:
        """
        Wait for scores.

        A reward fails for all images of a call by raising or by taking too long, and for single images by answering
        an exception, or an infinite number ([`InfiniteRewardError`]), in the place of a number. All are told in the
        result, so that the caller can decide.

        Args:
            pending ([`PendingScores`]):
                What [`submit`] gave.
            deadline (`float`, *optional*):
                When to stop waiting, as `time.monotonic()` counts: one for several batches, so that their waits do not
                add up. Defaults to `timeout` seconds from now.

        Raises:
            [`RewardError`]: If a reward answered what is neither a reward nor a failure: that is a mistake in it.
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
        )

    def failures(self, pending: PendingScores) -> list[RewardError]:
        """
        The failures of the calls that have ended by now.

        Args:
            pending ([`PendingScores`]):
                What [`submit`] gave.

        Raises:
            [`RewardError`]: As [`collect`] does.
        """
        ended = [(future, name) for future, name in self._named(pending) if future.done()]
        return [error for future, name in ended for error in self._read(future, name, pending.prompts).errors]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """
        Let the rewards that are models score on a device, in a dtype unless they chose their own. All rewards find it
        as the current device, which each thread has its own of.
        """
        self._device = device
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward):
                func.to(device, dtype)

    def release(self) -> None:
        """Let the rewards that are models leave the device, where they were asked to."""
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward):
                func.release()

    def close(self) -> None:
        """
        Stop the threads. They start again when needed.

        Calls that wait for their turn are dropped, async ones are interrupted, and a sync one that runs is left
        behind: nothing can end it, and it may hang.
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
        """What one reward answered. A call that has not ended by now is given up."""
        answer = self._answer(future)
        if isinstance(answer, BaseException):  # not even an exit on a thread of a reward is one of the run
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
        """What a call returned, or the exception that it raised or that came of waiting too long."""
        if not future.done():
            future.cancel()  # for a call that still waits for its turn, or an async one
            return TimeoutError(f"no answer after {self.timeout:g} seconds (`reward_timeout`)")
        try:
            error = future.exception()
        except CancelledError as cancelled:
            return cancelled
        return future.result() if error is None else error

    def _start(self, func: Callable, name: str, kwargs: dict[str, Any]) -> Future:
        if _is_async(func):
            if self._loop is None:
                self._loop = EventLoopThread("async-rewards", self._device)
            return self._loop.submit(functools.partial(func, **kwargs))
        if name not in self._threads:
            self._threads[name] = Worker(f"reward-{name}", self._device)
        return self._threads[name].submit(functools.partial(func, **kwargs))


def _failure(name: str, error: BaseException, prompts: list[str], has_answered: bool) -> RewardError:
    """What to tell of a failure for some images."""
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


def _is_async(func: Any) -> bool:
    """Whether calling a reward gives a coroutine: an async function or an object with an async `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    if isinstance(func, FrameReward):
        return _is_async(func.reward)
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _own_lists(samples: Sequence[Sample]) -> list[Sample]:
    """The same images, in RGB, in lists that a reward may change."""
    return [[to_rgb(frame) for frame in sample] if isinstance(sample, list) else to_rgb(sample) for sample in samples]
