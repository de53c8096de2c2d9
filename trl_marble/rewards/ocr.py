# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""OCR reward: how well the text that a prompt asks for can be read on its image."""

import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..extras import require_extra
from .model_reward import to_rgb
from .quotes import quoted_text, read_quotes


# Scripts that the OCR model reads, by the first word of the Unicode names of their letters. It also reads plain Greek
# letters, but no accented ones, and returns Latin letters for those that look similar.
SCRIPTS_READ = frozenset({"LATIN", "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "MODIFIER"})

# The OCR model mostly returns the plain form of these characters, which looks almost the same.
PLAIN_FORMS = str.maketrans("‘’‚‛′“”„‟″‐‑‒–—―−", "'''''\"\"\"\"\"-------")


class OCRAccuracy:
    """
    How well the text that a prompt asks for can be read on the image.

    RapidOCR reads the image, line by line from top to bottom, and the reward is `1 - min(d, n) / n`: `n` is the number
    of characters asked for and `d` the edit distance (Levenshtein) between them and the characters that were read, or
    0 if the text asked for is contained in the text that was read. Case and spaces do not count. This is the OCR
    reward of Flow-GRPO (https://huggingface.co/papers/2505.05470) and DiffusionNFT
    (https://huggingface.co/papers/2509.16117), with another OCR model. It differs from theirs in special cases:

    - A prompt without quotes or with empty quotes gets `None`, where theirs stops the run or scores 0.
    - All quoted parts of a prompt count, joined in their order, not only the first.
    - Quotes are `"…"`, `“…”`, `„…“`, `”…”`, `«…»`, `»…«`, `‹…›`, `「…」`, `『…』`, mixtures like `“…"`, and doubled
      ones like `""…""` and `''…''`. Single quotes are apostrophes, and a `"` right after a digit that closes no quote
      is an inch mark: neither opens a quote. A warning has the number of prompts with unpaired or only single quotes.
    - Forms of the same character are equal: full-width and narrow ones, composed and decomposed accents, typographic
      and straight quotes, dashes of any length.
    - An error of the OCR model is raised, and not scored 0.

    If nothing can be read on an image whose prompt asks for text, the reward is 0. That is a score, not a failure. The
    model of RapidOCR (PP-OCRv6 small) reads Latin letters (but few of Vietnamese), Chinese and Japanese. It has no
    Cyrillic, Korean, Arabic or Hebrew letters: text in these scores about 0 whatever the image shows. It has Greek
    letters without accents only, and misreads half of a Greek text. A warning has the number of prompts that ask for
    text in these scripts; give them an empty string in the column.

    Args:
        column (`str`, *optional*, defaults to `"text"`):
            Column of the dataset with the text asked for; an empty string for none. Where the value is `None`, and if
            the dataset has no such column, the text is read from the quotes in the prompt.
        num_threads (`int`, *optional*):
            Number of threads of the OCR model, on the CPU. Defaults to one per core, which is too many if several
            processes share a machine.

    Attributes:
        applies_to (`str`): In words, the images that the reward applies to and what in the data decides it.
        value_range (`str`): In words, the scale of the reward.

    Raises:
        `ValueError`: If `num_threads` is not positive.
        [`~trl_marble.extras.MissingExtraError`]: If RapidOCR is not installed.
    """

    value_range = "0 (nothing right can be read) to 1 (the text asked for can be read)"

    def __init__(self, column: str = "text", num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"`num_threads` must be at least 1, got {num_threads}; leave it out for all cores.")
        require_extra("ocr", "`OCRAccuracy`")
        self.column = column
        self.num_threads = num_threads
        self.applies_to = f"images whose prompt asks for text: in the column `{column}`, or else in quotes"
        self._reader: Any = None
        # By text of a warning: its prompts, and their number in the last warning.
        self._counted: dict[str, set[str]] = {}
        self._warned: dict[str, int] = {}

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: list,
    ) -> list[float | None]:
        """
        Score images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any mode and size, see [`~trl_marble.media.to_rgb`].
            prompts (`list[str]`):
                Their prompts.
            trainer_state, log_metric, log_extra (*optional*):
                Not used.
            columns (`list`):
                The other columns of the dataset by name, one value per image.

        Returns:
            `list[float | None]`: one value in [0, 1] per image, `None` if the prompt asks for no text.

        Raises:
            `TypeError`: If a value of the column is neither a string nor `None`.
        """
        texts = columns.get(self.column, [None] * len(prompts))
        targets = [self._target(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        self._warn_about_quotes(prompts, texts)
        self._warn_about_scripts(prompts, targets)
        return [
            text_accuracy(target, self.read(image)) if comparable(target) else None
            for image, target in zip(images, targets, strict=True)
        ]

    def read(self, image: Image.Image) -> str:
        """
        Read all text on an image.

        Args:
            image (`PIL.Image.Image`):
                An image of any mode and size.

        Returns:
            `str`: the lines from top to bottom with spaces between them; empty if nothing can be read.
        """
        if self._reader is None:
            self._reader = self._load()
        return " ".join(self._reader(to_rgb(image)).txts or ())

    def _target(self, prompt: str, text: Any) -> str:
        if text is None:
            return quoted_text(prompt)
        if not isinstance(text, str):
            raise TypeError(
                f"The column `{self.column}` has {text!r} ({type(text).__name__}) for the prompt {prompt!r}; it must "
                "have strings, or `None` to read the text from the quotes in the prompt."
            )
        return text

    def _warn_about_quotes(self, prompts: Sequence[str], texts: Sequence[str | None]) -> None:
        doubtful = [
            prompt
            for prompt, text in zip(prompts, texts, strict=True)
            if text is None and read_quotes(prompt).doubtful
        ]
        self._count(
            doubtful,
            "unpaired quotes, or single quotes, which are read as apostrophes, so the text asked for is uncertain. "
            f'Put it between "...", or in a column `{self.column}` (an empty string if there is none).',
        )

    def _warn_about_scripts(self, prompts: Sequence[str], targets: Sequence[str]) -> None:
        unread = [prompt for prompt, target in zip(prompts, targets, strict=True) if not is_read(target)]
        self._count(
            unread,
            "a text in a script that the OCR model does not read, so that a low reward means nothing. Give these "
            f"prompts an empty string in the column `{self.column}`.",
        )

    def _count(self, prompts: Sequence[str], what: str) -> None:
        """Count prompts, and warn whenever there are twice as many as in the last warning."""
        counted = self._counted.setdefault(what, set())
        counted.update(prompts)
        if len(counted) >= max(1, 2 * self._warned.get(what, 0)):
            self._warned[what] = len(counted)
            number = "1 prompt has" if len(counted) == 1 else f"{len(counted)} prompts have"
            warnings.warn(f"`OCRAccuracy`: so far {number} {what} The last one: {prompts[-1]!r}.", stacklevel=4)

    def _load(self) -> Any:
        from rapidocr import RapidOCR

        threads = -1 if self.num_threads is None else self.num_threads
        return RapidOCR(
            params={
                # Otherwise it logs every image without text and every file that it opens.
                "Global.log_level": "error",
                # As in the originals: only upright text, and no lines below this confidence.
                "Global.use_cls": False,
                "Global.text_score": 0.5,
                # Text is detected at 512 px: in full size, small words on a large image are not found (words of 16 to
                # 20 px on 1024 px: mean reward 1.0 at 512 px, 0.08 at 960 px), and letters that fill the image are
                # split. It is read in full size. Smaller images are not enlarged, which is RapidOCR's default: that
                # takes 7 times as long on 256 px and reads no more.
                "Det.limit_type": "max",
                "Det.limit_side_len": 512,
                # Another resize before that, which is not needed and fails on very narrow images, is off.
                "Global.min_side_len": 1,
                "Global.max_side_len": 2**31,
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": threads,
            }
        )


def is_read(text: str) -> bool:
    """Whether at least half of the letters of a text are of scripts that the OCR model reads."""
    scripts = [unicodedata.name(letter, "").partition(" ")[0] for letter in comparable(text) if letter.isalpha()]
    return 2 * sum(script in SCRIPTS_READ for script in scripts) >= len(scripts)


def text_accuracy(target: str, read: str) -> float:
    """
    The share of a text that was read, as in [`OCRAccuracy`].

    Args:
        target (`str`):
            The text asked for, with at least one visible character.
        read (`str`):
            The text that was read.

    Returns:
        `float`: from 0 to 1; 1 if the target is contained in the text that was read.
    """
    target, read = comparable(target), comparable(read)
    if target in read:
        return 1.0
    return 1 - min(edit_distance(target, read), len(target)) / len(target)


def comparable(text: str) -> str:
    """Normalize a text: without case, spaces and invisible characters, and with one form of each character."""
    folded = unicodedata.normalize("NFKC", text.translate(PLAIN_FORMS)).casefold()
    return "".join(character for character in folded if character.isprintable() and character != " ")


def edit_distance(a: str, b: str) -> int:
    """The Levenshtein distance: the least number of characters to insert, delete or replace."""
    distances = list(range(len(b) + 1))  # from the first i characters of `a` to each beginning of `b`
    for i, left in enumerate(a, start=1):
        diagonal, distances[0] = distances[0], i
        for j, right in enumerate(b, start=1):
            replaced = diagonal + (left != right)
            diagonal = distances[j]
            distances[j] = min(replaced, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]
