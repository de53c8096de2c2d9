# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What an optimizer step costs: the time of its parts, measured without waiting for the device, and its memory."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]


# `decode` and `waiting` are inside `rollout`; the others but `step` follow each other.
PARTS = (
    "step",
    "rollout",
    "decode",
    "waiting",
    "old",
    "reference",
    "forward",
    "backward",
    "balance",
    "optimizer",
)
LEARNING = "learning"  # inside `rollout` too, where a reward learns
REWARD = "rewards/"
GB = 1e9

Moment = float | torch.cuda.Event


class StepTimes:
    """
    Adds up how long the parts of optimizer steps take.

    On a CUDA device the beginning and the end of a part are events in the device's queue, which are read when they
    have passed: nothing waits for them. Elsewhere they are read off the clock.

    ```python
    with times.measure("forward"):
        velocity = ...
    ```

    Args:
        device (`torch.device`):
            The device of the training.
        reward_names (`Sequence[str]`):
            The rewards that are trained on.
        images_per_step (`int`):
            The images that an optimizer step is trained on, on all processes.
        learns (`bool`, *optional*, defaults to `False`):
            Whether a reward learns, so that `LEARNING` is a part too.
    """

    def __init__(
        self, device: torch.device, reward_names: Sequence[str], images_per_step: int, learns: bool = False
    ) -> None:
        self._device, self._images_per_step = device, images_per_step
        learning = (LEARNING,) if learns else ()
        self._parts = (*PARTS, *learning, *(REWARD + name for name in reward_names))
        self.clear()

    def clear(self) -> None:
        """Forget everything that was measured."""
        self._seconds, self._steps = dict.fromkeys(self._parts, 0.0), 0
        self._begun: dict[str, Moment] = {}
        self._ahead: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()  # where the device may not be yet

    def begin(self, part: str) -> None:
        """Begin a part, one of `PARTS` or `LEARNING`."""
        self._begun[part] = self._now()

    def end(self, part: str) -> None:
        """End a part that was begun. The end of `"step"` counts a step."""
        start, end = self._begun.pop(part), self._now()
        self._steps += part == "step"
        if isinstance(start, float) or isinstance(end, float):
            self._seconds[part] += end - start  # type: ignore[operator]
            return
        self._ahead.append((part, start, end))
        while self._ahead and self._ahead[0][2].query():
            self._read_next()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """What is inside the context is the part, or belongs to it."""
        self.begin(part)
        yield
        self.end(part)

    def add_reward(self, name: str, seconds: float) -> None:
        """Add the time that calls of a reward took on its own thread."""
        self._seconds[REWARD + name] += seconds

    def flush(self) -> dict[str, float]:
        """
        What is logged, by its names, as means over the steps since the last call; then start anew. Nothing if there
        was no step. Call it where the device has been waited for.
        """
        while self._ahead:
            self._ahead[0][2].synchronize()
            self._read_next()
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = dict.fromkeys(self._parts, 0.0), 0
        if steps == 0:
            return {}
        logged = {f"time/{part}": total / steps for part, total in seconds.items()}
        logged["images_per_second"] = self._images_per_step * steps / seconds["step"]
        if (peak := _peak_memory(self._device)) is not None:
            logged["memory/peak"] = peak
        return logged

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read_next(self) -> None:
        part, start, end = self._ahead.popleft()
        self._seconds[part] += start.elapsed_time(end) / 1000


def _peak_memory(device: torch.device) -> float | None:
    """The most GB that tensors on a CUDA device, or else the process, have taken so far; `None` if nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB
