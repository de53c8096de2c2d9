# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Read csv and tsv tables, written by programs or by hand, without losing quotation marks."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from datasets import Dataset


SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
SEPARATOR_LINE = re.compile(r"sep=([,;\t])(?=\n)", re.IGNORECASE)  # a convention of Excel
ESCAPED_QUOTE = '\\"'

# Numbers as programs write them. A text of digits such as "007" is not a number.
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")
BOOLS = {"true": True, "false": False}


class TableError(ValueError):
    """
    A line that cannot be read with certainty.

    Args:
        line (`int`):
            Its number from 1; for a record of several lines that of the first line.
        reason (`str`):
            What is wrong with it and what to do.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line


def read_table(
    text: str, column: str, text_columns: Collection[str] = (), separators: Sequence[str] = tuple(SEPARATORS)
) -> Dataset:
    """
    Read a table with a header.

    A field may be in double quotes. Quotes inside it are doubled (RFC 4180) or, if the file cannot be read so, after a
    backslash. Fields that begin with a quoted word ('"OPEN" sign on a door') or have quotes inside are read unchanged.
    A line that can be read in several ways is refused.

    Args:
        text (`str`):
            The file, with `\\n` at the ends of lines.
        column (`str`):
            A column whose fields stay text, by which the separator is found.
        text_columns (`Collection[str]`, *optional*):
            Other columns whose fields stay text. All others become numbers or booleans if all their fields are such.
        separators (`Sequence[str]`, *optional*, defaults to `(",", ";", "\t")`):
            The possible separators of fields. The separator is the first one with which the header has `column`, or
            else the first of all. A line such as `sep=;` at the beginning of the file sets it.

    Returns:
        `Dataset`: an empty field is `None`; a column without a name is called `"Unnamed: <place>"`.

    Raises:
        `TableError`: If a line cannot be read with certainty.
    """
    if declared := SEPARATOR_LINE.match(text):
        text, separators = text[declared.end() :], (declared[1],)  # leaves a blank line, for correct line numbers
    header, rows = _records(text, _separator(text, column, separators))
    columns: dict[str, list[Any]] = {}
    for place, name in enumerate(header):
        values = [row[place] or None for row in rows]
        keeps_text = name == column or name in text_columns
        columns[name or f"Unnamed: {place}"] = values if keeps_text else _typed(values)
    return Dataset.from_dict(columns)


def _records(text: str, separator: str) -> tuple[list[str], list[list[str]]]:
    """The header, and rows of the same length."""
    try:
        records = list(_parse(text, separator, escapes=False))
    except TableError as error:
        if ESCAPED_QUOTE not in text:
            raise
        try:
            records = list(_parse(text, separator, escapes=True))
        except TableError:
            raise error from None
    if not records:
        return [], []
    header = [name.strip() for name in records[0][1]]
    for name in header:
        if name and header.count(name) > 1:
            raise TableError(records[0][0], f"the header has the column {name!r} twice. Rename one of them.")
    rows = []
    for line, fields in records[1:]:
        if len(fields) > len(header):
            raise TableError(
                line,
                f"it has {len(fields)} fields, more fields than its header. Put fields that contain "
                f"{SEPARATORS[separator]} in double quotes, and double the quotes inside.",
            )
        rows.append(fields + [""] * (len(header) - len(fields)))
    return header, rows


def _separator(text: str, column: str, separators: Sequence[str]) -> str:
    """The separator with which the first line has a column."""
    first = text.lstrip("\n").split("\n", 1)[0]
    for separator in separators:
        try:
            records = list(_parse(first, separator, escapes=False))
        except TableError:
            continue
        if records and column in [name.strip() for name in records[0][1]]:
            return separator
    return separators[0]


def _parse(text: str, separator: str, escapes: bool) -> Iterator[tuple[int, list[str]]]:
    """Records with the number of their first line; blank lines are skipped."""
    place, line = 0, 1
    while place < len(text):
        end_of_line = _find(text, "\n", place, len(text))
        if not text[place:end_of_line].strip(" "):
            place, line = end_of_line + 1, line + 1
            continue
        start, start_line, fields = place, line, []
        while True:
            field, place = _field(text, place, separator, escapes, start_line)
            fields.append(field)
            if place >= len(text) or text[place] == "\n":
                break
            place += 1  # the separator
        line += text.count("\n", start, place) + 1
        place += 1
        yield start_line, fields


def _field(text: str, place: int, separator: str, escapes: bool, line: int) -> tuple[str, int]:
    """The field that begins at a place, and its end: at a separator, or the end of the line or text."""
    opening = place
    while text.startswith(" ", opening):
        opening += 1
    if text.startswith('"', opening):
        quoted = _quoted(text, opening, separator, escapes)
        if quoted is not None:
            field, end = quoted
            if ESCAPED_QUOTE in field and not escapes:
                raise _escape_error(field, line)
            return field, end
    end_of_line = _find(text, "\n", place, len(text))
    end = _find(text, separator, place, end_of_line)
    field = text[place:end]
    if text.startswith('"', opening) and ('""' in field or field.replace(ESCAPED_QUOTE, "").count('"') % 2):
        raise TableError(
            line,
            f"the field that begins with {field[:40]!r} opens a double quote that is not closed at its end. Write the "
            "field in double quotes, and double the quotes inside.",
        )
    if ESCAPED_QUOTE in field and not escapes:
        raise _escape_error(field, line)
    return field.replace(ESCAPED_QUOTE, '"'), end


def _quoted(text: str, opening: int, separator: str, escapes: bool) -> tuple[str, int] | None:
    """A field in double quotes and its end; `None` if it does not end with a closing quote."""
    parts, place = [], opening + 1
    while (quote := text.find('"', place)) >= 0:
        before = text[place:quote]
        slashes = len(before) - len(before.rstrip("\\"))
        if escapes and slashes:
            # Two backslashes before a quote mean one; a single one means that the quote is text.
            parts.append(before[: len(before) - slashes] + "\\" * (slashes // 2))
            if slashes % 2:
                parts.append('"')
                place = quote + 1
                continue
        else:
            parts.append(before)
        if text.startswith('""', quote):
            parts.append('"')
            place = quote + 2
            continue
        end = quote + 1
        while text.startswith(" ", end):
            end += 1
        at_end = end == len(text) or text[end] in (separator, "\n")
        return ("".join(parts), end) if at_end else None
    return None


def _escape_error(field: str, line: int) -> TableError:
    return TableError(
        line,
        f"the field that begins with {field[:40]!r} has a quote after a backslash. Write the field in double quotes, "
        "and double the quotes inside.",
    )


def _find(text: str, what: str, start: int, end: int) -> int:
    """The first place of a text between two places; the second place if it is not there."""
    found = text.find(what, start, end)
    return end if found < 0 else found


def _typed(values: list[str | None]) -> list[Any]:
    """Convert the fields of a column to numbers or booleans, if all of them are such."""
    given = [value for value in values if value is not None]
    read: Callable[[str], Any] = str
    if given and all(INTEGER.fullmatch(value) for value in given):
        read = int
    elif given and all(NUMBER.fullmatch(value) for value in given):
        read = float
    elif given and all(value.lower() in BOOLS for value in given):
        read = _bool
    return [None if value is None else read(value) for value in values]


def _bool(value: str) -> bool:
    return BOOLS[value.lower()]
