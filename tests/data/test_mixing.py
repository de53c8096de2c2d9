# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Several prompt sets as one: nothing is lost, nothing changes its type, and the weights stay with the rows."""

import math

import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk

from trl_marble.data import RepeatPromptSampler, load_prompts, mix_prompts, source_weights, validate_prompts


GENERAL = Dataset.from_dict({"prompt": ["a cat", "a dog", "a hen"]})
SIGNS = Dataset.from_dict({"prompt": ['"hi"', '"yo"'], "text": ["hi", "yo"]})
OBJECTS = Dataset.from_dict({"tag": ["colors"], "include": ['[{"class": "cup"}]'], "prompt": ["a red cup"]})
SETS = {"general": GENERAL, "ocr": SIGNS, "geneval": OBJECTS}


def test_every_row_keeps_its_values_and_has_none_in_other_columns() -> None:
    mixed = mix_prompts(SETS)
    validate_prompts(mixed)
    nothing = {"text": None, "tag": None, "include": None, "source_weight": 1.0}
    assert mixed.to_list() == [
        *[{"prompt": prompt, "source": "general", **nothing} for prompt in ("a cat", "a dog", "a hen")],
        *[{"prompt": f'"{text}"', "source": "ocr", **nothing, "text": text} for text in ("hi", "yo")],
        {
            **nothing,
            "prompt": "a red cup",
            "source": "geneval",
            "tag": "colors",
            "include": '[{"class": "cup"}]',
        },
    ]
    assert GENERAL.column_names == ["prompt"]  # what was passed is not changed


def test_shares_are_equal_unless_weights_are_given() -> None:
    assert source_weights(mix_prompts(SETS)) == {"general": 1.0, "ocr": 1.0, "geneval": 1.0}
    sizes = {name: len(dataset) for name, dataset in SETS.items()}
    assert source_weights(mix_prompts(SETS, sizes)) == {"general": 3.0, "ocr": 2.0, "geneval": 1.0}


def test_weights_stay_with_the_rows(tmp_path) -> None:
    weights = {"general": 3, "ocr": 0.1, "geneval": 2}
    mixed = mix_prompts(SETS, weights)
    mixed.save_to_disk(tmp_path / "saved")
    mixed.to_parquet(tmp_path / "mixed.parquet")
    mixed.to_json(tmp_path / "mixed.jsonl")
    for same in (
        mixed.shuffle(seed=0),
        mixed.select([5, 0, 3]),
        load_from_disk(tmp_path / "saved"),
        load_prompts(tmp_path / "saved"),
        load_prompts(tmp_path / "mixed.parquet"),
        load_prompts(tmp_path / "mixed.jsonl"),
    ):
        assert source_weights(same) == weights
    assert source_weights(mixed.filter(lambda row: row["source"] != "ocr")) == {"general": 3, "geneval": 2}


def test_quotes_of_general_prompts_beside_written_text_are_counted() -> None:
    general = Dataset.from_dict({"prompt": ["a cat", 'the "great" wall', 'a 6" nail', "a hen", "„Guten Tag“"]})
    with pytest.warns(UserWarning) as caught:
        mix_prompts({"general": general, "objects": OBJECTS, "ocr": SIGNS})
    (message,) = [str(each.message) for each in caught]
    assert "2 of the 5 prompts (40.00%) of 'general' have words in quotes, such as 'the \"great\" wall'" in message
    assert "'ocr' asks for written text" in message
    without_column = Dataset.from_dict({"prompt": SIGNS["prompt"][:]})
    with pytest.warns(UserWarning, match="2 of the 5 prompts"):
        mix_prompts({"ocr": without_column, "general": general})
    with pytest.warns(UserWarning, match="2 of the 5 prompts"):
        mix_prompts({"ocr": SIGNS, "general": general.add_column("text", [None] * 5, feature=Value("string"))})


@pytest.mark.filterwarnings("error")
def test_no_warning_about_quotes_that_are_intended_or_declared_as_none() -> None:
    general = Dataset.from_dict({"prompt": ["a cat", 'the "great" wall', "a hen"]})
    empty = general.map(lambda row: {"text": ""})  # what the warning says to do
    assert mix_prompts({"general": empty, "ocr": SIGNS})["text"][:] == ["", "", "", "hi", "yo"]
    mix_prompts({"general": general, "objects": OBJECTS})  # nothing asks for written text
    signs = Dataset.from_dict({"prompt": ['a sign "hi"', 'a sign "yo"', "a sign"]})
    mix_prompts({"more": signs, "ocr": SIGNS})  # both are for it


def test_conversations_are_mixed_as_their_prompts() -> None:
    conversations = Dataset.from_dict({"prompt": [[{"role": "user", "content": "a cow"}]]})
    assert mix_prompts({"general": GENERAL, "chat": conversations})["prompt"][-1] == "a cow"


def test_a_set_that_was_not_mixed_has_no_weights() -> None:
    assert source_weights(GENERAL) is None
    assert source_weights(GENERAL.add_column("source", ["a", "b", "c"])) is None


