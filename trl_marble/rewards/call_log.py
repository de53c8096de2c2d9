# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Metrics and columns that a reward logs in addition to its scores."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from .reward_value import to_number


LOG_KEYWORDS = ("log_metric", "log_extra")
# Names of the trainer's own metrics, which a metric of a reward would replace.
OWN_METRICS = frozenset(
    {
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
        "kl",
        "guided_kl",
        "beta",
        "images_per_second",
        "num_input_tokens_seen",
    }
)
OWN_PREFIXES = (
    "rewards/",
    "balance/",
    "progress/",
    "drift/",
    "gain/",
    "gain_",
    "joint_",
    "kl_",
    "nonfinite/",
    "resampled/",
    "time/",
    "memory/",
    "train_",
    "eval_",
    "test_",
)

LogKey = tuple[str, str]
"""Name of the reward, and of the metric or the column."""
Key = TypeVar("Key")


class CallLog:
    """
    Stores what a reward logs during one call, and how long the call took. Its functions may be called from any thread.

    Each call has its own log, so that a call which nobody waits for any more cannot log into another one.

    Args:
        num_images (`int`):
            Number of images of the call.

    Attributes:
        seconds (`float`): How long the call took; 0 while it has not ended.
        features (`list[Tensor | None]`, *optional*): What a [`LearningReward`] learns from, one tensor for each image
            that it applies to.
    """

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self.seconds = 0.0
        self.features: list[Tensor | None] | None = None
        self._lock = threading.Lock()
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """
        Log a number. The metric is the average of all numbers of its name, over calls and processes.

        Args:
            name (`str`):
                The metric. Evaluations add their prefix to it.
            value (`float`):
                Any real number, or a tensor with one element. NaN is left out of the average.

        Raises:
            `TypeError`: If the name is not a string or the value not a number.
            `ValueError`: If the trainer itself logs a metric of that name.
        """
        _check_name("log_metric", name)
        if name in OWN_METRICS or name.startswith(OWN_PREFIXES):
            raise ValueError(
                f"`log_metric` was called with the name {name!r}, which the trainer uses for its own metrics. "
                f"Use a name that is none of {', '.join(sorted(OWN_METRICS))} and does not begin with "
                f"{', '.join(OWN_PREFIXES)}."
            )
        try:
            number = to_number(value)
        except TypeError:
            number = None
        if number is None or value is None:
            raise TypeError(f"`log_metric({name!r}, ...)` was called with {value!r}; pass one number.")
        with self._lock:
            self._metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Sequence[Any] | np.ndarray | Tensor) -> None:
        """
        Log one value for each image of the call, to be shown with the image.

        Args:
            column (`str`):
                The name of the column.
            values (`Sequence`, `np.ndarray` or `Tensor`):
                One per image, in their order: a number, a text, or `None`. Other values are shown as their `str`.

        Raises:
            `TypeError`: If the column's name is not a string, or the values are not a sequence.
            `ValueError`: If there is not one value for each image, or this call has logged that column before.
        """
        _check_name("log_extra", column)
        given = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise TypeError(
                f"`log_extra({column!r}, ...)` was called with a {type(values).__name__}; pass a list with one value "
                "for each image."
            )
        if len(given) != self._num_images:
            raise ValueError(
                f"`log_extra({column!r}, ...)` was called with {len(given)} values for {self._num_images} images; "
                "pass one for each image, `None` for an image without a value."
            )
        plain = [_plain(value) for value in given]
        with self._lock:
            if column in self._extras:
                raise ValueError(
                    f"`log_extra({column!r}, ...)` was called twice in one call of the reward. Log all images at "
                    "once, or use another name."
                )
            self._extras[column] = plain

    def log_features(self, features: list[Tensor | None]) -> None:
        """Keep the features of the images of the call, one tensor for each, `None` where the reward does not apply."""
        self.features = features

    @property
    def metrics(self) -> dict[str, list[float]]:
        """The numbers of each metric so far."""
        with self._lock:
            return {name: list(values) for name, values in self._metrics.items()}

    @property
    def extras(self) -> dict[str, list[Any]]:
        """The values of each column so far, one for each image."""
        with self._lock:
            return {column: list(values) for column, values in self._extras.items()}


def join_columns(parts: Sequence[tuple[Mapping[Key, list[Any]], int]]) -> dict[Key, list[Any]]:
    """
    Concatenate the columns of consecutive batches of images.

    Args:
        parts (`Sequence[tuple[Mapping, int]]`):
            The columns of each batch, and its number of images.

    Returns:
        `dict`: One value for each image of all batches, `None` where its batch has none.
    """
    keys = dict.fromkeys(key for columns, _ in parts for key in columns)
    return {key: [value for columns, number in parts for value in columns.get(key, [None] * number)] for key in keys}


def column_names(keys: Sequence[LogKey]) -> list[str]:
    """Unique names of columns: their own, and with the reward's where several rewards log a column of that name."""
    names = [column for _, column in keys]
    return [column if names.count(column) == 1 else f"{column} ({reward})" for reward, column in keys]


def _check_name(function: str, name: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"`{function}` was called with the name {name!r}; pass a string that is not empty.")


def _plain(value: Any) -> float | str | bool | None:
    """Convert a value to a type that can be sent to other processes and written to files."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
