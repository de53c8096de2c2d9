# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a prompt set must look like."""

from datasets import Dataset


def validate_prompts(dataset: Dataset, name: str = "train_dataset") -> None:
    """
    Refuse a dataset that cannot be rolled out.

    Args:
        dataset (`datasets.Dataset`):
            The prompt set; its column `prompt` holds one non-empty string a row, every other column goes to the
            rewards.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            What to call the dataset in messages.

    Raises:
        `TypeError`: If it is not a `datasets.Dataset`.
        `ValueError`: If it is empty, has no `prompt` column, has a column that rewards receive from the trainer, or a
            prompt is not a non-empty string.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` is a {type(dataset).__name__}; pass a `datasets.Dataset` with a `prompt` column, for example "
            '`Dataset.from_dict({"prompt": [...]})`.'
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` has the columns {dataset.column_names} but no `prompt`. Name the text column so, for example "
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
