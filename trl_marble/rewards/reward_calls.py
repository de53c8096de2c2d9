# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Calls of rewards: what they are shown, on which threads they run, and those that are on their way."""

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from ..media import Sample, to_rgb, to_tensor
from .call_log import CallLog
from .frame_reward import FrameReward
from .protocol import reward_image_type, without_partials
from .threads import EventLoopThread, Worker


class PendingScores(NamedTuple):
    """
    Scores that are being computed: one future for each reward that was asked, the prompts, the log of each call, and
    which of the scorer's rewards were asked.
    """

    futures: list[Future]
    prompts: list[str]
    logs: list[CallLog]
    rows: list[int]

    @property
    def done(self) -> bool:
        """Whether all calls have ended."""
        return all(future.done() for future in self.futures)

    def cancel(self) -> None:
        """Drop the calls that have not begun, and cancel async ones."""
        for future in self.futures:
            future.cancel()


class RewardCalls:
    """
    Starts calls of rewards: those of a sync reward one after the other on a thread of its own, async ones together on
    one event loop. Threads are started when they are first used.

    Attributes:
        device (`torch.device`): The current device of every thread that is started from now on.
        threads (`dict[str, Worker]`): Name of each sync reward that was called -> its thread.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.threads: dict[str, Worker] = {}
        self._loop: EventLoopThread | None = None

    def start(self, func: Callable, name: str, kwargs: dict[str, Any], log: CallLog) -> Future:
        """Start a call of the reward of that name, or of one of its methods, and return at once."""
        if _is_async(func):
            if self._loop is None:
                self._loop = EventLoopThread("async-rewards", self.device)
            return self._loop.submit(functools.partial(_timed_async, log, func, kwargs))
        if name not in self.threads:
            self.threads[name] = Worker(f"reward-{name}", self.device)
        return self.threads[name].submit(functools.partial(_timed, log, func, kwargs))

    def stop(self) -> None:
        """Stop the threads, see [`~trl_marble.rewards.RewardScorer.close`]. They start again when needed."""
        for worker in self.threads.values():
            worker.stop()
        self.threads.clear()
        if self._loop is not None:
            self._loop.stop()
            self._loop = None


def media_keyword(func: Callable, samples: Sequence[Sample]) -> dict[str, Any]:
    """The keyword with the images or videos as a reward gets them: in RGB, in new lists that it may change."""
    keyword = "videos" if isinstance(samples[0], list) else "images"
    if reward_image_type(func) == "pt":
        return {keyword: to_tensor(samples)}
    return {keyword: [[to_rgb(frame) for frame in s] if isinstance(s, list) else to_rgb(s) for s in samples]}


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
    func = without_partials(func)
    if isinstance(func, FrameReward):
        return _is_async(func.reward)
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)
