# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What rewards log with `log_metric`, over all processes."""

from collections import defaultdict
from collections.abc import Mapping

from accelerate.utils import gather_object

from ..metrics import nan_aware_mean
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
