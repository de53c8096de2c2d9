# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompt sets from files and folders: texts are read unchanged, and files that cannot be read are refused."""

import csv
import io
import json
import warnings
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_marble.data import compositional_prompts, load_prompts
from trl_marble.data.csv_files import read_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """`load_dataset` keeps what it has read; not in the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


# ---- Text ----


def test_a_line_is_a_prompt(write) -> None:
    lines = ["a cat", "  'two' dogs, \"hi\" ", "Привет, мир", "東京の夜", "a\u2028b", "a cat"]
    path = write("train.txt", "\ufeff" + "\r\n".join(lines) + "\r\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the end of the last line is no blank line
        prompts = load_prompts(path)
    assert prompts.to_dict() == {"prompt": [line.strip() for line in lines]}


def test_blank_lines_are_counted(write) -> None:
    with pytest.warns(UserWarning, match="has 3 blank lines; they are skipped"):
        prompts = load_prompts(write("a.txt", "\na cat\n \t\n\na dog"))
    assert prompts["prompt"][:] == ["a cat", "a dog"]


@pytest.mark.parametrize("line", ['"a sign ""OPEN"" here"', 'a sign \\"OPEN\\"', '"""OPEN"" sign"'])
def test_a_line_with_the_quotes_of_a_csv_file_is_refused(write, line) -> None:
    with pytest.raises(ValueError, match="a.txt`, line 3, is .* with quotes as in a csv file"):
        load_prompts(write("a.txt", f"a cat\n\n{line}\n"))


def test_a_warning_about_prompts_that_are_all_in_quotes(write) -> None:
    with pytest.warns(UserWarning, match="All prompts of `.*a.txt` are in double quotes"):
        assert load_prompts(write("a.txt", '"a cat"\n"a dog"\n'))["prompt"][:] == ['"a cat"', '"a dog"']
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = ['"OPEN" sign', '"a" or "b"', '""OPEN"" sign says ""HI""', "a cat"]
        assert load_prompts(write("b.txt", "\n".join(plain)))["prompt"][:] == plain


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_prompt_is_refused(write, name, content) -> None:
    with pytest.raises(ValueError, match=rf"`.*{name}` is empty; it needs at least one prompt"):
        load_prompts(write(name, content))


def test_a_file_in_another_encoding_is_refused(write) -> None:
    with pytest.raises(ValueError, match="is not UTF-8 text .* save it as UTF-8"):
        load_prompts(write("a.txt", "café".encode("latin-1")))


# ---- JSON ----

GENEVAL = [
    {
        "tag": "counting",
        "include": [{"class": "fork", "count": 2}],
        "exclude": [{"class": "fork", "count": 3}],
        "prompt": "a photo of two forks",
    },
    {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "cow", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cow left of a cup",
    },
    {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "red"}], "prompt": "a photo of a red bus"},
]


def as_lines(records: list) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_the_folder_of_geneval_prompts(write) -> None:
    write("geneval/test_metadata.jsonl", as_lines(GENEVAL[:1]))
    folder = write("geneval/train_metadata.jsonl", as_lines(GENEVAL)).parent
    prompts = load_prompts(folder)
    assert prompts.to_dict() == {
        "tag": ["counting", "position", "colors"],
        "include": [json.dumps(record["include"]) for record in GENEVAL],
        "exclude": ['[{"class": "fork", "count": 3}]', None, None],
        "prompt": [record["prompt"] for record in GENEVAL],
    }
    assert all(feature == Value("string") for feature in prompts.features.values())
    assert load_prompts(str(folder), split="test")["prompt"][:] == ["a photo of two forks"]


def test_the_folders_of_plain_prompts(write) -> None:
    write("ocr/test.txt", 'a sign "no"\n')
    folder = write("ocr/train.txt", 'a sign "hi"\na sign "yo"\n').parent
    assert load_prompts(folder)["prompt"][:] == ['a sign "hi"', 'a sign "yo"']
    assert load_prompts(folder, split="test")["prompt"][:] == ['a sign "no"']


def test_a_list_of_objects_is_read_like_lines(write) -> None:
    assert (
        load_prompts(write("a.json", json.dumps(GENEVAL, indent=2))).to_dict()
        == load_prompts(write("a.jsonl", as_lines(GENEVAL))).to_dict()
        == load_prompts(write("b.json", as_lines(GENEVAL))).to_dict()
    )


