# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Mix several prompt sets, with the share of each in training."""

import math
import warnings
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from ..rewards.quotes import read_quotes
from .prompts import prepare_prompts


SOURCE_COLUMN = "source"
WEIGHT_COLUMN = "source_weight"
TEXT_COLUMN = "text"  # that `OCRAccuracy` reads by default

STRINGS = {"string", "large_string"}
INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
FLOATS = {f"float{bits}" for bits in (16, 32, 64)}


def mix_prompts(datasets: Mapping[str, Dataset], weights: Mapping[str, float] | None = None) -> Dataset:
    """
    Join several prompt sets into one that records the source of each prompt.

    Each generation batch has a share of every source, see [`RepeatPromptSampler`]. Without `weights` the shares are
    equal, as in the code published with MARBLE (https://huggingface.co/papers/2605.06507): a reward that applies to
    the prompts of one source only must not get too few images because that source is small. For shares in proportion
    to the sizes of the sources pass `weights={name: len(dataset) for name, dataset in datasets.items()}`.

    The weights are a column, because `save_to_disk`, `push_to_hub`, `filter`, `select` and `shuffle` keep columns. The
    shares are computed when training begins, from the sources that are left then.

    If one of the sets asks for written text, [`~trl_marble.rewards.OCRAccuracy`] also reads quotes in the prompts of
    the others as such text. A warning has the number of these prompts; an empty string in their column `text` means
    that the image need not show any text.

    Example:

    ```python
    >>> general = Dataset.from_dict({"prompt": ["a cat", "a dog"]})
    >>> signs = Dataset.from_dict({"prompt": ['a sign that says "hi"'], "text": ["hi"]})
    >>> mix_prompts({"general": general, "ocr": signs}, weights={"general": 2, "ocr": 1})[0]
    {'prompt': 'a cat', 'source': 'general', 'source_weight': 2.0, 'text': None}
    ```

    Args:
        datasets (`Mapping[str, datasets.Dataset]`):
            The prompt sets by the names of their sources. Each has a column `prompt`; other columns may differ.
        weights (`Mapping[str, float]`, *optional*):
            Weight of each source, finite and greater than 0; only their ratios matter. Defaults to `1.0` each.

    Returns:
        `datasets.Dataset`: The rows of all sets, set by set, with all their columns (`None` where a set does not have
        the column) and the columns `source` (`str`) and `source_weight` (`float`).

    Raises:
        `TypeError`: If a prompt set is not a `datasets.Dataset`.
        `ValueError`: If there is no set, a set cannot be used for rollouts (see [`prepare_prompts`]) or has a column
            `source` or `source_weight` already, the weights do not fit the names, or two sets have a column of the
            same name with incompatible types.
    """
    if not datasets:
        raise ValueError("`datasets` is empty; pass at least one prompt set by name.")
    prepared: dict[str, Dataset] = {}
    for name, dataset in datasets.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"A source has the name {name!r}; a name is a non-empty string.")
        prepared[name] = prepare_prompts(dataset, f'datasets["{name}"]')
        if taken := {SOURCE_COLUMN, WEIGHT_COLUMN} & set(dataset.column_names):
            raise ValueError(
                f"The source {name!r} has a column `{sorted(taken)[0]}` already. Rename or remove it; mix all prompt "
                "sets at once."
            )
    weights = check_source_weights(prepared, weights)
    features = _common_features(prepared)
    _warn_about_quotes(prepared)
    parts = []
    for name, dataset in prepared.items():
        own = Features({column: features[column] for column in dataset.column_names})
        part = dataset if dataset.features == own else dataset.cast(own)
        part = part.add_column(SOURCE_COLUMN, [name] * len(part), feature=Value("string"))
        parts.append(part.add_column(WEIGHT_COLUMN, [weights[name]] * len(part), feature=Value("float64")))
    return concatenate_datasets(parts)


