# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Find in the answer of a judge which image it prefers.

What counts is the last line, which has the choice and nothing else; reasons are before it, as the templates ask. A
choice with more on its line may be denied, doubted or taken back there, in more ways than can be listed.
"""

import re
from typing import Literal

from .judge_score import OTHER_TAG, remove_thoughts


PAIR_LABEL, RANKING_LABEL = "Better image", "Ranking"
# Marks around what is meant: **Better image:** "1", {"better_image": 1}, [3 > 2 > 1].
MARK = r"""[\s*_`"'“”‘’\[\](){}#$]{0,20}"""
FILLING = rf"{MARK}(?:[:：=]|is\b)?{MARK}"
CHOICE = re.compile(rf"{MARK}better[\s_]image{FILLING}(?:image\s)?(?P<choice>1|2|tie){MARK}\.?{MARK}", re.IGNORECASE)
NUMBER = r"(?:image\s)?[1-9]\d{0,3}"
RANKING = re.compile(
    rf"{MARK}ranking{FILLING}(?P<order>{NUMBER}(?:\s?[>=,]\s?{NUMBER})*){MARK}\.?{MARK}", re.IGNORECASE
)


def parse_choice(answer: str) -> Literal[1, 2] | None:
    """
    The better one of two images: `None` for a tie.

    Args:
        answer (`str`):
            The complete answer of the model, with the last line "Better image: " and 1, 2 or tie. Thoughts of the
            model are removed.

    Raises:
        `ValueError`: If the last line is anything else, or another line has another choice.
    """
    choices = {found["choice"].lower() for found in _find_lines(CHOICE, answer, f"'{PAIR_LABEL}: ' and 1, 2 or tie")}
    if len(choices) > 1:
        raise ValueError(f"The answer has several choices: {', '.join(sorted(choices))}.")
    choice = choices.pop()
    return None if choice == "tie" else 1 if choice == "1" else 2


def parse_ranking(answer: str, num_images: int) -> list[list[int]]:
    """
    The order of images, from best to worst.

    Args:
        answer (`str`):
            The complete answer of the model, with the last line "Ranking: " and the numbers of all images, from 1 on,
            with `>` or a comma between them, and `=` between equal ones. Thoughts of the model are removed.
        num_images (`int`):
            Their number.

    Returns:
        `list[list[int]]`: from best to worst the places (from 0 on) of the images, equal ones together.

    Raises:
        `ValueError`: If the last line is anything else, or has not each image once, or another line has another order.
    """
    lines = _find_lines(RANKING, answer, f"'{RANKING_LABEL}: ' and the numbers of all images with '>' between them")
    first, *others = (_read_order(found["order"]) for found in lines)
    if any(order != first for order in others):
        raise ValueError("The answer has several orders.")
    if sorted(place for tier in first for place in tier) != list(range(num_images)):
        raise ValueError(f"The order does not have each number from 1 to {num_images} once.")
    return first


def _find_lines(form: re.Pattern[str], answer: str, expected: str) -> list[re.Match[str]]:
    """All lines of a form, of which the last line that has anything must be one."""
    text = OTHER_TAG.sub(" ", remove_thoughts(answer))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if re.search(r"\w", line)]
    if not lines or not form.fullmatch(lines[-1]):
        shown = f"; it is {lines[-1][:80]!r}" if lines else ""
        raise ValueError(f"The answer has no choice or order as its last line: expected {expected}{shown}.")
    return [found for line in lines if (found := form.fullmatch(line))]


def _read_order(order: str) -> list[list[int]]:
    """The places in an order such as "3 > 1 = 2"."""
    return [sorted(int(number) - 1 for number in re.findall(r"\d+", tier)) for tier in re.split("[>,]", order)]
