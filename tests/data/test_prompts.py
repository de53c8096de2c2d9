# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Checks of prompt sets, and conversations as prompts."""

import json
import warnings

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from trl_marble.data import load_prompts, prepare_prompts, validate_prompts


GOOD = Dataset.from_dict({"prompt": ["a cat", "a dog", "a cat"], "include": [["cat"], ["dog"], []]})


def test_prompts_with_any_other_column_are_taken() -> None:
    validate_prompts(GOOD)
    validate_prompts(GOOD.select([0]))


@pytest.mark.parametrize("given", [["a cat"], {"prompt": ["a cat"]}, None])
def test_refuses_objects_that_are_not_datasets(given) -> None:
    message = f"`train_dataset` is a {type(given).__name__}; pass a `datasets.Dataset`"
    with pytest.raises(TypeError, match=message):
        validate_prompts(given)


@pytest.mark.parametrize("check", [validate_prompts, prepare_prompts])
def test_the_splits_of_a_dataset_dict_are_named(check) -> None:
    both = DatasetDict(test=GOOD, train=GOOD)
    with pytest.raises(
        TypeError, match=r'`train_dataset` is a DatasetDict with the splits test, train; use \["train"\]'
    ):
        check(both)
    with pytest.raises(
        TypeError, match=r'use \["test"\] of it. To evaluate on all of them pass `dict\(eval_dataset\)`'
    ):
        check(both, "eval_dataset")
    with pytest.raises(TypeError, match=r'a DatasetDict with the splits ocr; use \["ocr"\]'):
        check(DatasetDict(ocr=GOOD))
    streams = IterableDatasetDict(train=GOOD.to_iterable_dataset())
    with pytest.raises(TypeError, match=r'is a IterableDatasetDict with the splits train; use \["train"\]'):
        check(streams)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_stream_is_refused_with_the_reason_and_what_to_do(name) -> None:
    stream = GOOD.to_iterable_dataset()
    with pytest.raises(
        TypeError, match=f"`{name}` is an IterableDataset .*resumed run .*streaming=True.*take"
    ) as caught:
        prepare_prompts(stream, name)
    assert "Dataset.from_list(list(dataset.take(10_000)))" in str(caught.value)
    prepare_prompts(Dataset.from_list(list(stream.take(10_000))), name)  # what it says to do


# ---- Conversations ----


def user(content) -> dict:
    return {"role": "user", "content": content}


def test_the_last_message_of_the_user_is_the_prompt_of_a_conversation() -> None:
    prompts = [
        [user("a cat")],
        [
            {"role": "system", "content": "be brief"},
            user("a dog"),
            {"role": "assistant", "content": "?"},
            user("a hen"),
        ],
        [user("a cow"), {"role": "assistant", "content": "done"}],
    ]
    dataset = Dataset.from_dict({"tag": list("abc"), "prompt": prompts, "level": [1, 2, 3]})
    with pytest.warns(UserWarning, match="2 of the 3 prompts of `it` are conversations with several messages"):
        plain = prepare_prompts(dataset, "it")
    assert plain.to_dict() == {"tag": list("abc"), "prompt": ["a cat", "a hen", "a cow"], "level": [1, 2, 3]}
    assert plain.column_names == dataset.column_names


def test_the_parts_of_a_message_are_joined() -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "make it"}, {"type": "text", "text": "red"}]
    dataset = Dataset.from_dict({"prompt": [[user(content)], [user(content[1:2])]]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_prompts(dataset)["prompt"][:] == ["make it red", "make it"]


def test_plain_prompts_are_not_copied() -> None:
    assert prepare_prompts(GOOD) is GOOD


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            [{"role": "system", "content": "x"}],
            r"Row 1 of `train_dataset` is a conversation without .*roles are system",
        ),
        ([user("")], "Row 1 of `train_dataset` has the prompt ''"),
        ([user(None)], "Row 1 of `train_dataset` has the prompt None"),
    ],
)
def test_a_conversation_without_a_prompt_is_refused_by_its_row(prompt, message) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_prompts(Dataset.from_dict({"prompt": [[user("a cat")], prompt]}))


@pytest.mark.parametrize(
    "part", [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "x"}}]
)
def test_an_image_in_a_message_is_refused_with_the_place_for_it(part) -> None:
    with pytest.raises(ValueError, match="Row 0 of `train_dataset` has .* only text can be a prompt.*column `image`"):
        prepare_prompts(Dataset.from_dict({"prompt": [[user([part, {"type": "text", "text": "red"}])]]}))


def test_conversations_are_read_from_files(tmp_path) -> None:
    rows = [
        {"messages": [user("a cat")], "n": 1},
        {"messages": [user([{"type": "text", "text": 'a "big" dog'}])], "n": 2},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        read = load_prompts(tmp_path / name, column="messages")
        assert read.to_dict() == {"prompt": ["a cat", 'a "big" dog'], "n": [1, 2]}
    Dataset.from_list(rows[:1]).to_parquet(tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet", column="messages")["prompt"][:] == ["a cat"]


# ---- Columns and rows ----


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


def test_a_prompt_that_is_not_a_text_is_refused_with_its_value() -> None:
    with pytest.raises(ValueError, match="Row 0 of `train_dataset` has the prompt 7"):
        validate_prompts(Dataset.from_dict({"prompt": [7, 8]}))
