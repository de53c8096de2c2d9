# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`evaluate.load(".../reward_mean.py")`: the mean of a reward."""

from typing import Any

import datasets
import evaluate
import numpy as np

from trl_marble.evaluation.measures import in_memory
from trl_marble.evaluation.statistics import clustered_mean


class RewardMean(in_memory.InMemory, evaluate.Measurement):
    """
    Mean of a reward over images, with its standard error over prompts, see [`clustered_mean`].

    Example:

    ```python
    >>> RewardMean().compute(data=[1.0, 3.0, 5.0, None], groups=[0, 0, 1, 1])
    {'mean': 3.0, 'standard_error': 1.3333333333333333, 'num_valid': 3}
    ```

    Args of `compute` and `add_batch`:
        data (`Sequence[float | None]`):
            The reward of each image; `None` or NaN where it does not apply.
        groups (`Sequence[int]`):
            The prompt of each image.

    Returns of `compute`:
        `dict`: `mean` and `standard_error` in the reward's unit, and `num_valid`, the number of images that have the
        reward.
    """

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description="Mean of a reward and its standard error over prompts.",
            citation="",
            inputs_description="\n`data`: one reward per image, None where it does not apply. `groups`: its prompt.",
            features=datasets.Features({"data": datasets.Value("float64"), "groups": datasets.Value("int64")}),
        )

    def _compute(self, data: list[float | None], groups: list[int]) -> dict[str, Any]:
        values = in_memory.to_array(data)
        mean, error = clustered_mean(values, np.array(groups))
        return {"mean": mean, "standard_error": error, "num_valid": int((~np.isnan(values)).sum())}
