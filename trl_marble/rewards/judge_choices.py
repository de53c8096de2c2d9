# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find in the answer of a judge which image it prefers, and refuse every answer that is uncertain."""

import re
from typing import Literal

from .judge_score import OTHER_TAG, remove_thoughts


PAIR_LABEL, RANKING_LABEL = "Better image", "Ranking"
FILLING = r"""[\s*_`"'“”‘’\[({:：=#-]{0,20}(?:is\b[\s*_`:]{0,5})?"""
CHOICE = re.compile(
    rf"\bbetter[\s_*`-]{{1,4}}image\b{FILLING}(?:image\s*)?(?P<choice>1|2|tie)\b(?!\.\d)"
    r"(?!\s*(?:or|and|/|,|&)\s*(?:image\s*)?\d)",
    re.IGNORECASE,
)
NUMBER = r"(?:image\s*)?\d{1,4}(?!\d)"
RANKING = re.compile(
    rf"(?<!\w)ranking\b{FILLING}(?P<order>{NUMBER}(?:\s*[>=,]\s*{NUMBER})*)"
    r"(?![^\S\n]*(?:[>=,]|or\b)[^\S\n]*\w)(?!\.\d)",
    re.IGNORECASE,
)


def parse_choice(answer: str) -> Literal[1, 2] | None:
    """
    The better one of two images: the number after "Better image:", `None` for a tie.

    Thoughts of the model are removed.

    Raises:
        `ValueError`: If the answer has no choice, or several.
    """
    text = OTHER_TAG.sub(" ", remove_thoughts(answer))
    choices = {found["choice"].lower() for found in CHOICE.finditer(text)}
    if len(choices) != 1:
        problem = "no choice" if not choices else f"several choices ({', '.join(sorted(choices))})"
        raise ValueError(f"The answer has {problem}: expected '{PAIR_LABEL}: ' and 1, 2 or tie.")
    choice = choices.pop()
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
        `ValueError`: If the answer has no order of all images, or several.
    """
    text = OTHER_TAG.sub(" ", remove_thoughts(answer))
    orders = []
    for found in RANKING.finditer(text):
        tiers = re.split("[>,]", found["order"])
        orders.append([sorted(int(number) - 1 for number in re.findall(r"\d+", tier)) for tier in tiers])
    if not orders or any(order != orders[0] for order in orders):
        problem = "several orders" if orders else "no order"
        raise ValueError(f"The answer has {problem}: expected '{RANKING_LABEL}: ' and numbers with '>' between them.")
    places = [place for tier in orders[0] for place in tier]
    if sorted(places) != list(range(num_images)):
        raise ValueError(f"The order does not have each number from 1 to {num_images} once.")
    return orders[0]
