# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Find the score in the answer of a judge, and refuse every answer whose score is uncertain."""

import html
import re
from collections.abc import Iterator


LONGEST = 100_000  # characters, without thoughts
# Tags of models around their thoughts: <think>, [THINK], ◁think▷, <|begin_of_thought|>, <|START_THINKING|>, ...
THOUGHT_TAG = re.compile(
    r"[<\[◁]\|?\s?(?P<end>/\s?|end_(?:of_)?)?(?:begin_of_|start_|seed:|inner[\s_-]?|internal[\s_-]?)?"
    r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|rationale|scratchpad|monologue|chain[\s_-]of[\s_-]"
    r"thoughts?|cot|ponder(?:ing)?|plan(?:ning)?|draft|details)\b[^<>\[\]◁▷\n]{0,80}[>\]▷]"
    r"|<\|channel>thought\b|<unused94>thought\b|(?P<channel_end><channel\|>|<unused95>)",  # Gemma 4, MedGemma
    re.IGNORECASE,
)
FINAL_CHANNEL = "<|channel|>final<|message|>"  # gpt-oss writes thoughts into other channels
FINAL_WITHOUT_TOKENS = "assistantfinal"  # the same, if a server drops special tokens
OTHER_TAG = re.compile(r"</?[A-Za-z][\w:-]{0,30}/?>|<\|[^<>|\n]{1,40}\|>")  # <b>, <answer>, <|begin_of_box|>, ...
LATEX = re.compile(r"\\(?:boxed|text(?:bf|it|rm)?|math(?:bf|rm|it)|bf|left|right)\b|\\[\[\]()]")

NUMBER = r"\d++(?:\.\d++)?+"
SEPARATOR = r"\s*(?:[-–—~]|\.\.\.?|to|and|through)\s*"
FILLING = r"""[\s*_`"'“”‘’\[({}<:：=|#$]{0,20}"""
CLOSING = r"""(?:[*_`"'“”’$]|\s?[\])}>|]){0,8}"""

