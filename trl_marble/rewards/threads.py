# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Threads that rewards run on. None of them keeps the interpreter from ending, whatever it does."""

import asyncio
import functools
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


# Seconds that async rewards get to end after they were interrupted, as closing connections takes.
INTERRUPT_SECONDS = 1.0


class Worker:
    """
    Runs one call after the other on a thread of its own.

    The thread is a daemon: an executor's would keep the interpreter from ending while a reward hangs.

    Args:
        name (`str`):
            Of the thread.
        device (`torch.device`):
            The current device of the thread.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._unfinished: set[Future] = set()
        self._device = device
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future:
        """Run a call when all those before it have ended."""
        future: Future = Future()
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        self._calls.put((future, call))
        return future

    def stop(self) -> None:
        """Drop the calls that wait for their turn, and end the thread; if a call is running, do not wait for it."""
        is_running = not all([future.cancel() for future in list(self._unfinished)])
        self._calls.put(None)
        if not is_running:
            self._thread.join()

    def _run(self) -> None:
        set_current_device(self._device)
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del entry, future, call  # not to hold images while waiting for the next call


class EventLoopThread:
    """
    Runs async calls together on one event loop, on a thread of its own.

    Args:
        name (`str`):
            Of the thread.
        device (`torch.device`):
            The current device of the thread.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = device
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_DaemonExecutor())
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Awaitable[Any]]) -> Future:
        """Start a call beside those that run."""
        return asyncio.run_coroutine_threadsafe(_await(call), self._loop)

    def stop(self) -> None:
        """Interrupt all calls and end the thread; leave it behind if they do not end within a second."""
        interrupted = asyncio.run_coroutine_threadsafe(_cancel_other_tasks(), self._loop)
        try:
            interrupted.result(INTERRUPT_SECONDS)
        except TimeoutError:
            self._loop.call_soon_threadsafe(self._loop.stop)
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        set_current_device(self._device)
        self._loop.run_forever()


class _DaemonExecutor(ThreadPoolExecutor):
    """What `asyncio.to_thread` runs on: threads that the interpreter does not wait for at its end."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._daemons: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self._calls.put((future, functools.partial(fn, *args, **kwargs)))
        if len(self._daemons) < self._max_workers:
            self._daemons.append(threading.Thread(target=self._work, name="async-rewards-thread", daemon=True))
            self._daemons[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for _ in self._daemons:
            self._calls.put(None)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)


def set_current_device(device: torch.device) -> None:
    """Make a device the current one of this thread; each thread begins with the first of its kind."""
    if device.index is not None and device.type not in ("cpu", "meta"):
        torch.accelerator.set_device_index(device.index)


async def _await(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


async def _cancel_other_tasks() -> None:
    """Cancel all tasks of the running loop but this one, and wait until they have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
