# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`evaluate.load(".../win_rate.py")`: which of two pipelines made the better images."""

from typing import Any

import datasets
import evaluate
import numpy as np

from trl_marble.evaluation.measures import in_memory
from trl_marble.evaluation.statistics import count_wins


class WinRate(in_memory.InMemory, evaluate.Comparison):
    """
    How often one of two pipelines made the better image from the same prompt and seed, with a sign test over prompts,
    see [`count_wins`].

    Example:

    ```python
    >>> WinRate().compute(predictions1=[0.1, 0.5, 0.4], predictions2=[0.2, 0.5, 0.3], groups=[0, 0, 1])
    {'wins': 1, 'ties': 1, 'losses': 1, 'win_rate': 0.5, 'prompts_up': 1, 'prompts_down': 1, 'p_value': 1.0}
    ```

    Args of `compute` and `add_batch`:
        predictions1 (`Sequence[float | None]`):
            Rewards of the first pipeline's images, the baseline; `None` or NaN where the reward does not apply.
        predictions2 (`Sequence[float | None]`):
            Rewards of the second pipeline's images.
        groups (`Sequence[int]`):
            The prompt of each pair.

    Returns of `compute`:
        `dict`: the fields of [`WinCount`]; a win is one of the second pipeline.
    """

    def _info(self) -> evaluate.ComparisonInfo:
        return evaluate.ComparisonInfo(
            description="Share of image pairs in which the second image is better, ties half, with a sign test.",
            citation="",
            inputs_description="\n`predictions1`, `predictions2`: rewards of the two images. `groups`: their prompt.",
            features=datasets.Features(
                {
                    "predictions1": datasets.Value("float64"),
                    "predictions2": datasets.Value("float64"),
                    "groups": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, predictions1: list[float | None], predictions2: list[float | None], groups: list[int]
    ) -> dict[str, Any]:
        first, second = in_memory.to_array(predictions1), in_memory.to_array(predictions2)
        return count_wins(first, second, np.array(groups))._asdict()
