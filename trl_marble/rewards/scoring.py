# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scores batches of images or videos with several rewards at once, while the next batch is being sampled."""

import asyncio
import functools
import inspect
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..media import Sample, to_rgb, to_tensor
from .frame_reward import FrameReward
from .model_reward import ModelReward
from .protocol import (
    InfiniteRewardError,
    RewardError,
    RewardFunc,
    errors_for_infinite,
    most_common_prompts,
    reward_names,
    reward_tensor,
    validate_reward_funcs,
)


class PendingScores(NamedTuple):
    """Scores on their way: one future a reward, and the prompts they are for."""

    futures: list[Future]
    prompts: list[str]


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
    """

    rewards: Tensor
    failed: Tensor
    errors: list[RewardError]

    @staticmethod
    def concatenate(parts: "Sequence[Scores]") -> "Scores":
        """The scores of several batches as those of one."""
        return Scores(
            torch.cat([part.rewards for part in parts], dim=1),
            torch.cat([part.failed for part in parts], dim=1),
            [error for part in parts for error in part.errors],
        )


class RewardScorer:
    """
    Calls the rewards of a run.

    Sync rewards run on one thread each, so a reward is never called twice at the same time and need not be
    thread-safe; async rewards share one event loop. Threads are started on first use and end with [`close`].

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards; strings are those of [`load_reward`]. The list is not changed.
        timeout (`float`, *optional*):
            Longest time in seconds to wait for one call of a reward. Defaults to waiting for ever.

    Attributes:
        names (`list[str]`): The unique name of each reward.
    """

    def __init__(
        self, reward_funcs: str | RewardFunc | Sequence[str | RewardFunc], timeout: float | None = None
    ) -> None:
        self.funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(self.funcs)
        self.timeout = timeout
        self._threads: dict[str, _Worker] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

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
        futures = []
        for func, name in zip(self.funcs, self.names, strict=True):
            as_tensor = getattr(func, "image_type", "pil") == "pt"
            kwargs: dict[str, Any] = {column: list(values) for column, values in columns.items()}
            kwargs[keyword] = to_tensor(samples) if as_tensor else _own_lists(samples)
            kwargs |= {"prompts": list(prompts), "trainer_state": trainer_state}
            futures.append(self._start(func, name, kwargs))
        return PendingScores(futures, list(prompts))

    def collect(self, pending: PendingScores) -> Scores:
        """
        Wait for scores.

        A reward fails for all images of a call by raising or by taking too long, and for single images by answering
        an exception, or an infinite number ([`InfiniteRewardError`]), in the place of a number. All are told in the
        result, so that the caller can decide.

        Raises:
            [`RewardError`]: If a reward answered what is neither a reward nor a failure: that is a mistake in it.
        """
        rows, failed, errors = [], [], []
        for future, name in zip(pending.futures, self.names, strict=True):
            answer = self._wait(future)
            if isinstance(answer, Exception):
                errors.append(_failure(name, answer, pending.prompts))
                rows.append(torch.full((len(pending.prompts),), torch.nan))
                failed.append(torch.ones(len(pending.prompts), dtype=torch.bool))
                continue
            answer = errors_for_infinite(answer, name, pending.prompts)
            rows.append(reward_tensor(answer, name, pending.prompts))
            failed.append(torch.tensor([isinstance(value, Exception) for value in answer]))
            errors += [
                value if isinstance(value, InfiniteRewardError) else _failure(name, value, [prompt])
                for value, prompt in zip(answer, pending.prompts, strict=True)
                if isinstance(value, Exception)
            ]
        return Scores(torch.stack(rows), torch.stack(failed), errors)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Let the rewards that are models score on a device, in a dtype unless they chose their own."""
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward):
                func.to(device, dtype)

    def release(self) -> None:
        """Let the rewards that are models leave the device, where they were asked to."""
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward):
                func.release()

    def close(self) -> None:
        """Stop the threads. They start again when needed. A call that takes longer than `timeout` is left behind."""
        for worker in self._threads.values():
            worker.stop(self.timeout)
        self._threads.clear()
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(_cancel_other_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()
            self._loop.close()
            self._loop = None

    def _wait(self, future: Future) -> Any:
        """What a reward answered, or the exception that it raised or that came of waiting too long."""
        try:
            return future.result(self.timeout)
        except Exception as error:
            if future.done():
                return error
            future.cancel()  # for a call that still waits for its turn, or an async one
            return TimeoutError(f"no answer after {self.timeout:g} seconds")

    def _start(self, func: Callable, name: str, kwargs: dict[str, Any]) -> Future:
        if _is_async(func):
            return asyncio.run_coroutine_threadsafe(func(**kwargs), self._running_loop())
        if name not in self._threads:
            self._threads[name] = _Worker(f"reward-{name}")
        return self._threads[name].submit(functools.partial(func, **kwargs))

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True)
            self._loop_thread.start()
        return self._loop


class _Worker:
    """
    Runs one call after the other on a thread of its own.

    The thread is a daemon: an executor's would keep the interpreter from ending while a reward hangs.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._calls.put((future, call))
        return future

    def stop(self, timeout: float | None) -> None:
        """Drop the calls that wait for their turn, and wait for the one that runs, `timeout` seconds at most."""
        while not self._calls.empty():
            entry = self._calls.get()
            if entry is not None:
                entry[0].cancel()
        self._calls.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def _failure(name: str, error: Exception, prompts: list[str]) -> RewardError:
    """What to tell of a failure for some images."""
    number = "one image" if len(prompts) == 1 else f"batch of {len(prompts)} images"
    failure = RewardError(
        f"Reward `{name}` raised {type(error).__name__}: {error} ({number} for {most_common_prompts(prompts)})."
    )
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


async def _cancel_other_tasks() -> None:
    """Cancel all tasks of the running loop but this one, and wait until they have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