BRACKETS = re.compile(r"[\[(]([^\[\]()\n]{1,60})[\])]")
BRACKETS_BEHIND = re.compile(r"(?P<gap>\s{0,10})[\[(](?P<inside>[^\[\]()\n]{1,200})[\])]")
SCALE_BEGINS = re.compile(r"\s*(?:out|of|/|max|scale|on|from|\d)", re.IGNORECASE)
SCORE = re.compile(rf"(?P<filling>{FILLING}(?:is\b{FILLING})?)(?P<score>[-+]?{NUMBER})(?!(?![分点])\w|½|[.,:]\d)")
# A scale after the score: "/5", "out of 5", "of 5", "(out of 5)", "(1-5)", "points".
OUT_OF = re.compile(rf"\s{{0,10}}(?:\\?/|out[\s-]of|of)\s*(?P<of>{NUMBER}){CLOSING}", re.IGNORECASE)
UNIT = re.compile(r"\s*(?:points?|pts?|stars?|[★⭐分点])(?!\w)", re.IGNORECASE)
# A scale anywhere in an answer. "3 out of 4 cats" is not a scale.
SCALE_RANGE = re.compile(
    rf"(?:(?<![^\W_])scale|(?:scor(?:es?|ing)|ratings?)(?:[\s_]range|\s(?:is|are|go(?:es)?)\s(?=from)))"
    rf"""(?:["'\s:=(\[]|is\b|was\b|of\b|from\b){{0,12}}({NUMBER})(?:{SEPARATOR}|\s*,\s*)({NUMBER})"""
    rf"|(?<![\d.])({NUMBER}){SEPARATOR}({NUMBER})[\s-]*(?:point\s*)?scale\b",
    re.IGNORECASE,
)
SCALE_TOP = re.compile(
    rf"\bscale\sof\s({NUMBER})(?![\w.]|{SEPARATOR}\d)"
    rf"|(?<!\d\s)\bout\sof\s({NUMBER})(?=\s*(?:points?\b|[^\w\s]|\n|\Z))"
    rf"""|\bmax(?:imum)?[\s_]*(?:score|points?|rating)["'\s:=(]*(?:is\s|of\s)?({NUMBER})"""
    rf"|(?<![\d.])({NUMBER})-?\s?point\sscale\b|\b(five|ten|twenty|hundred)[\s-]point\sscale\b"
    rf"""|["'](?:scale|out[\s_]of|max(?:imum)?)["']\s*:\s*["']?({NUMBER})(?![\w.]|{SEPARATOR}\d)"""
    rf"|(?<![\d.])({NUMBER})\s(?:is|being|=|means)\s(?:the\s)?(?:best|perfect|highest|max(?:imum)?)\b"
    r"|\b(?:out\sof|scale\s(?:of|from))\s(?:\w+\sto\s)?(?:a\s|one\s)?(five|ten|twenty|hundred)\b",
    re.IGNORECASE,
)
# "4 on a scale of 1 to 5", "4 on a 1-5 scale": the scale itself is checked with all others in the answer.
ON_SCALE = re.compile(
    rf"\s{{0,10}}on\s(?:a|the)\s(?:scale\s(?:of|from)\s(?:{NUMBER}{SEPARATOR})?{NUMBER}"
    rf"|(?:{NUMBER}{SEPARATOR})?{NUMBER}[\s-]*(?:point\s*)?scale\b)",
    re.IGNORECASE,
)
WORDS = {"five": 5, "ten": 10, "twenty": 20, "hundred": 100}
# Text after a score that does not change it: the end of the clause, or a reason.
CLAUSE_END = re.compile(r"[.,;!。，；！}\])|]")
REASON = re.compile(r"\s*(?:[:–—-]\s+(?=[^\W\d_])|(?:because|since|as)\b)", re.IGNORECASE)
SHORT_REASON = re.compile(r"\s*(?:for|due|given|with|based|but|and)\b", re.IGNORECASE)
# Signs in a reason that its numbers are a sum, another score or a scale, and do not count cats.
CHANGED = re.compile(
    r"[?%=→+]|[-–—−]\s?\d|\d\s*[/*×÷]\s*\d|\b(?:minus|plus|times|less|deduct\w*|subtract\w*|or|no|not|wait|but|though|"
    r"maybe|perhaps|rather|instead|actually|scratch|sorry|would|could|should|between|average|mean|rounded|percent|scale|max\w*|best|"
    r"highest|perfect|out\s?of|of\s+\d)\b",
    re.IGNORECASE,
)
# "4, 3" and "4; 3 for style", but not "5, 2 cats".
ANOTHER = re.compile(rf"\s*[,;/|&]?\s*{NUMBER}\s*+(?!(?!(?:for|in|on|of|to|out)\b)[^\W\d_])", re.IGNORECASE)
CORRECTION = re.compile(
    r"[\s.,;!…(-]*(?:i\.e|which\sis|equals|equivalent|no|wait|hmm+|actually|or|maybe|perhaps|correction|rather|possibly"
    r"|sorry)\b.*\d",
    re.IGNORECASE,
)
# A clause that takes back what was said, anywhere after it.
TAKEN_BACK = re.compile(
    r"(?:^|[.,;:!?…(\n—–]|\s-)[\s*_]{0,10}(?:(?:but|oh|and|so)\b[\s,]{0,5})?(?:wait|hmm+|correction|scratch\s(?:that|this|it)"
    r"|sorry|on\ssecond\sthoughts?|i\s(?:take\s(?:that|it)\sback|meant?)|(?<!,\s)actually|no(?=\s*[,:;.!—–]|\s+\d))\b",
    re.IGNORECASE,
)