def test_texts_stay_texts(write) -> None:
    """What looks like a date or a number is still what a picture must say, character by character."""
    texts = ["2024-01-01", "007", "null", "1e3"]
    records = [{"prompt": f'"{text}"', "text": text} for text in texts]
    assert load_prompts(write("a.jsonl", as_lines(records)))["text"][:] == texts
    table = "prompt,text\n" + "".join(f'"""{text}""",{text}\n' for text in texts)
    prompts = load_prompts(write("a.csv", table))
    assert prompts["text"][:] == texts
    assert prompts["prompt"][:] == [f'"{text}"' for text in texts]


def test_numbers_stay_numbers(write) -> None:
    records = [{"prompt": "a", "level": 1, "share": 2}, {"prompt": "b", "share": 0.5}]
    prompts = load_prompts(write("a.jsonl", as_lines(records)))
    assert prompts.to_dict() == {"prompt": ["a", "b"], "level": [1, None], "share": [2.0, 0.5]}
    table = load_prompts(write("a.csv", "prompt,level\na,1\nb,2\n"))
    assert table["level"][:] == [1, 2]


def test_fields_that_are_null_are_left_out(write) -> None:
    records = [{"prompt": "a", "include": [{"class": "cup", "color": None, "count": 1}]}]
    prompts = load_prompts(write("a.jsonl", as_lines(records)))
    assert prompts["include"][:] == ['[{"class": "cup", "count": 1}]']


