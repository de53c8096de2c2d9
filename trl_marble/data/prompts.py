# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Check prompt sets, and bring them to the form in which they are used."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value

from .conversations import is_conversation, plain_prompts


def prepare_prompts(dataset: Dataset, name: str = "train_dataset") -> Dataset:
    """
    Bring a prompt set to the form in which it is used for rollouts, or refuse it.

    Conversations become the text of their last user message, see [`~trl_marble.data.conversations.plain_prompts`].

    Args:
        dataset (`datasets.Dataset`):
            The prompt set.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The name of the dataset in messages.

    Returns:
        `datasets.Dataset`: the set itself if it has no conversations.

    Raises:
        `TypeError`: See [`validate_prompts`].
        `ValueError`: See [`validate_prompts`]; or if a conversation has no message of the user, or the last one has
            parts other than text.
    """
    _check_type(dataset, name)
    if "prompt" in dataset.column_names and dataset.features["prompt"] != Value("string"):
        prompts = dataset["prompt"][:]
        if any(is_conversation(prompt) for prompt in prompts):
            dataset = replace_column(dataset, "prompt", plain_prompts(prompts, name))
    validate_prompts(dataset, name)
    return dataset


def validate_prompts(dataset: Dataset, name: str = "train_dataset") -> None:
    """
    Refuse a dataset that cannot be used for rollouts.

    Args:
        dataset (`datasets.Dataset`):
            The prompt set; its column `prompt` has one non-empty string per row, and all other columns are passed to
            the rewards.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The name of the dataset in messages.

    Raises:
        `TypeError`: If it is not a `datasets.Dataset`.
        `ValueError`: If it is empty, has no `prompt` column, has a column that rewards receive from the trainer, or a
            prompt is not a non-empty string.
    """
    _check_type(dataset, name)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names} but no `prompt`. Rename the text column, for example "
            'with `dataset.rename_column("text", "prompt")`.'
        )
    keywords = {"images", "videos", "prompts", "trainer_state", "log_metric", "log_extra"}
    if reserved := keywords & set(dataset.column_names):
        raise ValueError(
            f"`{name}` has the column {sorted(reserved)[0]!r}, a keyword that the trainer itself passes to rewards. "
            "Rename the column."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty; it needs at least one prompt.")
    for row, prompt in enumerate(dataset["prompt"][:]):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"Row {row} of `{name}` has the prompt {prompt!r}; every prompt must be a non-empty string."
            )


def replace_column(dataset: Dataset, name: str, values: Sequence[str | None]) -> Dataset:
    """
    Replace a column by text.

    Args:
        dataset (`datasets.Dataset`):
            The dataset.
        name (`str`):
            One of its columns, which keeps its place.
        values (`Sequence[str | None]`):
            The new values, one per row.
    """
    order, old = dataset.column_names, f"old {name}"
    replaced = dataset.rename_column(name, old).add_column(name, list(values), feature=Value("string"))
    return replaced.select_columns(order)


def _check_type(dataset: Any, name: str) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = list(dataset)
        is_for_training = name not in ("eval_dataset", "prompts")
        usual = next((split for split in splits if (split == "train") == is_for_training), (splits or ["train"])[0])
        message = f'`{name}` is a {kind} with the splits {", ".join(splits) or "none"}; use ["{usual}"] of it.'
        if name == "eval_dataset" and isinstance(dataset, DatasetDict):
            message += " To evaluate on all of them pass `dict(eval_dataset)`."
        raise TypeError(message)
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` is an {kind} (streaming). Prompts are drawn in random order, and a resumed run repeats the "
            "order, so every row must be available at any time. Make a `datasets.Dataset` of it: load it "
            "without `streaming=True`, or take a part with `Dataset.from_list(list(dataset.take(10_000)))`."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` is a {kind}; pass a `datasets.Dataset` with a `prompt` column, for example "
            '`Dataset.from_dict({"prompt": [...]})`.'
        )