def parse_score(answer: str, label: str, score_range: tuple[float, float]) -> float:
    """
    Find the score in an answer: the number after the label.

    `"Final Score: 4.5"`, `"**Final Score:** 4/5"`, `"Final Score (1-5): [4]"`, `'"final_score": 4'` and `"Final Score:
    \\boxed{4}"` are understood. Thoughts of the model (`<think>...</think>` and others, finished or not) are removed.
    Uncertain answers are refused: no score or several, a range, a sum, a share, a number that the sentence corrects,
    or another scale than the judge's.

    Args:
        answer (`str`):
            The complete answer of the model.
        label (`str`):
            The words before the score, in any case.
        score_range (`tuple[float, float]`):
            Lowest and highest score.

    Raises:
        `ValueError`: If there is no certain score; the message says why.
    """
    low, high = score_range
    text = remove_thoughts(answer)
    if len(text) > LONGEST:
        raise ValueError(f"The answer has {len(text)} characters, too many for a score and its reasons.")
    text = LATEX.sub("", OTHER_TAG.sub(" ", text))
    found = list(_scores(text, label, low, high))
    scores = list(dict.fromkeys(score for score, _ in found))
    ends = [end for _, end in found if end is not None]
    if not ends:
        raise ValueError(f"The answer has no score: expected '{label}: ' and a number from {low:g} to {high:g}.")
    if len(scores) > 1:
        raise ValueError(f"The answer has several scores: {', '.join(f'{score:g}' for score in scores)}.")
    if not low <= scores[0] <= high:
        raise ValueError(f"The score {scores[0]:g} is not from {low:g} to {high:g}.")
    for back in TAKEN_BACK.finditer(text, ends[-1]):
        if re.search(r"\d", text[back.end() :].partition("\n")[0]):
            raise ValueError(f"The answer takes its score back: {_excerpt(text, back.start(), back.end())!r}.")
    _check_scales(text, low, high)
    return scores[0]


def remove_thoughts(answer: str) -> str:
    """
    Remove the thoughts of the model from its answer.

    Text before an end tag without a start tag is a thought too, since many templates write the start tag for the
    model. So is text after a start tag without an end tag.
    """
    answer = html.unescape(answer)
    if "<|channel|>" in answer:
        _, _, answer = answer.rpartition(FINAL_CHANNEL) if FINAL_CHANNEL in answer else ("", "", "")
    answer = answer.rpartition(FINAL_WITHOUT_TOKENS)[2]
    kept, depth, place = "", 0, 0
    for tag in THOUGHT_TAG.finditer(answer):
        if depth == 0:
            kept += answer[place : tag.start()] + " "
        if not tag["end"] and not tag["channel_end"]:
            depth += 1
        elif depth == 0:
            kept = ""
        else:
            depth -= 1
        place = tag.end()
    return kept + answer[place:] if depth == 0 else kept


def _scores(text: str, label: str, low: float, high: float) -> Iterator[tuple[float, int | None]]:
    """
    The number after each mention of the label, if there is one, and where it ends, or `None` if it is no answer but
    only mentioned in a sentence: "The final score of 4 reflects ...".
    """
    words = r"[\s*_`-]{1,4}".join(re.escape(word) for word in label.split())
    for mention in re.finditer(rf"(?<![^\W_])(?<![^\W_][_-]){words}(?!_{{0,2}}[^\W_])", text, re.IGNORECASE):
        place = mention.end()
        filling = re.compile(FILLING).match(text, place)
        before = BRACKETS.search(text, place, (filling.end() if filling else place) + 62)
        if before and not text[place : before.start()].strip("*_` \t") and re.search(r"[^\d.\s*_]", before[1]):
            _check_brackets(before[1], low, high)
            place = before.end()
        elif out_of := OUT_OF.match(text, place):
            if out_of[0].lower().lstrip().startswith("of") and not SCORE.match(text, out_of.end()):
                yield float(out_of["of"]), None
                continue
            _check_top(out_of["of"], high)
            place = out_of.end()
        found = SCORE.match(text, place)
        if found:
            _check_text_after(text, mention.start(), found, low, high)
            yield float(found["score"]), found.end()
        elif re.compile(rf"{FILLING}(?:is\b{FILLING})?[-+]?\d").match(text, place):
            raise ValueError(f"The score is uncertain: {_excerpt(text, mention.start(), place)!r}.")


