# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the measures share."""

import math
from typing import Any

import evaluate
import numpy as np


class InMemory(evaluate.EvaluationModule):
    """A module that keeps its data in memory by default."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name, keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # `evaluate` makes a cache folder for every module, which one that keeps its data in memory does not need.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()


def to_array(values: list[float | None]) -> np.ndarray:
    """Rewards as an array, NaN for `None`."""
    return np.array([math.nan if value is None else value for value in values], dtype=float)