def test_a_mix_is_sampled_by_its_weights() -> None:
    mixed = mix_prompts(SETS, {"general": 2, "ocr": 1, "geneval": 1})
    sampler = RepeatPromptSampler(
        len(mixed), 2, 4, sources=mixed["source"][:], source_weights=source_weights(mixed), seed=3
    )
    indices = list(sampler)
    for start in range(0, len(indices), 8):
        rows = mixed.select(indices[start : start + 8])
        assert sorted(rows["source"]) == ["general"] * 4 + ["geneval"] * 2 + ["ocr"] * 2


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Value("string"), Value("large_string"), Value("string")),
        (Value("null"), Value("string"), Value("string")),
        (List(Value("string")), Value("null"), List(Value("string"))),
        (Value("int32"), Value("int64"), Value("int64")),
        (Value("int64"), Value("float32"), Value("float64")),
        (Value("float32"), Value("float32"), Value("float32")),
        (List(Value("int64")), List(Value("int64")), List(Value("int64"))),
    ],
)
def test_types_that_go_together_are_brought_together(first, second, expected) -> None:
    def prompts(feature):
        values = {"string": "7", "null": None}.get(getattr(feature, "dtype", ""), 7)
        value = [values] if isinstance(feature, List) and feature.feature != Value("string") else values
        value = ["7"] if feature == List(Value("string")) else value
        if feature == Value("large_string"):
            value = "7"
        return Dataset.from_dict(
            {"prompt": ["x"], "extra": [value]}, features=Features({"prompt": Value("string"), "extra": feature})
        )

    for left, right in ((first, second), (second, first)):
        sets = {"a": prompts(left), "b": prompts(right)}
        mixed = mix_prompts(sets)
        assert mixed.features["extra"] == expected
        assert [mixed[i]["extra"] for i in range(2)] == [sets["a"][0]["extra"], sets["b"][0]["extra"]]


@pytest.mark.parametrize("other", [7, ["hi"], {"say": "hi"}, True])
def test_types_that_clash_are_refused_with_the_sources(other) -> None:
    clash = Dataset.from_dict({"prompt": ["x"], "text": [other]})
    with pytest.raises(ValueError, match=r"The column `text` is .* in the source 'ocr' and .* in 'mine'. Rename"):
        mix_prompts({"general": GENERAL, "ocr": SIGNS, "mine": clash})


def test_a_set_with_its_own_source_column_is_refused() -> None:
    named = GENERAL.add_column("source", ["a", "b", "c"])
    with pytest.raises(ValueError, match="The source 'mine' has a column `source` already"):
        mix_prompts({"ocr": SIGNS, "mine": named})
    with pytest.raises(ValueError, match="has a column `source` already"):
        mix_prompts({"ocr": SIGNS, "mine": mix_prompts({"general": GENERAL})})


def test_refuses_sets_that_cannot_be_used_and_names_them() -> None:
    with pytest.raises(ValueError, match='`datasets\\["ocr"\\]` has the columns .* but no `prompt`'):
        mix_prompts({"general": GENERAL, "ocr": Dataset.from_dict({"text": ["hi"]})})
    with pytest.raises(TypeError, match='`datasets\\["ocr"\\]` is a list'):
        mix_prompts({"general": GENERAL, "ocr": ["hi"]})
    with pytest.raises(ValueError, match="`datasets` is empty"):
        mix_prompts({})
    with pytest.raises(ValueError, match="has the name ''"):
        mix_prompts({"": GENERAL})


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, "2", None])
def test_a_weight_that_is_no_share_is_refused(weight) -> None:
    with pytest.raises(ValueError, match=rf"The source 'ocr' has the weight {weight!r}; a weight is a finite"):
        mix_prompts({"general": GENERAL, "ocr": SIGNS}, {"general": 1, "ocr": weight})


@pytest.mark.parametrize("weights", [{}, {"general": 1}, {"general": 1, "ocr": 1, "orc": 1}])
def test_weights_for_other_sources_are_refused(weights) -> None:
    with pytest.raises(ValueError, match=r"the prompt sets are \['general', 'ocr'\]; pass one weight each"):
        mix_prompts({"general": GENERAL, "ocr": SIGNS}, weights)


def test_a_mix_that_was_changed_later_is_refused() -> None:
    mixed = mix_prompts({"general": GENERAL, "ocr": SIGNS})
    with pytest.raises(ValueError, match="Row 5 of the prompt set has the source None and the weight None"):
        source_weights(concatenate_datasets([mixed, GENERAL]))
    with pytest.raises(ValueError, match="Row 5 of the prompt set has the weight 2.0 for the source 'ocr'"):
        source_weights(concatenate_datasets([mixed, mix_prompts({"ocr": SIGNS}, {"ocr": 2})]))
    with pytest.raises(ValueError, match="has a column `source_weight` but no `source`"):
        source_weights(mixed.remove_columns("source"))
