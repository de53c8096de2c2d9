# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a prompt set must look like."""

import pytest
from datasets import Dataset, DatasetDict

from trl_marble.data import validate_prompts


GOOD = Dataset.from_dict({"prompt": ["a cat", "a dog", "a cat"], "include": [["cat"], ["dog"], []]})


def test_prompts_with_any_other_column_are_taken() -> None:
    validate_prompts(GOOD)
    validate_prompts(GOOD.select([0]))


@pytest.mark.parametrize(
    "given", [["a cat"], {"prompt": ["a cat"]}, GOOD.to_iterable_dataset(), DatasetDict(train=GOOD), None]
)
def test_what_is_no_dataset_is_refused(given) -> None:
    message = f"`train_dataset` is a {type(given).__name__}; pass a `datasets.Dataset`"
    with pytest.raises(TypeError, match=message):
        validate_prompts(given)


def test_a_missing_column_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"`eval_dataset` has the columns \['text', 'tag'\] but no `prompt`.*rename"):
        validate_prompts(Dataset.from_dict({"text": ["a cat"], "tag": ["x"]}), "eval_dataset")


@pytest.mark.parametrize("column", ["images", "videos", "prompts", "trainer_state"])
def test_a_column_that_the_trainer_passes_itself_is_refused(column) -> None:
    with pytest.raises(ValueError, match=f"`train_dataset` has the column '{column}'.*Rename"):
        validate_prompts(GOOD.add_column(column, [1, 2, 3]))


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="`train_dataset` is empty; it needs at least one prompt"):
        validate_prompts(GOOD.select([]))


@pytest.mark.parametrize("prompt", ["", " \n", None])
def test_an_empty_prompt_is_refused_with_its_row(prompt) -> None:
    with pytest.raises(ValueError, match=r"Row 1 of `train_dataset` has the prompt .*non-empty string"):
        validate_prompts(Dataset.from_dict({"prompt": ["a cat", prompt]}))


def test_a_prompt_that_is_no_text_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match="Row 0 of `train_dataset` has the prompt 7"):
        validate_prompts(Dataset.from_dict({"prompt": [7, 8]}))