def _check_text_after(text: str, start: int, found: re.Match[str], low: float, high: float) -> None:
    """Refuse a number if the text after it changes it, or puts it on another scale."""
    closing = re.compile(CLOSING).match(text, found.end())
    place = closing.end() if closing else found.end()
    doubt = f"The score is uncertain: {_excerpt(text, start, place)!r}."
    if ("<" in found["filling"]) != (closing is not None and ">" in closing[0]):
        raise ValueError(doubt)
    for _ in range(3):  # "4/5 points", "4 points (out of 5)"
        brackets = BRACKETS_BEHIND.match(text, place)
        if out_of := OUT_OF.match(text, place):
            _check_top(out_of["of"], high)
            place = out_of.end()
        elif unit := UNIT.match(text, place):
            place = unit.end()
        elif on_scale := ON_SCALE.match(text, place):
            place = on_scale.end()
        elif brackets and (brackets["gap"].count("\n") == 0 or SCALE_BEGINS.match(brackets["inside"])):
            if not _is_reason(brackets["inside"]):
                _check_brackets(brackets["inside"], low, high)
            place = brackets.end()
    line_end = text.find("\n", place)
    rest = text[place : min(line_end if line_end >= 0 else len(text), place + 300)]
    clause = re.split(r"[.;!。；！]\s", rest, maxsplit=1)[0]
    if CORRECTION.match(rest) or ANOTHER.match(rest):
        raise ValueError(doubt)
    # A number on the next line must be alone there. "1. The cat is blue" begins a list.
    if "\n" in found["filling"] and re.search(r"\w", rest):
        raise ValueError(doubt)
    if CLAUSE_END.match(rest.lstrip(" ")) or not re.search(r"[\w?+=/÷×*^~<>±→\\%‰-]", rest):
        return
    # In a row of a table, the reason may be in the next cell.
    begins_reason = REASON.match(rest) or (closing is not None and "|" in closing[0])
    if begins_reason and _is_reason(clause):
        return
    if not (begins_reason or SHORT_REASON.match(rest)) or re.search(r"[\d?%]", clause):
        raise ValueError(doubt)


def _is_reason(text: str) -> bool:
    """Whether the text after a score is a reason: it has words, and no sign of a sum or a scale."""
    return len(re.findall(r"[^\W\d_]{2,}", text)) >= 2 and not CHANGED.search(text)


def _check_brackets(inside: str, low: float, high: float) -> None:
    """Refuse numbers in brackets next to a score unless they are its scale."""
    numbers = [float(number) for number in re.findall(NUMBER, inside)]
    words = re.sub(NUMBER, "", inside)
    is_range = numbers == [low, high] and not re.search(r"[/+*×÷]|=(?!\s*[^\W\d_])", words)
    is_top = numbers == [high] and re.search(r"/|out\s?of|\bof\b|max|scale", words, re.IGNORECASE)
    is_other = numbers or re.search(r"[?%]|percent|out\s?of|scale", words, re.IGNORECASE)
    if is_other and not is_range and not is_top:
        raise ValueError(f"The score may be on another scale or a sum: ({inside}), not from {low:g} to {high:g}.")


def _check_top(of: str, high: float) -> None:
    if float(of) != high:
        raise ValueError(f"The score is one out of {of}, not out of {high:g}.")


def _check_scales(text: str, low: float, high: float) -> None:
    """Refuse an answer that contains another scale."""
    for found in (*SCALE_RANGE.finditer(text), *SCALE_TOP.finditer(text)):
        ends = [float(WORDS.get(end.lower(), end)) for end in found.groups() if end]
        if ends not in ([low, high], [high]):
            raise ValueError(f"The answer has another scale: {found[0]!r}, not from {low:g} to {high:g}.")


def _excerpt(text: str, start: int, place: int) -> str:
    """A score and the text around it, for messages."""
    return text[start : place + 40].strip()[:80]
