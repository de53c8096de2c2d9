# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Several prompt sets to evaluate on: what they may be, and their results taken together."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from ..data import prepare_prompts
from ..media import Sample
from ..metrics import nan_aware_mean
from .policy_evaluation import PolicyEvaluation


GAINS = ("gain_worst", "gain_mean", "joint_gain", "joint_fall")  # of all rewards that are trained on
SET_NAME = re.compile(r"[\w.-]+")  # a part of metrics' and files' names


def prepare_evaluation_sets(given: Any) -> Dataset | dict[str, Dataset]:
    """
    One prompt set, or several by name, in the form in which they are evaluated on.

    Args:
        given (`datasets.Dataset` or `dict[str, datasets.Dataset]`):
            What the user passed as `eval_dataset`.

    Raises:
        `TypeError`: If it is anything else.
        `ValueError`: If a set cannot be rolled out, there is none, or its name cannot be a part of a metric's name.
    """
    if not isinstance(given, dict) or isinstance(given, DatasetDict):
        return prepare_prompts(given, "eval_dataset")
    if not given:
        raise ValueError("`eval_dataset` is an empty dict; pass at least one prompt set, or `None`.")
    for name in given:
        if not isinstance(name, str) or not SET_NAME.fullmatch(name):
            raise ValueError(
                f"`eval_dataset` has a set named {name!r}; a name is of letters, digits, `_`, `-` and `.`, as it "
                "becomes a part of metrics' and files' names."
            )
    return {name: prepare_prompts(dataset, set_label(name)) for name, dataset in given.items()}


def evaluation_sets(prepared: Dataset | dict[str, Dataset] | None) -> dict[str | None, Dataset]:
    """The prompt sets by name; a single one has the name `None`."""
    if isinstance(prepared, dict):
        return {name: dataset for name, dataset in prepared.items()}
    return {} if prepared is None else {None: prepared}


def set_label(name: str | None) -> str:
    """What to call a set in messages."""
    return "eval_dataset" if name is None else f'eval_dataset["{name}"]'


def is_gain(metric: str, prepared: Dataset | dict[str, Dataset] | None) -> bool:
    """Whether a metric, with or without `eval_` before it, is measured from the evaluation before the first step."""
    starts = tuple(prefix + start for prefix in _set_prefixes(prepared) for start in ("gain/", "gain_", "joint_"))
    return metric.removeprefix("eval_").startswith(starts)


def check_best_metric(
    metric: str | None,
    reward_names: Sequence[str],
    prepared: Dataset | dict[str, Dataset] | None,
    evaluates_base: bool,
) -> None:
    """
    Refuse a `metric_for_best_model` that no evaluation will have, before anything is loaded or trained.

    Args:
        metric (`str`, *optional*):
            The metric, with or without `eval_` before it. One that a reward may log itself is not checked.
        reward_names (`Sequence[str]`):
            The rewards that evaluations measure.
        prepared ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            The evaluation sets.
        evaluates_base (`bool`):
            Whether the run is evaluated before its first step.

    Raises:
        `ValueError`: With the metrics that there are; or for a gain, if there is nothing to measure it from.
    """
    if metric is None or ("rewards/" not in metric and not is_gain(metric, prepared)):
        return
    of_each = ("rewards/{}/mean", "gain/{}/mean", "rewards/{}/valid", "rewards/{}/standard_error")
    names = [*GAINS, *(pattern.format(name) for pattern in of_each for name in reward_names)]
    known = [prefix + name for prefix in _set_prefixes(prepared) for name in names]
    if metric.removeprefix("eval_") not in known:
        shown = ", ".join(name for name in known if not name.endswith(("/valid", "error")))
        raise ValueError(f"`metric_for_best_model` is {metric!r}, which no evaluation has; choose one of {shown}.")
    if is_gain(metric, prepared) and not evaluates_base:
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, which is measured from the evaluation before the first step, and "
            "there is none; set `eval_on_start=True`."
        )


def _set_prefixes(prepared: Dataset | dict[str, Dataset] | None) -> list[str]:
    """What the metrics of all sets together, and those of each, begin with."""
    return ["", *(f"{name}_" for name in evaluation_sets(prepared) if name is not None)]


def pool_evaluations(results: Mapping[str, PolicyEvaluation]) -> PolicyEvaluation:
    """
    The evaluation of all sets together, as if they were one.

    Args:
        results (`Mapping[str, PolicyEvaluation]`):
            The evaluations of the sets, at one step.

    Returns:
        [`PolicyEvaluation`]: its rewards are those of all images, set by set, and its gallery takes prompts of each
        set in turn. A prompt that two sets have counts as two. The diversity is the mean over sets weighted by their
        images, the norm of the velocity the root mean square over sets.
    """
    parts = list(results.values())
    evaluations = [part.evaluation for part in parts]
    latents = [part.nonfinite_latents for part in parts if part.nonfinite_latents is not None]
    measured = [(part.diversity, part.evaluation.rewards.shape[1]) for part in parts if not math.isnan(part.diversity)]
    return dataclasses.replace(
        parts[0],
        evaluation=dataclasses.replace(
            evaluations[0],
            rewards=torch.cat([evaluation.rewards for evaluation in evaluations], dim=1),
            groups=_pool_groups([evaluation.groups for evaluation in evaluations]),
            gallery=_pool_galleries([evaluation.gallery for evaluation in evaluations]),
            name=None,
            digest=hashlib.sha256("".join(evaluation.digest for evaluation in evaluations).encode()).hexdigest(),
            kl=torch.cat([evaluation.kl for evaluation in evaluations if evaluation.kl is not None]),
        ),
        gallery_rewards={},  # each set has its own grid of images
        gallery_extras={},
        logged={
            name: nan_aware_mean([part.logged[name] for part in parts if name in part.logged])
            for name in dict.fromkeys(name for part in parts for name in part.logged)
        },
        failed={name: sum(part.failed[name] for part in parts) for name in parts[0].failed},
        nonfinite_latents=sum(latents) if latents else None,
        diversity=sum(d * n for d, n in measured) / sum(n for _, n in measured) if measured else math.nan,
        velocity_norm=math.sqrt(nan_aware_mean([part.velocity_norm**2 for part in parts])),
    )


def _pool_groups(groups: Sequence[Tensor]) -> Tensor:
    """Numbers of prompts that are those of one set only."""
    sizes = [int(numbers.max()) + 1 for numbers in groups]
    return torch.cat([numbers + sum(sizes[:place]) for place, numbers in enumerate(groups)])


def _pool_galleries(galleries: Sequence[dict[str, list[Sample]]]) -> dict[str, list[Sample]]:
    """As many prompts as the largest gallery has, taken from each in turn."""
    pooled: dict[str, list[Sample]] = {}
    for items in zip_longest(*(gallery.items() for gallery in galleries)):
        for prompt, images in filter(None, items):
            pooled.setdefault(prompt, images)
    return dict(list(pooled.items())[: max(map(len, galleries))])
