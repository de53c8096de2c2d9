# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`evaluate.load(".../prompt_diversity.py")`: how much the images of one prompt differ."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from trl_marble.evaluation.measures import in_memory
from trl_marble.evaluation.statistics import clustered_mean
from trl_marble.rollout.diversity import group_diversity


class PromptDiversity(in_memory.InMemory, evaluate.Measurement):
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
