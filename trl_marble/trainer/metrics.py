# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Values recorded during optimizer steps, until they are logged."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..evaluation import nan_aware_mean
from ..rewards.call_log import LogKey


def average_logged(metrics: Mapping[LogKey, list[float]]) -> dict[str, float]:
    """
    The means of what rewards logged with `log_metric`, NaN-aware, over all their calls on all processes.

    Args:
        metrics (`Mapping[tuple[str, str], list[float]]`):
            Reward and metric -> the numbers that were logged on this process. Rewards that log one name share it.

    Returns:
        `dict[str, float]`: Metric -> mean; the same names in the same order on all processes.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for own in gather_object([dict(metrics)]):
        for (_, name), numbers in own.items():
            values[name] += numbers
    return {name: nan_aware_mean(values[name]) for name in sorted(values)}


class MetricBuffer:
    """Keeps values by name and averages them over steps and processes, NaN-aware, when they are logged."""

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)
        self._is_paused = False

    def record(self, name: str, value: float | Tensor) -> None:
        """
        Keep a value.

        Args:
            name (`str`):
                The metric. Every process must record the same names in the same order.
            value (`float` or `Tensor` of shape `[]`):
                A tensor is not read before it is logged, so that nothing waits for the device.
        """
        if not self._is_paused:
            self._values[name].append(value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the context: what is done there was measured before."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def clear(self) -> None:
        """Forget everything recorded since the last call of [`flush`]."""
        self._values.clear()

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The means of everything recorded since the last call, on every process; then start anew."""
        own = [nan_aware_mean([float(value) for value in values]) for values in self._values.values()]
        gathered = accelerator.gather(torch.tensor(own, device=accelerator.device)[None]).cpu()
        names = list(self._values)
        self.clear()
        return {name: nan_aware_mean(column.tolist()) for name, column in zip(names, gathered.T, strict=True)}