def test_blank_lines_between_objects_are_counted(write) -> None:
    with pytest.warns(UserWarning, match="has 1 blank lines"):
        prompts = load_prompts(write("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}\n'))
    assert prompts["prompt"][:] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": oops}\n', "line 2 of `.*a.jsonl` is not JSON: Expecting value"),
        ("a.json", '[{"prompt": "a"},]', "a.json is not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n7\n', "`.*a.jsonl`, line 2, is 7; a prompt set is one JSON object per line"),
        ("a.json", '["a cat"]', '`.*a.json`, record 0, is "a cat"; a prompt set is'),
        ("a.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "b", "n": "1"}', "The column `n` .* types int, str; write"),
        ("a.json", '{"prompt": ["a", "b"]}', r"Row 0 of `.*` has the prompt \['a', 'b'\]"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}', "Row 1 of `.*` has the prompt ' '"),
        ("a.jsonl", '{"prompt": "a"}\n{"tag": "x"}', "Row 1 of `.*` has the prompt None"),
    ],
)
def test_json_that_is_not_a_prompt_set_is_refused_with_its_place(write, name, content, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(write(name, content))


# ---- Tables ----


def test_csv_with_quotes_and_empty_fields(write) -> None:
    path = write("a.csv", '\ufeffcaption,tag,level\n"a ""big"", red cup",colors,1\nNA,,\n東京,x,3\n')
    prompts = load_prompts(path, column="caption")
    assert prompts.to_dict() == {
        "prompt": ['a "big", red cup', "NA", "東京"],
        "tag": ["colors", None, "x"],
        "level": [1.0, None, 3.0],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "`.*a.csv` is empty; it needs at least one prompt"),
        ("prompt\n", "`.*a.csv` is empty; it needs at least one prompt"),
        ("prompt\na cat, a dog\n", "more fields than its header. Put fields that contain a comma in double quotes"),
        ("prompt\na cat\na cat, a dog\n", "`.*a.csv`, line 3: it has 2 fields, more fields than its header"),
        ("prompt,tag,tag\na cat,x,y\n", "line 1: the header has the column 'tag' twice. Rename one"),
        ("sep=;\nprompt;tag\n\na;b;c\n", "line 4: it has 3 fields"),
        (
            "\n\nprompt;tag\n\na;b;c\n",
            "line 5: it has 3 fields, .* Put fields that contain a semicolon in",
        ),
        ("prompt,tag\na cat,x\n,y\n", "Row 1 of `.*a.csv` has the prompt None"),
    ],
)
def test_csv_that_is_not_a_prompt_set_is_refused(write, content, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(write("a.csv", content))


OPEN = 'a sign "OPEN" here'
READ_AS_MEANT = {
    "doubled": ('prompt,topic\n"a sign ""OPEN"" here",door\n', OPEN),
    "behind a backslash": ('prompt,topic\n"a sign \\"OPEN\\" here",door\n', OPEN),
    "behind a backslash before a comma": (
        'prompt,topic\n"it says \\"OPEN\\", in red",door\n',
        'it says "OPEN", in red',
    ),
    "behind a backslash at the end": ('prompt\n"a sign \\"OPEN\\""\n', 'a sign "OPEN"'),
    "behind a backslash at the beginning": ('prompt,topic\n"\\"OPEN\\" sign",door\n', '"OPEN" sign'),
    "behind a backslash without others": ('prompt,topic\na sign \\"OPEN\\" here,door\n', OPEN),
    "a backslash before a closing quote": (
        'prompt,topic\n"C:\\dir\\ and \\"OPEN\\" \\\\",door\n',
        'C:\\dir\\ and "OPEN" \\',
    ),
    "by hand": ("prompt,topic\n" + OPEN + ",door\n", OPEN),
    "by hand, at the beginning": ('prompt,topic\n"OPEN" sign on a door,door\n', '"OPEN" sign on a door'),
    "by hand, at both ends": ('prompt,topic\n"OPEN" or "CLOSED",door\n', '"OPEN" or "CLOSED"'),
    "by hand, last": ('topic,prompt\ndoor,"OPEN" sign on a door', '"OPEN" sign on a door'),
    "a space before the quote": ('topic,prompt\ndoor, "a big, red cat" \n', "a big, red cat"),
    "semicolons": ('prompt;topic\n"a sign ""OPEN""; here, there";door\n', 'a sign "OPEN"; here, there'),
    "semicolons and commas": ("prompt;topic\na cat, a dog;door\n", "a cat, a dog"),
    "tabs": ('"prompt"\t"topic"\na sign "OPEN"; here, there\tdoor\n', 'a sign "OPEN"; here, there'),
    "Windows": ('\ufeffprompt,topic\r\n"a ""big""\r\ncat",door\r\n', 'a "big"\ncat'),
    "two lines": ('prompt,topic\n"a cat,\n\na dog",door\n', "a cat,\n\na dog"),
    "other quotes": ("prompt,topic\n„OPEN“ sign,door\n", "„OPEN“ sign"),
    "inches": ('prompt,topic\na 6" nail,door\n', 'a 6" nail'),
}


@pytest.mark.parametrize(("content", "meant"), READ_AS_MEANT.values(), ids=READ_AS_MEANT)
def test_quotes_of_a_csv_file_are_read_as_they_were_meant(write, content, meant) -> None:
    assert load_prompts(write("a.csv", content)).select_columns("prompt")[:] == {"prompt": [meant]}
    with_more = load_prompts(write("b.csv", content.rstrip() + "\n" + content.split("\n", 1)[1]))
    assert with_more["prompt"][:] == [meant, meant]
    in_utf_16 = load_prompts(write("c.csv", content.removeprefix("\ufeff").encode("utf-16")))
    assert in_utf_16["prompt"][:] == [meant]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_can_be_set_as_in_excel(write, separator) -> None:
    lines = [f"sep={separator}", f"prompt{separator}topic", f'"a, b; c"{separator}door']
    assert load_prompts(write("a.csv", "\r\n".join(lines)))[:] == {"prompt": ["a, b; c"], "topic": ["door"]}


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('prompt,topic\na,b\n"OPEN sign,door\n"CLOSED" sign,door\n', 3, "begins with '\"OPEN sign' opens a double"),
        ('prompt,topic\n"a\nb",c\n"OPEN sign,door\n', 4, "not closed at its end. Write the field in double quotes"),
        ('prompt,topic\n"a ""big"" sign" here,door\n', 2, "opens a double quote that is not closed"),
        ('prompt,topic\n""OPEN"" sign,door\n', 2, "opens a double quote that is not closed at its end"),
        ('prompt,topic\n"OPEN, now" sign,door\n', 2, "opens a double quote that is not closed at its end"),
        ('prompt,topic\n"OPEN", a sign,door\n', 2, "it has 3 fields, more fields than its header"),
        ('prompt,topic\n"a \\""b"" c",door\n', 2, r"has a quote after a backslash. Write"),
        ('prompt,topic\n"a \\"b\\" c",door\n"it ends with \\",door\n', 2, "opens a double quote|after a backslash"),
    ],
)
def test_a_csv_line_that_can_be_read_in_several_ways_is_refused_by_its_number(write, content, line, reason) -> None:
    with pytest.raises(ValueError, match=rf"a.csv`, line {line}: .*({reason})"):
        load_prompts(write("a.csv", content))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.text("ab\",;\t\n '7.é", max_size=8)] * 2), min_size=1, max_size=5),
    separator=st.sampled_from([",", ";", "\t"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_fields_written_by_a_program_are_read_unchanged(rows, separator, quoting, ending) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=ending).writerows(
        [("prompt", "text"), *rows]
    )
    table = read_table(file.getvalue().replace("\r\n", "\n"), "prompt", ["text"])
    assert list(zip(table["prompt"], table["text"], strict=True)) == [(a or None, b or None) for a, b in rows]


def test_a_tsv_file_is_separated_by_tabs_whatever_its_header(write) -> None:
    path = write("parti.tsv", 'Prompt, English\tCategory\na sign "Deep, Learning"\tArts\n"a ""big"" cat"\tAnimals\n')
    prompts = load_prompts(path, column="Prompt, English")
    assert prompts.to_dict() == {
        "prompt": ['a sign "Deep, Learning"', 'a "big" cat'],
        "Category": ["Arts", "Animals"],
    }


def test_columns_of_a_csv_file_have_the_types_that_all_their_fields_have(write) -> None:
    content = "prompt,level,share,code,yes,mixed,big\na,1,0.5,007,True,1,12345678901234567890\n5,,2,8,false,x,1\n"
    assert load_prompts(write("a.csv", content)).to_dict() == {
        "prompt": ["a", "5"],
        "level": [1, None],
        "share": [0.5, 2.0],
        "code": ["007", "8"],
        "yes": [True, False],
        "mixed": ["1", "x"],
        "big": ["12345678901234567890", "1"],
    }
    with_index = load_prompts(write("b.csv", ",prompt\n0,a cat\n1,a dog\n"))
    assert with_index.to_dict() == {"Unnamed: 0": [0, 1], "prompt": ["a cat", "a dog"]}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
def test_another_encoding_is_refused_with_its_line(write, name) -> None:
    with pytest.raises(ValueError, match=f"{name}`, line 2, is not UTF-8 text .* save it as UTF-8"):
        load_prompts(write(name, "prompt\ncafé\n".encode("latin-1")))
    with pytest.raises(ValueError, match=f"{name}`, line 1, has a NUL character"):
        load_prompts(write(name, "prompt\ncafe\n".encode("utf-16-le")))


def test_a_warning_about_csv_files_that_datasets_reads(write) -> None:
    folder = write("set/data.csv", "prompt,topic\na cat,x\n").parent
    with pytest.warns(UserWarning, match="stored as csv and read by `datasets`.*quotes.*Pass the file itself"):
        assert load_prompts(folder)["prompt"][:] == ["a cat"]


def test_parquet_with_nested_columns_and_labels(tmp_path) -> None:
    features = Features(
        {
            "prompt": Value("string"),
            "tag": ClassLabel(names=["colors", "counting"]),
            "include": List({"class": Value("string"), "count": Value("int64"), "color": Value("string")}),
            "words": List(Value("string")),
            "size": {"width": Value("int64")},
            "level": Value("int64"),
        }
    )
    rows = [
        {"prompt": "a", "tag": 1, "include": [{"class": "cup", "count": 2, "color": None}], "level": 1},
        {"prompt": "b", "tag": None, "include": None, "words": ["x", "é"], "size": {"width": 3}},
    ]
    columns = {name: [row.get(name) for row in rows] for name in features}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    prompts = load_prompts(tmp_path / "a.parquet")
    assert prompts.to_dict() == {
        "prompt": ["a", "b"],
        "tag": ["counting", None],
        "include": ['[{"class": "cup", "count": 2}]', None],
        "words": [None, '["x", "\\u00e9"]'],
        "size": [None, '{"width": 3}'],
        "level": [1, None],
    }


def test_a_broken_parquet_file_is_refused(write) -> None:
    with pytest.raises(ValueError, match=r"`.*a.parquet` cannot be read as parquet: .*[Pp]arquet"):
        load_prompts(write("a.parquet", "no"))


def test_values_without_a_form_in_json_are_refused(tmp_path) -> None:
    features = Features({"prompt": Value("string"), "when": List(Value("timestamp[s]"))})
    Dataset.from_dict({"prompt": ["a"], "when": [[0]]}, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="The column `when` of .* cannot be written as JSON .*datetime"):
        load_prompts(tmp_path / "a.parquet")


def test_generated_sets_are_read_unchanged(tmp_path) -> None:
    made = compositional_prompts(20)
    made.to_json(tmp_path / "a.jsonl")
    made.to_csv(tmp_path / "a.csv")
    made.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert load_prompts(tmp_path / name).to_dict() == made.to_dict()


# ---- Folders, splits, columns ----


def test_a_folder_like_a_dataset_of_the_hub(tmp_path) -> None:
    """Configurations in the card and numbered shards, through `load_dataset`."""
    for config, split, text in (("plain", "train", "a"), ("plain", "test", "b"), ("long", "train", "c")):
        folder = tmp_path / config
        folder.mkdir(exist_ok=True)
        rows = {"prompt": [text, text * 2], "include": [[{"class": "cup", "position": ["above", "0"]}], None]}
        Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: plain\n  data_files:\n  - {split: train, path: plain/train-*}\n"
        "  - {split: test, path: plain/test-*}\n"
        "- config_name: long\n  data_files:\n  - {split: train, path: long/train-*}\n---\n"
    )
    prompts = load_prompts(str(tmp_path), name="plain")
    assert prompts.to_dict() == {
        "prompt": ["a", "aa"],
        "include": ['[{"class": "cup", "position": ["above", "0"]}]', None],
    }
    assert load_prompts(tmp_path, split="test", name="plain")["prompt"][:] == ["b", "bb"]
    assert load_prompts(tmp_path, name="long")["prompt"][:] == ["c", "cc"]
    with pytest.raises(ValueError, match="Unknown split .*val"):
        load_prompts(tmp_path, split="val", name="plain")


