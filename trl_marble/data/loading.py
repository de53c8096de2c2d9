# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Read prompt sets from the Hub, folders and files."""

import codecs
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Json, LargeList, List, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from .conversations import is_conversation, plain_prompts
from .csv_files import ESCAPED_QUOTE, SEPARATORS, TableError, read_table
from .prompts import prepare_prompts, replace_column


SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# In csv, numbers and texts of digits look the same; columns that rewards read as text must keep "007".
TEXT_COLUMNS = ("tag", "include", "exclude", "text")
IN_QUOTES = re.compile('"[^"]+"')
DOUBLED_IN_QUOTES = re.compile('"(?=.*"")([^"]|"")*"')  # as in a field of a csv file


def load_prompts(
    source: str | os.PathLike[str], split: str = "train", column: str = "prompt", name: str | None = None
) -> Dataset:
    """
    Read a prompt set.

    `source` is the first of these that fits:

    - a folder that `save_to_disk` wrote;
    - a folder with the file `<split>` or `<split>_metadata` in one of the formats below, as flow_grpo and DiffusionNFT
      (https://huggingface.co/papers/2509.16117) publish their prompts: `ocr/train.txt`,
      `geneval/train_metadata.jsonl`;
    - any other folder that `datasets.load_dataset` reads;
    - a file: parquet, csv, tsv, json (a list of objects), jsonl (one object per line) or txt (one prompt per line);
    - the id of a dataset on the Hub. No code from its repository is run.

    Nested values, such as GenEval's `include`, become JSON text, so that the column has the same type in every set,
    whatever the fields; fields that are `None` are left out. Labels that are stored as numbers become their names.
    Blank lines of txt and jsonl files are skipped, with a warning. Fields of a csv file are separated by commas,
    semicolons or tabs; quotes inside quoted fields are doubled or after a backslash. A line whose quotes can be read
    in several ways is refused. The prompt of a conversation is its last user message.

    Example:

    ```python
    from trl_marble.data import load_prompts

    load_prompts("dataset/geneval", split="test")
    load_prompts("user/captions", column="caption")
    ```

    Args:
        source (`str` or `os.PathLike`):
            The folder, the file or the Hub id.
        split (`str`, *optional*, defaults to `"train"`):
            The split to read. Files and folders with one saved set have no splits and are read completely.
        column (`str`, *optional*, defaults to `"prompt"`):
            The column of the prompts; it is renamed to `prompt`.
        name (`str`, *optional*):
            The configuration, for datasets that have several.

    Returns:
        `datasets.Dataset`: The rows in their order, with all their columns.

    Raises:
        `FileNotFoundError`: If there is no such file, folder or dataset.
        `ValueError`: If the format is unknown or the content does not follow it, the split or the column does not
            exist, or the prompts cannot be used for rollouts, see [`prepare_prompts`] (rows are counted from 0).
    """
    path = Path(source).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, split, column, name)
    elif path.is_file():
        dataset = _load_file(path, column)
    elif isinstance(source, str) and HUB_ID.fullmatch(source) and path.suffix.lower() not in SUFFIXES:
        dataset = _load_from_hub(source, split, name)
    else:
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}.")
    return _as_prompts(dataset, column, str(source))


def _load_folder(folder: Path, split: str, column: str, name: str | None) -> Dataset:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"`{folder}` has no split {split!r}; it has {', '.join(saved)}.")
            return saved[split]
        return saved
    found = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES and file.stem in (split, f"{split}_metadata")
    )
    if len(found) > 1:
        raise ValueError(
            f"`{folder}` has several files for the split {split!r}: {', '.join(found)}. Pass one of them."
        )
    if found:
        return _load_file(folder / found[0], column)
    return _warn_about_csv(load_dataset(str(folder), name, split=split), str(folder))


def _load_from_hub(source: str, split: str, name: str | None) -> Dataset:
    try:
        return _warn_about_csv(load_dataset(source, name, split=split), source)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither a local file or folder nor a dataset that can be loaded from the Hub: {error}"
        ) from error


def _warn_about_csv(dataset: Dataset, where: str) -> Dataset:
    if dataset.info.builder_name == "csv":
        warnings.warn(
            f"`{where}` is stored as csv and read by `datasets`, which may lose quotes at the beginning of a prompt, "
            'and converts texts such as "007" to numbers. Pass the file itself, or store the set as parquet.',
            stacklevel=2,
        )
    return dataset


def _load_file(file: Path, column: str) -> Dataset:
    suffix = file.suffix.lower()
    if suffix == ".txt":
        return _load_text(file)
    if suffix in (".json", ".jsonl"):
        return _load_json(file, column)
    if suffix in (".csv", ".tsv"):
        return _load_csv(file, column)
    if suffix == ".parquet":
        return _load_parquet(file)
    raise ValueError(f"`{file}` has the suffix {file.suffix!r}; the formats are {', '.join(SUFFIXES)}.")


