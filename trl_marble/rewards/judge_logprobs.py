# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The probability of "yes" from the log-probabilities of an answer's first token."""

import math
import re
from collections.abc import Sequence
from typing import Any

from .judge_score import remove_thoughts


LEAST_MASS = 0.5  # of "yes" and "no" together; with less the model answers something else
LETTER = re.compile(r"[0-9A-Za-z]")
ENTITY = re.compile(r"&#?\w{1,31};")
AROUND = " \n\t▁Ġ*_`\"'“”.,:!"  # what a token may have beside the word


def probability_of_yes(answer: str, tokens: Sequence[dict[str, Any]] | None) -> float:
    """
    `P(yes) / (P(yes) + P(no))` at the first word of an answer.

    All spellings count (`Yes`, ` yes`, `YES`), as far as the endpoint sends them among the most probable tokens. The
    tokens of the model's thoughts are passed over, in the answer (`<think>`) as well as apart from it.

    Args:
        answer (`str`):
            The answer of the model.
        tokens (`Sequence[dict]`, *optional*):
            Its tokens as OpenAI's interface has them: `token`, and in `top_logprobs` the most probable tokens at its
            place, each with `token` and `logprob`.

    Raises:
        `ValueError`: If there are no log-probabilities, or the first word is neither yes nor no with a probability of
            one half.
    """
    if not tokens:
        raise ValueError(
            "The endpoint sent no log-probabilities, which `score='p_yes'` needs; vLLM, SGLang and OpenAI have them "
            "(`logprobs` and `top_logprobs` of a request)."
        )
    place = _first_word(remove_thoughts(answer).strip(), tokens)
    masses = {"yes": 0.0, "no": 0.0}
    try:
        for choice in tokens[place]["top_logprobs"]:
            word = choice["token"].strip(AROUND).lower()
            if word in masses:
                masses[word] += math.exp(choice["logprob"])
    except (LookupError, TypeError, AttributeError, OverflowError):
        raise ValueError("The log-probabilities are not as OpenAI's interface has them.") from None
    yes, no = masses.values()
    if not LEAST_MASS <= yes + no <= 1.01:
        raise ValueError(
            f"The first word is yes or no with a probability of {yes + no:.3f} only. Ask for an answer that begins "
            "with Yes or No."
        )
    return yes / (yes + no)


def _first_word(answer: str, tokens: Sequence[dict[str, Any]]) -> int:
    """The place of the token in which the first word of the answer begins."""
    try:
        texts = [token["token"] for token in tokens]
        whole = "".join(texts)
    except (LookupError, TypeError):
        raise ValueError("The log-probabilities are not as OpenAI's interface has them.") from None
    # Endpoints write spaces (`▁`, `Ġ`) and parts of a letter beyond ASCII in tokens in other ways than in the answer,
    # in which HTML entities are replaced. So only ASCII letters and digits are compared.
    whole = ENTITY.sub(lambda entity: " " * len(entity[0]), whole)
    wanted = "".join(found[0] for found in LETTER.finditer(answer))
    if not wanted:
        reason = "does not begin with Yes or No" if re.search(r"\w", answer) else "is empty"
        raise ValueError(f"The answer {reason}.")
    letters = list(LETTER.finditer(whole))
    # Thoughts come first, and special tokens at the end: the answer is where it is found last.
    start = "".join(found[0] for found in letters).rfind(wanted)
    if start < 0:
        raise ValueError("The log-probabilities are of another text than the answer.")
    left = letters[start].start()
    for place, text in enumerate(texts):
        if left < len(text):
            return place
        left -= len(text)
    raise AssertionError("the answer is in the text")
