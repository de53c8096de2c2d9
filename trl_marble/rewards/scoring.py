# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scores batches of images with several rewards at once, while the next batch is being sampled."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .protocol import RewardError, RewardFunc, most_common_prompts, reward_names, reward_tensor, validate_reward_funcs


class PendingScores(NamedTuple):
    """Scores on their way: one future a reward, and the prompts they are for."""

    futures: list[Future]
    prompts: list[str]


class RewardScorer:
    """
    Calls the rewards of a run.

    Sync rewards run on one thread each, so a reward is never called twice at the same time and need not be
    thread-safe; async rewards share one event loop. Threads are started on first use and end with [`close`].

    Args:
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            The rewards. The list is not changed.

    Attributes:
        names (`list[str]`): The unique name of each reward.
    """

    def __init__(self, reward_funcs: RewardFunc | Sequence[RewardFunc]) -> None:
        self.funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(self.funcs)
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        return len(self.funcs)

    def submit(
        self, images: list[Image.Image], prompts: list[str], columns: dict[str, list], trainer_state: Any
    ) -> PendingScores:
        """
        Start scoring and return at once.

        Args:
            images (`list[PIL.Image.Image]`):
                The images.
            prompts (`list[str]`):
                Their prompts.
            columns (`dict[str, list]`):
                The other columns of the dataset, one value an image.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.
        """
        futures = []
        for func, name in zip(self.funcs, self.names, strict=True):
            as_tensor = getattr(func, "image_type", "pil") == "pt"
            kwargs: dict[str, Any] = {column: list(values) for column, values in columns.items()}
            kwargs["images"] = _to_tensor(images) if as_tensor else list(images)
            kwargs |= {"prompts": list(prompts), "trainer_state": trainer_state}
            futures.append(self._start(func, name, kwargs))
        return PendingScores(futures, list(prompts))

    def collect(self, pending: PendingScores) -> Tensor:
        """
        Wait for scores.

        Returns:
            `Tensor` of shape `[K, B]`, float32: NaN where a reward does not apply.

        Raises:
            [`RewardError`]: If a reward raised or returned something that is not a reward; names it and the prompts.
        """
        rows = []
        for future, name in zip(pending.futures, self.names, strict=True):
            try:
                values = future.result()
            except Exception as error:
                raise RewardError(
                    f"Reward `{name}` raised {type(error).__name__}: {error} (batch of {len(pending.prompts)} images "
                    f"for {most_common_prompts(pending.prompts)})."
                ) from error
            rows.append(reward_tensor(values, name, pending.prompts))
        return torch.stack(rows)

    def close(self) -> None:
        """Stop the threads. They start again when needed."""
        for executor in self._threads.values():
            executor.shutdown(wait=True, cancel_futures=True)
        self._threads.clear()
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(_cancel_other_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()
            self._loop.close()
            self._loop = None

    def _start(self, func: Callable, name: str, kwargs: dict[str, Any]) -> Future:
        if _is_async(func):
            return asyncio.run_coroutine_threadsafe(func(**kwargs), self._running_loop())
        if name not in self._threads:
            self._threads[name] = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reward-{name}")
        return self._threads[name].submit(func, **kwargs)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._loop.run_forever, name="async-rewards", daemon=True)
            self._loop_thread.start()
        return self._loop


def _is_async(func: Any) -> bool:
    """Whether calling a reward gives a coroutine: an async function or an object with an async `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


async def _cancel_other_tasks() -> None:
    """Cancel all tasks of the running loop but this one, and wait until they have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _to_tensor(images: list[Image.Image]) -> Tensor:
    """Images as one tensor `[B, 3, H, W]` in [0, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