def _read(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, with `\\n` at the ends of lines."""
    content = file.read_bytes()
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"`{file}`, line {line}, is not UTF-8 text ({error}); save it as UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"`{file}`, line {line}, has a NUL character: it is not UTF-8 text; save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: Path, text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    lines = text.removesuffix("\n").split("\n")  # not `splitlines`, which also cuts at characters inside a prompt
    kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if kept and len(kept) < len(lines):
        warnings.warn(f"`{file}` has {len(lines) - len(kept)} blank lines; they are skipped.", stacklevel=2)
    return kept


def _load_text(file: Path) -> Dataset:
    prompts = []
    for number, line in _lines(file, _read(file)):
        prompt = line.strip()
        if ESCAPED_QUOTE in prompt or DOUBLED_IN_QUOTES.fullmatch(prompt):
            raise ValueError(
                f"`{file}`, line {number}, is {prompt[:80]!r}, with quotes as in a csv file. Prompts of a txt file "
                "are read unchanged: write each quote once, without a backslash, or give the file a header and the "
                "suffix .csv."
            )
        prompts.append(prompt)
    if len(prompts) > 1 and all(IN_QUOTES.fullmatch(prompt) for prompt in prompts):
        warnings.warn(
            f"All prompts of `{file}` are in double quotes, which are part of the prompts: to rewards they mean that "
            "the images must show the text. If this is not intended, remove the quotes.",
            stacklevel=2,
        )
    return Dataset.from_dict({"prompt": prompts})


def _load_json(file: Path, column: str) -> Dataset:
    """
    Read json and jsonl.

    Not with `load_dataset`, which converts texts to dates if all look like one ("2024-01-01"), and to numbers if a
    column has both. The text that an image must show has to stay unchanged.
    """
    text = _read(file)
    if text.lstrip().startswith("["):
        records = [(f"record {place}", record) for place, record in enumerate(_parse(text, str(file)))]
    else:
        records = [
            (f"line {number}", _parse(line, f"line {number} of `{file}`")) for number, line in _lines(file, text)
        ]
    columns: dict[str, list[Any]] = {}
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(
                f"`{file}`, {where}, is {json.dumps(record)[:80]}; a prompt set is one JSON object per line, or a "
                "list of objects."
            )
        columns |= {key: [] for key in record if key not in columns}
    for key, values in columns.items():
        if "\0" in key:  # where tables end a name
            raise ValueError(f"The column {key!r} of `{file}` has a NUL character in its name; rename it.")
        for _, record in records:
            value = record.get(key)
            values.append(_dump(value) if isinstance(value, list | dict) and key != column else value)
        if any(is_conversation(value) for value in values):
            columns[key] = values = plain_prompts(values, str(file))
        kinds = {type(value).__name__ for value in values if value is not None}
        if len(kinds) > 1 and kinds != {"int", "float"}:
            raise ValueError(
                f"The column `{key}` of `{file}` has values of the types {', '.join(sorted(kinds))}; write all of "
                "them as one type, for example as strings."
            )
    try:
        return Dataset.from_dict(columns)
    except (OverflowError, ValueError, TypeError) as error:
        raise ValueError(f"`{file}` has a value that cannot be in a table ({error}); write it as a string.") from error


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises for half of a surrogate pair
        _without_none(value)  # raises if it is nested too deeply to be processed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    return value


def _load_csv(file: Path, column: str) -> Dataset:
    separators = ("\t",) if file.suffix.lower() == ".tsv" else tuple(SEPARATORS)
    try:
        return read_table(_read(file), column, TEXT_COLUMNS, separators)
    except TableError as error:
        raise ValueError(f"`{file}`, {error}") from error


def _load_parquet(file: Path) -> Dataset:
    try:
        return load_dataset("parquet", data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).strip()
        raise ValueError(f"`{file}` cannot be read as parquet: {reason}.") from error


def _as_prompts(dataset: Dataset, column: str, where: str) -> Dataset:
    """Rename the column of the prompts, convert nested values to text, and check the prompts."""
    if len(dataset) == 0:
        raise ValueError(f"`{where}` is empty; it needs at least one prompt.")
    if column not in dataset.column_names:
        raise ValueError(
            f"`{where}` has no column `{column}`; its columns are {', '.join(dataset.column_names)}. Name the "
            "column of the prompts with `column`."
        )
    if column != "prompt":
        if "prompt" in dataset.column_names:
            raise ValueError(
                f"`{where}` has a column `prompt` besides `{column}`. Read it with `datasets.load_dataset`, remove "
                f"`prompt` and rename `{column}`."
            )
        dataset = dataset.rename_column(column, "prompt")
    for name, feature in dataset.features.items():
        if name == "prompt":
            continue  # checked below
        if isinstance(feature, dict | List | LargeList | Json):
            dataset = replace_column(dataset, name, _to_text(dataset[name][:], name, where))
        elif isinstance(feature, ClassLabel):
            labels = [None if label is None else feature.int2str(label) for label in dataset[name][:]]
            dataset = replace_column(dataset, name, labels)
    return prepare_prompts(dataset, where)


def _to_text(values: Iterable[Any], name: str, where: str) -> list[str | None]:
    try:
        return [value if value is None or isinstance(value, str) else _dump(value) for value in values]
    except TypeError as error:
        raise ValueError(
            f"The column `{name}` of `{where}` cannot be written as JSON ({error}). Read the set with "
            "`datasets.load_dataset` and remove or change the column."
        ) from error


def _dump(value: Any) -> str:
    return json.dumps(_without_none(value))


def _without_none(value: Any) -> Any:
    """A nested value without fields that are `None`: in a table every row has all fields."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_none(entry) for entry in value]
    return value
