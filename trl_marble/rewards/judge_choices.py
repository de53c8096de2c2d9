# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find in the answer of a judge which image it prefers, and refuse every answer that is uncertain."""

import re
from typing import Literal

from .judge_score import OTHER_TAG, TAKEN_BACK, remove_thoughts


PAIR_LABEL, RANKING_LABEL = "Better image", "Ranking"
TIE = 0  # among the numbers of images, which begin at 1
# "Neither is the better image: 1 has six fingers"
NEGATION = (
    r"(?P<negation>\b(?:neither|none|not|no|never|cannot|\w+n['’]t)[^\S\n]+"
    r"(?:(?:image|of|the|two|both|them|is|are|a|any|clear(?:ly)?|really|say|tell|decide|which|one)[^\S\n]+)*)?"
)
FILLING = r"""(?P<filling>[\s*_`"'“”‘’\[({:：=#-]{0,20}(?:is\b[\s*_`:]{0,5})?)"""
CHOICE = re.compile(
    rf"{NEGATION}\bbetter[\s_*`-]{{1,4}}image\b{FILLING}(?:image\s*)?(?P<choice>1|2|tie)\b(?!\.\d)"
    r"(?!\s*(?:or|and|/|,|&)\s*(?:image\s*)?\d)",
    re.IGNORECASE,
)
NUMBER = r"(?:image\s*)?\d{1,4}(?!\d)"
RANKING = re.compile(
    rf"{NEGATION}(?<!\w)ranking\b{FILLING}(?P<order>{NUMBER}(?:\s*[>=,]\s*{NUMBER})*)"
    r"(?![^\S\n]*(?:[>=][^\S\n]*\w|or\b|,[^\S\n]*(?:image\s*)?\d))(?!\.\d)",
    re.IGNORECASE,
)
ORDER = re.compile(rf"{NUMBER}(?:\s*[>=]\s*{NUMBER})+", re.IGNORECASE)
CLOSING = re.compile(r"""(?:[*_`"'“”’]|[^\S\n]?[\])}|])*""")
# Text after a choice that does not change it: nothing more on its line, the end of the clause, or a reason.
HARMLESS = re.compile(
    r"[^\S\n]*+(?:[^\w?+=/&~<>≠≈±→%\n-]*+(?:\n|\Z)|[.,;!(。，；！](?!\d)|[:–—-]\s+(?=[^\W\d_])"
    r"|(?:because|since|as|for|due|given|with|based|over|by)\b)",
    re.IGNORECASE,
)
# The clause may go on with a doubt: "1, maybe", "1 (or a tie)", "1, if the hat counts", "1, 70% sure".
DOUBT = re.compile(
    r"[\s.,;:!(–—-]*(?:but\s)?(?:or|if|unless|maybe|perhaps|possibly|probably|presumably|rather|not\s(?:sure|certain)"
    r"|i\sguess|unsure|uncertain|\d+\s*%)(?!\w)",
    re.IGNORECASE,
)
# What names an image as the winner, or says that there is none: "so image 2.", "it is a tie", "2 is clearly better".
ALONE = re.compile(
    r"(?:[.,;:(–—-]|\b(?:so|thus|hence|therefore|prefer|choose|pick|is))\s{0,10}(?:(?:but|and|so|the)\s{1,10}){0,3}"
    r"(?:\bimage\s*(?P<image>\d+)\s*(?:[.,;:!)\n]|\Z)|\b(?P<number>\d+)\s*(?:[,;!)]|\.?\s*(?:\n|\Z)|for\b)"
    r"|\b(?P<tie>(?:a\s+)?tie)\b)",
    re.IGNORECASE,
)
BETTER, BEST = (
    re.compile(
        r"\b(?P<image>\d+|first|second)(?:\s(?:image|one))?\s+(?:is|was|looks|seems)\s+"
        rf"(?:(?!not\b|no\b|never\b)\w+\s+){{0,2}}(?:{words})\s*(?:than\b|overall\b|[.,;:!)\n]|\Z)",
        re.IGNORECASE,
    )
    for words in ("better|superior|preferable|best|winner", "best|winner")
)
EQUAL = re.compile(
    r"\b(?:both|they|two|images)\s+(?:images\s+)?are\s+(?:\w+\s+)?(?:equal|tied|equivalent|equally\sgood)\b",
    re.IGNORECASE,
)
ORDINALS = {"first": 1, "second": 2}
# "from worst to best", "in reverse order", "1 > 2 > 3, reversed"
BACKWARDS = re.compile(
    r"\bworst\s{0,10}(?:image\s{1,10})?(?:to\b|first\b|>|→)|\b(?:reversed?|ascending)\s{1,10}order\b"
    r"|[,;(]\s{0,10}(?:reversed|backwards)\s{0,10}(?:[.,;)\n]|\Z)",
    re.IGNORECASE,
)