def test_folders_of_save_to_disk_are_read(tmp_path) -> None:
    one, two = Dataset.from_dict({"prompt": ["a"]}), Dataset.from_dict({"prompt": ["b"]})
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    assert load_prompts(tmp_path / "one")["prompt"][:] == ["a"]
    assert load_prompts(tmp_path / "both", split="test")["prompt"][:] == ["b"]
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        load_prompts(tmp_path / "both", split="val")


def test_two_files_for_a_split_are_refused(write) -> None:
    write("set/train.txt", "a")
    folder = write("set/train_metadata.jsonl", '{"prompt": "a"}').parent
    with pytest.raises(ValueError, match="several files for the split 'train': train.txt, train_metadata.jsonl"):
        load_prompts(folder)


def test_a_missing_column_is_refused_with_those_there_are(write) -> None:
    path = write("a.jsonl", '{"text": "a", "tag": "b"}')
    with pytest.raises(ValueError, match="has no column `prompt`; its columns are text, tag. Name the column"):
        load_prompts(path)
    assert load_prompts(path, column="text").to_dict() == {"prompt": ["a"], "tag": ["b"]}


def test_no_column_is_dropped_for_another(write) -> None:
    with pytest.raises(ValueError, match="has a column `prompt` besides `caption`"):
        load_prompts(write("a.jsonl", '{"prompt": "a", "caption": "b"}'), column="caption")


def test_an_unknown_format_is_refused_with_those_there_are(write) -> None:
    with pytest.raises(
        ValueError, match=r"has the suffix '.xlsx'; the formats are .parquet, .csv, .tsv, .jsonl, .json"
    ):
        load_prompts(write("a.xlsx", "x"))


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "a/b/c", Path("nowhere"), "~/no/where.csv"])
def test_a_missing_file_is_refused_without_asking_the_hub(source) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load_prompts(source)


@pytest.mark.parametrize("source", ["someone/prompts-of-theirs", "prompts_1.5"])
def test_names_of_hub_datasets_are_looked_up_there(source) -> None:
    """Tests have no network: the Hub's client says so, and the message says what was looked for."""
    with pytest.raises(FileNotFoundError, match=f"'{source}' is neither a local file or folder nor .* Hub"):
        load_prompts(source)


def test_an_empty_folder_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="doesn't contain any data files"):
        load_prompts(tmp_path)
