# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Read rows of a prompt set."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset


def read_rows(dataset: Dataset, rows: Sequence[int]) -> dict[str, list[Any]]:
    """
    Read some rows. A row that is given several times is read, and its image decoded, once.

    Args:
        dataset (`datasets.Dataset`):
            The prompt set.
        rows (`Sequence[int]`):
            Numbers of the rows, at least one.

    Returns:
        `dict[str, list]`: For each column one value per given row, in their order. Rows with the same number share
        their values.
    """
    places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    columns = dataset[list(places)]
    return {name: [values[places[row]] for row in rows] for name, values in columns.items()}
