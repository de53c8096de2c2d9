# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Threads on which rewards run. They never prevent the interpreter from ending. On a CUDA device each has a stream of its
own, so that a reward does not wait for the sampling of the next images, nor the sampling for it.
"""

import asyncio
import atexit
import ctypes
import functools
import queue
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ALL_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch


# Seconds for async rewards to end after they were cancelled, for example to close connections.
INTERRUPT_SECONDS = 1.0
# Seconds for calls that are still running to end when the interpreter ends.
EXIT_SECONDS = 2.0
# Longest wait in seconds without a check for Ctrl-C, which does not interrupt every wait.
WAKE_SECONDS = 0.5


_started: "weakref.WeakSet[Worker | EventLoopThread]" = weakref.WeakSet()  # those whose thread has not ended


class Worker:
    """
    Runs one call after the other on its own thread.

    The thread is a daemon: the thread of an executor would prevent the interpreter from ending while a reward hangs.

    Args:
        name (`str`):
            Name of the thread.
        device (`torch.device`):
            The current device of the thread.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._unfinished: set[Future] = set()
        self._device = _DeviceOfThread(device)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        _started.add(self)

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that were started."""
        return [self._thread]

    def submit(self, call: Callable[[], Any]) -> Future:
        """Run a call when all those before it have ended."""
        future: Future = Future()
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        self._calls.put((future, call))
        return future

    def stop(self) -> None:
        """Drop the calls that have not begun, and end the thread; if a call is running, do not wait for it."""
        is_running = not all([future.cancel() for future in list(self._unfinished)])
        self._calls.put(None)
        if not is_running:
            self._thread.join()

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._device.use()
                result = call()
                self._device.finish()
                future.set_result(result)
                del result
            except BaseException as error:
                future.set_exception(error)
            del entry, future, call  # free their images while waiting for the next call


class EventLoopThread:
    """
    Runs async calls together on one event loop, on its own thread.

    Args:
        name (`str`):
            Name of the thread.
        device (`torch.device`):
            The current device of the thread.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._device = _DeviceOfThread(device)
        self._loop = asyncio.new_event_loop()
        self._executor = _DaemonExecutor(device)
        self._loop.set_default_executor(self._executor)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        _started.add(self)

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that were started."""
        return [self._thread, *self._executor.daemons]

    def submit(self, call: Callable[[], Awaitable[Any]]) -> Future:
        """Start a call, while others are running."""
        return asyncio.run_coroutine_threadsafe(_await(call, self._device), self._loop)

    def stop(self) -> None:
        """Cancel all calls and end the thread; if they do not end within a second, do not wait for them."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(_cancel_other_tasks_and_stop(), self._loop)
            self._thread.join(INTERRUPT_SECONDS)
        if self._thread.is_alive():
            self._executor.shutdown()
        else:
            self._loop.close()  # also closes its executor

    def _run(self) -> None:
        self._loop.run_forever()


class _DaemonExecutor(ThreadPoolExecutor):
    """An executor for `asyncio.to_thread` whose threads are daemons."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self.daemons: list[threading.Thread] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self._calls.put((future, functools.partial(fn, *args, **kwargs)))
        if len(self.daemons) < self._max_workers:
            self.daemons.append(threading.Thread(target=self._work, name="async-rewards-thread", daemon=True))
            self.daemons[-1].start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for _ in self.daemons:
            self._calls.put(None)

    def _work(self) -> None:
        device = _DeviceOfThread(self._device)
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if future.set_running_or_notify_cancel():
                try:
                    device.use()
                    result = call()
                    device.finish()
                    future.set_result(result)
                    del result
                except BaseException as error:
                    future.set_exception(error)


def wait_until(futures: Sequence[Future], deadline: float | None, return_when: str = ALL_COMPLETED) -> None:
    """
    Wait for calls in a way that Ctrl-C can interrupt.

    Args:
        futures (`Sequence[Future]`):
            The calls.
        deadline (`float`, *optional*):
            When to stop waiting, in the time of `time.monotonic()`. `None` for no limit.
        return_when (`str`, *optional*, defaults to `ALL_COMPLETED`):
            What to wait for: `ALL_COMPLETED` or `FIRST_COMPLETED` of `concurrent.futures`.
    """
    while True:
        left = WAKE_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
        ended, pending = wait(futures, min(left, WAKE_SECONDS), return_when)
        if not pending or left == 0.0 or (ended and return_when != ALL_COMPLETED):
            return


class _DeviceOfThread:
    """
    The device that one thread computes on. It is set by the thread's first call, so that an error is that call's.

    Args:
        device (`torch.device`):
            The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_used = False

    def use(self) -> None:
        """
        Make it the current device of this thread, which by default is the first of its type, and on CUDA begin a new
        stream.
        """
        if self._is_used:
            return
        if self._device.index is not None and self._device.type not in ("cpu", "meta"):
            torch.accelerator.set_device_index(self._device.index)
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)
            stream.wait_stream(torch.cuda.default_stream(self._device))  # on which a reward may have been made
            torch.cuda.set_stream(stream)
        self._is_used = True

    def finish(self) -> None:
        """Wait, on this thread alone, for what it has computed: another thread, on another stream, may read it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


async def _await(call: Callable[[], Awaitable[Any]], device: _DeviceOfThread) -> Any:
    device.use()
    result = await call()
    device.finish()
    return result


async def _cancel_other_tasks_and_stop() -> None:
    """Cancel all other tasks of the running loop, and stop it when they have ended."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    asyncio.get_running_loop().stop()


@atexit.register
def _end_threads() -> None:
    """
    When the interpreter ends, end running calls if that is possible within some seconds.

    A thread that returns from C++ code, such as that of a model, after the interpreter has ended aborts the process.
    """
    started = list(_started)
    for each in started:
        each.stop()
    running = [thread for each in started for thread in each.threads if thread.is_alive()]
    for thread in running:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    deadline = time.monotonic() + EXIT_SECONDS
    for thread in running:
        thread.join(max(0.0, deadline - time.monotonic()))