def _warn_about_quotes(datasets: Mapping[str, Dataset]) -> None:
    """Warn about quotes in other prompts if one of the sets is for an OCR reward, which would read them as text."""
    quoted: dict[str, list[str]] = {}
    for_text = []
    for name, dataset in datasets.items():
        prompts = dataset["prompt"][:]
        texts = dataset[TEXT_COLUMN][:] if TEXT_COLUMN in dataset.column_names else [None] * len(prompts)
        quoted[name] = [
            prompt for prompt, text in zip(prompts, texts, strict=True) if text is None and read_quotes(prompt).text
        ]
        if 2 * (len(quoted[name]) + sum(text not in (None, "") for text in texts)) > len(prompts):
            for_text.append(name)
    counts = [
        f"{len(found)} of the {len(datasets[name])} prompts ({len(found) / len(datasets[name]):.2%}) of {name!r}"
        for name, found in quoted.items()
        if found and name not in for_text
    ]
    if for_text and counts:
        example = next(found[0] for name, found in quoted.items() if found and name not in for_text)
        warnings.warn(
            f"{' and '.join(counts)} have words in quotes, such as {example!r}. {' and '.join(map(repr, for_text))} "
            "asks for written text, and `OCRAccuracy` reads both as text that the image must show. If this is not "
            f'intended, give the set an empty text: `dataset.map(lambda row: {{"{TEXT_COLUMN}": ""}})`.',
            stacklevel=3,
        )


def source_weights(dataset: Dataset) -> dict[str, float] | None:
    """
    Read the weights that [`mix_prompts`] recorded.

    Args:
        dataset (`datasets.Dataset`):
            A prompt set.

    Returns:
        `dict[str, float]`: The weight of each source that still has a prompt, or `None` if the set was not mixed.

    Raises:
        `ValueError`: If a prompt has no source or no weight, or two prompts of a source have different weights.
    """
    if WEIGHT_COLUMN not in dataset.column_names:
        return None
    if SOURCE_COLUMN not in dataset.column_names:
        raise ValueError(
            f"The prompt set has a column `{WEIGHT_COLUMN}` but no `{SOURCE_COLUMN}`; remove the first or restore the "
            "second."
        )
    weights: dict[str, float] = {}
    columns = dataset[SOURCE_COLUMN][:], dataset[WEIGHT_COLUMN][:]  # as lists, which are much faster than columns
    for row, (name, weight) in enumerate(zip(*columns, strict=True)):
        if name is None or weight is None:
            raise ValueError(
                f"Row {row} of the prompt set has the source {name!r} and the weight {weight!r}. Mix all prompt sets "
                "in one call of `mix_prompts` instead of adding rows later."
            )
        if weights.setdefault(name, weight) != weight:
            raise ValueError(
                f"Row {row} of the prompt set has the weight {weight} for the source {name!r}, and an earlier row "
                f"{weights[name]}; give each source one weight."
            )
    return check_source_weights(weights, weights)


def check_source_weights(names: Collection[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """
    Check the weights of sources; without weights all are 1.

    Args:
        names (`Collection[str]`):
            The sources.
        weights (`Mapping[str, float]`, *optional*):
            Their weights, finite and greater than 0. Defaults to `1.0` each.

    Returns:
        `dict[str, float]`: The weights in the order of `names`.

    Raises:
        `ValueError`: If a weight is missing, belongs to no source, or is not a finite number greater than 0.
    """
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if set(weights) != set(names):
        raise ValueError(
            f"`weights` has the sources {sorted(weights)}, the prompt sets are {sorted(names)}; pass one weight each."
        )
    for name, weight in weights.items():
        if not isinstance(weight, Real) or not 0 < weight < math.inf:
            raise ValueError(
                f"The source {name!r} has the weight {weight!r}; a weight is a finite number greater than 0. Leave "
                "out a source that should have no share."
            )
    return {name: float(weights[name]) for name in names}


def _common_features(datasets: Mapping[str, Dataset]) -> Features:
    """For each column of any of the sets, a type for the values of all sets."""
    features: dict[str, Any] = {}
    first: dict[str, str] = {}  # for each column, the source that its type is from
    for name, dataset in datasets.items():
        for column, feature in dataset.features.items():
            known = features.setdefault(column, feature)
            first.setdefault(column, name)
            common = _common_type(known, feature)
            if common is None:
                raise ValueError(
                    f"The column `{column}` is {known} in the source {first[column]!r} and {feature} in {name!r}. "
                    "Rename one of the two, or convert them to one type with `dataset.cast_column`."
                )
            if common != known:
                features[column], first[column] = common, name
    return Features(features)


def _common_type(a: Any, b: Any) -> Any:
    """A type for the values of both; `None` if there is none."""
    if a == b:
        return a
    if not isinstance(a, Value) or not isinstance(b, Value):
        # A column with `None` only has the type `null`, which is compatible with every type.
        if a == Value("null"):
            return b
        return a if b == Value("null") else None
    kinds = {a.dtype, b.dtype} - {"null"}
    if len(kinds) == 1:
        return Value(kinds.pop())
    for group, widest in ((STRINGS, "string"), (INTEGERS, "int64"), (INTEGERS | FLOATS, "float64")):
        if kinds <= group:
            return Value(widest)
    return None
