# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The scores of a batch by all rewards."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call_log import LogKey, join_columns
from .errors import RewardError


class Scores(NamedTuple):
    """
    The scores of a batch by all rewards.

    Args:
        rewards (`Tensor` of shape `[K, B]`, float32):
            The scores; NaN where a reward does not apply or failed.
        failed (`Tensor` of shape `[K, B]`, bool):
            Where a reward failed.
        errors (`list` of [`RewardError`]):
            Each failure, with the exception of the reward as its cause.
        metrics (`Mapping[tuple[str, str], list[float]]`, *optional*):
            Numbers that rewards logged with `log_metric`: reward and metric -> its numbers.
        extras (`Mapping[tuple[str, str], list]`, *optional*):
            Columns that rewards logged with `log_extra`: reward and column -> B values, `None` where there is none.
        seconds (`Mapping[str, float]`, *optional*):
            Reward -> how long its calls took, added up; calls of one batch run beside those of other rewards.
        features (`Mapping[str, list[Tensor | None]]`, *optional*):
            [`LearningReward`] -> what it learns from: a tensor of shape `[D]` for each image, `None` where the reward
            does not apply or failed.
    """

    rewards: Tensor
    failed: Tensor
    errors: list[RewardError]
    metrics: Mapping[LogKey, list[float]] = MappingProxyType({})
    extras: Mapping[LogKey, list[Any]] = MappingProxyType({})
    seconds: Mapping[str, float] = MappingProxyType({})
    features: Mapping[str, list[Tensor | None]] = MappingProxyType({})

    @staticmethod
    def concatenate(parts: "Sequence[Scores]") -> "Scores":
        """Join the scores of several batches."""
        keys = dict.fromkeys(key for part in parts for key in part.metrics)
        return Scores(
            torch.cat([part.rewards for part in parts], dim=1),
            torch.cat([part.failed for part in parts], dim=1),
            [error for part in parts for error in part.errors],
            {key: [value for part in parts for value in part.metrics.get(key, [])] for key in keys},
            join_columns([(part.extras, part.rewards.shape[1]) for part in parts]),
            _add_seconds(parts),
            join_columns([(part.features, part.rewards.shape[1]) for part in parts]),
        )

    def select(self, chosen: Sequence[int]) -> "Scores":
        """The scores of some of the images, with everything that is not of single images."""
        index = torch.tensor(chosen, dtype=torch.int64)
        extras = {key: [values[i] for i in chosen] for key, values in self.extras.items()}
        features = {name: [rows[i] for i in chosen] for name, rows in self.features.items()}
        return self._replace(
            rewards=self.rewards[:, index], failed=self.failed[:, index], extras=extras, features=features
        )

    @staticmethod
    def stack(parts: "Sequence[Scores]") -> "Scores":
        """The scores of the same images by several scorers, the rows of one below those of the other."""
        rewards, failed = torch.cat([part.rewards for part in parts]), torch.cat([part.failed for part in parts])
        return _of_same_images(parts, rewards, failed)

    @staticmethod
    def join(parts: "Sequence[Scores]") -> "Scores":
        """The scores of the same images by different rewards, each part with NaN in the rows of the others."""
        rewards, failed = parts[0].rewards, parts[0].failed
        for part in parts[1:]:
            rewards, failed = torch.where(part.rewards.isnan(), rewards, part.rewards), failed | part.failed
        return _of_same_images(parts, rewards, failed)


def _of_same_images(parts: Sequence[Scores], rewards: Tensor, failed: Tensor) -> Scores:
    """Scores of different rewards as one, with what these logged."""
    metrics = {key: values for part in parts for key, values in part.metrics.items()}
    extras = {key: values for part in parts for key, values in part.extras.items()}
    errors = [error for part in parts for error in part.errors]
    features = {name: rows for part in parts for name, rows in part.features.items()}
    return Scores(rewards, failed, errors, metrics, extras, _add_seconds(parts), features)


def _add_seconds(parts: Sequence[Scores]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part.seconds)
    return {name: math.fsum(part.seconds.get(name, 0.0) for part in parts) for name in names}
