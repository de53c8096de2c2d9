# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The statistics as modules of the `evaluate` library, which work offline and write no files."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ..rollout.diversity import group_diversity
from .statistics import clustered_mean, count_wins


class _InMemory(evaluate.EvaluationModule):
    """A module that keeps its data in memory by default."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name, keep_in_memory, **kwargs)

    def _build_data_dir(self) -> str:
        # `evaluate` makes a cache folder for every module, which one that keeps its data in memory does not need.
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()


class RewardMean(_InMemory, evaluate.Measurement):
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
        values = _numbers(data)
        mean, error = clustered_mean(values, np.array(groups))
        return {"mean": mean, "standard_error": error, "num_valid": int((~np.isnan(values)).sum())}


class PromptDiversity(_InMemory, evaluate.Measurement):
    """
    How much the images of one prompt differ from each other, see [`group_diversity`].

    Example:

    ```python
    >>> PromptDiversity().compute(features=thumbnails(images).numpy(), groups=[0, 0, 0, 1, 1, 1])
    {'diversity': 0.21, 'standard_error': 0.03, 'per_group': [0.18, 0.24]}
    ```

    Args of `compute` and `add_batch`:
        features (`np.ndarray` of shape `[N, D]`):
            Features of the images in [0, 1], such as [`thumbnails`].
        groups (`Sequence[int]`):
            The prompt of each image, numbered from 0 on.

    Returns of `compute`:
        `dict`: `diversity`, the mean over the prompts with at least two images, in [0, 1]; its `standard_error`; and
        `per_group`, the diversity of each prompt (NaN with fewer than two images).
    """

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description="Root mean square difference between the images of one prompt, averaged over prompts.",
            citation="",
            inputs_description="\n`features`: one vector per image. `groups`: the number of its prompt.",
            features=datasets.Features(
                {"features": datasets.Sequence(datasets.Value("float32")), "groups": datasets.Value("int64")}
            ),
        )

    def _compute(self, features: list[list[float]], groups: list[int]) -> dict[str, Any]:
        values = group_diversity(torch.tensor(features), torch.tensor(groups)).numpy()
        mean, error = clustered_mean(values, np.arange(len(values)))
        return {"diversity": mean, "standard_error": error, "per_group": values.tolist()}


class WinRate(_InMemory, evaluate.Comparison):
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
        return count_wins(_numbers(predictions1), _numbers(predictions2), np.array(groups))._asdict()


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)
