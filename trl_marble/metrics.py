# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Values recorded during optimizer steps, until they are logged."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

import torch
from accelerate import Accelerator
from torch import Tensor


class MetricBuffer:
    """Keeps values by name and averages them over steps and processes, NaN-aware, when they are logged."""

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)

    def record(self, name: str, value: float | Tensor) -> None:
        """
        Keep a value.

        Args:
            name (`str`):
                The metric. Every process must record the same names in the same order.
            value (`float` or `Tensor` of shape `[]`):
                A tensor is not read before it is logged, so that nothing waits for the device.
        """
        self._values[name].append(value)

    def clear(self) -> None:
        """Forget everything recorded since the last call of [`flush`]."""
        self._values.clear()

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The means of everything recorded since the last call, on every process; then start anew."""
        numbers = iter(_read([value for values in self._values.values() for value in values]))
        own = [nan_aware_mean(list(islice(numbers, len(values)))) for values in self._values.values()]
        gathered = accelerator.gather(torch.tensor(own, device=accelerator.device)[None]).cpu()
        names = list(self._values)
        self.clear()
        return {name: nan_aware_mean(column.tolist()) for name, column in zip(names, gathered.T, strict=True)}


def _read(values: Sequence[float | Tensor]) -> list[float]:
    """The values as numbers. Those on a device are read together: the program waits for it once."""
    waiting = [value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    read = iter(torch.stack([value.float() for value in waiting]).tolist() if waiting else [])
    return [
        next(read) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value) for value in values
    ]


def nan_aware_mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def finite_mean(values: Tensor) -> Tensor:
    """Mean of the values that are finite; NaN if there is none."""
    return values.where(values.isfinite(), torch.nan).nanmean()


def mean_rms(values: Tensor) -> Tensor:
    """Root mean square of each finite sample, averaged over samples: the same however they are cut into batches."""
    return finite_mean(values.float().square().flatten(1).mean(dim=1).sqrt())