def parse_choice(answer: str) -> Literal[1, 2] | None:
    """
    The better one of two images: the number after "Better image:", `None` for a tie.

    Thoughts of the model are removed.

    Raises:
        `ValueError`: If the answer has no choice, or several, or one that it denies, doubts or takes back.
    """
    text = OTHER_TAG.sub(" ", remove_thoughts(answer))
    found = list(CHOICE.finditer(text))
    choices = {each["choice"].lower() for each in found}
    if len(choices) != 1:
        problem = "no choice" if not choices else f"several choices ({', '.join(sorted(choices))})"
        raise ValueError(f"The answer has {problem}: expected '{PAIR_LABEL}: ' and 1, 2 or tie.")
    choice = choices.pop()
    winner = TIE if choice == "tie" else int(choice)
    rest = _check_clauses(text, found)
    if (_named(ALONE, rest, 2) | _named(BETTER, rest, 2)) - {winner} or (winner != TIE and EQUAL.search(rest)):
        raise ValueError(f"The answer has an uncertain choice: {_excerpt(text, found[-1])!r}.")
    return None if choice == "tie" else 1 if choice == "1" else 2


def parse_ranking(answer: str, num_images: int) -> list[list[int]]:
    """
    The order of images: the numbers after "Ranking:", with `>` or a comma between them, and `=` for equal ones.

    Thoughts of the model are removed.

    Args:
        answer (`str`):
            The complete answer of the model.
        num_images (`int`):
            The number of images, which are numbered from 1 on in the answer.

    Returns:
        `list[list[int]]`: from best to worst the places (from 0 on) of the images, equal ones together.

    Raises:
        `ValueError`: If the answer has no order of all images, or several, or one that it denies, doubts or takes
            back.
    """
    text = OTHER_TAG.sub(" ", remove_thoughts(answer))
    found = list(RANKING.finditer(text))
    orders = [_tiers(each["order"]) for each in found]
    if not orders or any(order != orders[0] for order in orders):
        problem = "several orders" if orders else "no order"
        raise ValueError(f"The answer has {problem}: expected '{RANKING_LABEL}: ' and numbers with '>' between them.")
    places = [place for tier in orders[0] for place in tier]
    if sorted(places) != list(range(num_images)):
        raise ValueError(f"The order does not have each number from 1 to {num_images} once.")
    rest = _check_clauses(text, found)
    winners = {place + 1 for place in orders[0][0]}
    later = [_tiers(each[0]) for each in ORDER.finditer(rest) if len(re.findall(r"\d+", each[0])) == num_images]
    names_others = (_named(ALONE, rest, num_images) | _named(BEST, rest, num_images)) - {TIE, *winners}
    if names_others or any(order != orders[0] for order in later) or BACKWARDS.search(text):
        raise ValueError(f"The answer has an uncertain order: {_excerpt(text, found[-1])!r}.")
    return orders[0]


def _check_clauses(text: str, found: list[re.Match[str]]) -> str:
    """
    Refuse choices that the sentence around them denies, doubts or goes on with, or that the rest of the answer takes
    back. Returns that rest, after the last choice.
    """
    for choice in found:
        closing = CLOSING.match(text, choice.end())
        place = closing.end() if closing else choice.end()
        is_certain = HARMLESS.match(text, place) and not DOUBT.match(text, place) and not choice["negation"]
        # A number on the next line must be alone there. "1. The cat is blue" begins a list.
        is_list = "\n" in choice["filling"] and re.compile(r"[^\n]*\w").match(text, place)
        if not is_certain or is_list:
            raise ValueError(f"The answer has an uncertain choice or order: {_excerpt(text, choice)!r}.")
    if back := TAKEN_BACK.search(text, place):
        raise ValueError(
            f"The answer takes its choice or order back: {text[back.start() : back.end() + 40].strip()!r}."
        )
    return text[place:]


def _named(winner: re.Pattern[str], text: str, num_images: int) -> set[int]:
    """The numbers of the images that a text after a choice names as the winner, `TIE` for none."""
    named = set()
    for found in winner.finditer(text):
        groups = found.groupdict()
        if groups.get("tie"):
            named.add(TIE)
        elif word := groups["image"] or groups.get("number"):
            number = ORDINALS.get(word.lower()) or int(word[:9])
            if 1 <= number <= num_images:  # others count something else
                named.add(number)
    return named


def _tiers(order: str) -> list[list[int]]:
    """The places in an order such as "3 > 1 = 2"."""
    return [sorted(int(number) - 1 for number in re.findall(r"\d+", tier)) for tier in re.split("[>,]", order)]


def _excerpt(text: str, found: re.Match[str]) -> str:
    """A choice and the text after it, for messages."""
    return text[found.start() : found.end() + 40].strip()[:80]
