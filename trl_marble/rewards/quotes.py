# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find the text that a prompt asks for: the text between its quotation marks."""

import html
import re
from typing import NamedTuple


# Marks of one family can open and close each other, since people mix them.
FAMILIES = ('"＂“”„‟〝〞〟″❝❞', "«»", "‹›", "「」｢｣﹁﹂", "『』﹃﹄")
OPENING = frozenset("“„‟〝❝«‹「｢﹁『﹃`‘‚")
CLOSING = frozenset("”〞〟❞»›」｣﹂』﹄’")
CLOSED_BY_OPENING = {"„": "“", "»": "«", "›": "‹"}  # as in German
# Two consecutive single marks are a double one, as in LaTeX.
MARKS = re.compile(f"[{''.join(FAMILIES)}]|`{{2,}}|'{{2,}}|‘{{2,}}|’{{2,}}|‚{{2,}}")
INCHES = frozenset("\"”″'’")
ENTITY = re.compile(r"&#?\w{2,8};")  # of HTML, such as &quot; and &#34;
# A prompt that is a field of a CSV file, in which each quotation mark is doubled.
CSV_FIELD = re.compile(r'\s*"((?:[^"]|"")*)"\s*')
# A text in single quotes, which could also be two apostrophes: 'Open'.
SINGLE_QUOTES = re.compile(r"(?<!\w)['‘‚](?=\S)[^'‘’‚]{2,80}(?<=\S)['‘’](?!\w)")


class Quoted(NamedTuple):
    """
    The text between the quotation marks of a prompt.

    Args:
        text (`str`):
            The quoted parts, with spaces between them; empty if there are none.
        doubtful (`bool`):
            Whether a quotation mark has no partner, or there are only single quotes, which could be apostrophes.
    """

    text: str
    doubtful: bool


class _Mark(NamedTuple):
    """A quotation mark: its place and family, and the characters before and after it and the marks next to it."""

    start: int
    end: int
    sign: str
    family: int
    before: str
    after: str


class _Span(NamedTuple):
    """Two marks that belong together: the places of both marks and of the text between them."""

    start: int
    inner_start: int
    inner_end: int
    end: int


def read_quotes(prompt: str) -> Quoted:
    """
    Find the text that a prompt asks for.

    Quotation marks are paired by the characters around them, so that mixed marks, the same mark on both sides (as in
    Swedish and Finnish), doubled marks and nested quotes are understood. Single quotes are apostrophes. A mark right
    after a digit that closes nothing means inches.

    Args:
        prompt (`str`):
            The prompt.

    Returns:
        [`Quoted`]: The text, and whether it is uncertain.
    """
    prompt = _unescape(prompt)
    marks = _marks(prompt)
    spans, paired = _pair_by_context(marks)
    if not paired:
        in_turn, in_turn_paired = _pair_in_turn(marks)
        if in_turn_paired:
            spans = in_turn
    enclosed = {(span.start, span.end): span for span in spans}
    parts = [_inside(prompt, span, enclosed) for span in _outermost(spans)]
    text = " ".join(part for part in parts if part.strip())
    return Quoted(text, not paired or (not text and SINGLE_QUOTES.search(prompt) is not None))


def quoted_text(prompt: str) -> str:
    """The quoted parts of a prompt, with spaces between them; empty if there are none."""
    return read_quotes(prompt).text


def _unescape(prompt: str) -> str:
    """The prompt without the escapes that CSV, JSON and HTML have for quotation marks."""
    field = CSV_FIELD.fullmatch(prompt)
    if field and '""' in field[1]:
        prompt = field[1].replace('""', '"')
    return ENTITY.sub(lambda found: html.unescape(found[0]), prompt.replace('\\"', '"'))


def _marks(prompt: str) -> list[_Mark]:
    found = list(MARKS.finditer(prompt))
    # Consecutive marks share the characters before the first and after the last of them.
    before = [prompt[match.start() - 1 : match.start()] for match in found]
    after = [prompt[match.end() : match.end() + 1] for match in found]
    for i in range(1, len(found)):
        if found[i - 1].end() == found[i].start():
            before[i] = before[i - 1]
    for i in range(len(found) - 1, 0, -1):
        if found[i - 1].end() == found[i].start():
            after[i - 1] = after[i]
    return [
        _Mark(match.start(), match.end(), match[0][0], _family(match[0][0]), before[i], after[i])
        for i, match in enumerate(found)
    ]


def _family(sign: str) -> int:
    return next((number for number, signs in enumerate(FAMILIES) if sign in signs), 0)


def _pair_by_context(marks: list[_Mark]) -> tuple[list[_Span], bool]:
    """Pair marks by the characters around them, with nested quotes; also whether every mark has a partner."""
    spans, paired = [], True
    opened: list[_Mark] = []
    places: list[list[int]] = [[] for _ in FAMILIES]  # in `opened`, of the marks of each family
    for mark in marks:
        fitting = places[mark.family]
        if not fitting and _is_inch_mark(mark):
            continue
        if _opens(mark, opened[fitting[-1]] if fitting else None):
            fitting.append(len(opened))
            opened.append(mark)
        elif fitting:
            place = fitting[-1]
            paired = paired and place == len(opened) - 1
            spans.append(_span(opened[place], mark))
            for left_over in opened[place:]:
                places[left_over.family].pop()
            del opened[place:]
        else:
            paired = False
    return spans, paired and not opened


def _pair_in_turn(marks: list[_Mark]) -> tuple[list[_Span], bool]:
    """Pair each mark with the next one of its family; also whether every mark has a partner."""
    spans, opened = [], None
    for mark in marks:
        if opened is None:
            if mark.before.isalnum() and not mark.after.strip() and not _is_inch_mark(mark):
                return [], False  # a closing mark
            opened = None if _is_inch_mark(mark) else mark
        elif mark.family == opened.family:
            spans.append(_span(opened, mark))
            opened = None
    return spans, opened is None


def _span(opening: _Mark, closing: _Mark) -> _Span:
    return _Span(opening.start, opening.end, closing.start, closing.end)


def _is_inch_mark(mark: _Mark) -> bool:
    return mark.sign in INCHES and mark.before.isdigit()


def _opens(mark: _Mark, opened: _Mark | None) -> bool:
    """Whether a mark opens a quote; `opened` is the last open mark of its family."""
    before, after = mark.before, mark.after
    gap_before, gap_after = not before.strip(), not after.strip()
    if (gap_before or before in "([{") and after.isalnum():
        return True
    if before.isalnum() and not gap_after and not after.isalnum():
        return False
    if before.isalnum() and gap_after:
        return False
    if mark.sign in CLOSING:
        return opened is None
    if mark.sign in OPENING:
        return opened is None or CLOSED_BY_OPENING.get(opened.sign) != mark.sign
    # For a mark that can open and close, letters and spaces around it count more than punctuation.
    left = not gap_after and (after.isalnum() or not before.isalnum())
    right = not gap_before and (before.isalnum() or not after.isalnum())
    return left if left != right else opened is None


def _outermost(spans: list[_Span]) -> list[_Span]:
    outer: list[_Span] = []
    for span in sorted(spans):
        if not outer or span.start >= outer[-1].end:
            outer.append(span)
    return outer


def _inside(prompt: str, span: _Span, enclosed: dict[tuple[int, int], _Span]) -> str:
    """The text in a span; for quotes around quotes, the text in the innermost ones."""
    while inner := enclosed.get((span.inner_start, span.inner_end)):
        span = inner
    return prompt[span.inner_start : span.inner_end]
