# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which teachers a run has, and which samples each of them teaches."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data.mixing import SOURCE_COLUMN
from ..pipelines import Teacher
from ..pipelines.teachers import ALL
from .marble_config import MarbleConfig


# What only rewards use.
_OF_REWARDS = (
    "reward_weights",
    "reward_priorities",
    "reward_timeout",
    "scale_rewards",
    "policy_loss",
    "nft_beta",
    "advantage_clip",
    "balance_on",
    "resample_silent_prompts",
    "old_policy_preset",
)


def read_teachers(
    teachers: Any, train_dataset: Dataset, reward_names: Sequence[str], args: MarbleConfig
) -> list[Teacher]:
    """
    The teachers of a run.

    Args:
        teachers (`Mapping[str, str | os.PathLike]`, *optional*):
            As the trainer is given them.
        train_dataset ([`~datasets.Dataset`]):
            The prompts.
        reward_names (`Sequence[str]`):
            The rewards.
        args ([`MarbleConfig`]):
            The settings.

    Raises:
        `TypeError`: If they are no mapping from names to adapters.
        `ValueError`: If one is of no source of the prompts, two have the same name, there is nothing to learn from, or
            rewards and settings do not fit.
    """
    teachers = {} if teachers is None else teachers
    if not isinstance(teachers, Mapping) or not all(
        isinstance(key, str) and isinstance(adapter, str | os.PathLike) for key, adapter in teachers.items()
    ):
        raise TypeError(
            f"`teachers` is {teachers!r}; pass a mapping from sources of prompts to adapters, such as "
            '`{"text": "user/text-lora"}`.'
        )
    has_sources = SOURCE_COLUMN in train_dataset.column_names
    sources = {str(source) for source in train_dataset.unique(SOURCE_COLUMN)} if has_sources else set()
    found: list[Teacher] = []
    for place, (key, adapter) in enumerate(teachers.items()):
        kind, colon, rest = key.partition(":")
        of_all = kind == ALL and (not colon or bool(rest))
        name = (rest or ALL) if of_all else key
        if not of_all and key not in sources:
            known = f"has the sources {', '.join(sorted(sources))}" if sources else f"has no column `{SOURCE_COLUMN}`"
            raise ValueError(
                f"`teachers` has {key!r}, and `train_dataset` {known}. Name a source of the prompts (see "
                f"`mix_prompts`), or write {f'{ALL}:{key}'!r} for a teacher of all prompts."
            )
        if name in [teacher.name for teacher in found]:
            raise ValueError(f"`teachers` has two of the name {name!r}; give each its own name.")
        found.append(Teacher(name, os.fspath(adapter), f"teacher_{place}", None if of_all else key))
    _check(found, reward_names, args)
    return found


def _check(teachers: Sequence[Teacher], reward_names: Sequence[str], args: MarbleConfig) -> None:
    """See that teachers, rewards and settings fit together."""
    if not teachers and not reward_names:
        raise ValueError("There is nothing to train on: pass `reward_funcs`, `teachers` or both.")
    for name in ("teacher_weight", "teacher_states"):
        if not teachers and getattr(args, name) != getattr(MarbleConfig, name):
            raise ValueError(f"`{name}={getattr(args, name)!r}` has no effect without `teachers`; leave it out.")
    if reward_names and args.teacher_states != MarbleConfig.teacher_states:
        raise ValueError(
            f"`teacher_states={args.teacher_states!r}` is for runs without rewards: beside them, teachers are "
            "followed where the rewards' loss is computed. Leave it out; with `policy_loss='grpo'` these are states "
            "of rollouts."
        )
    for teacher in teachers:
        if teacher.row in reward_names:
            raise ValueError(
                f"The teacher {teacher.name!r} is called `{teacher.row}` beside the rewards, and so is a reward. Give "
                "one of the two another name."
            )
    if teachers and args.base_is_sharded:
        raise ValueError(
            "`shard_base=True` needs processes that call the transformer equally often, and each teacher is asked "
            "about its own prompts only. Set `shard_base=False`, or train without teachers."
        )
    if reward_names:
        return
    if args.multi_objective_aggregation == "progress":
        raise ValueError(
            "`multi_objective_aggregation='progress'` weighs rewards by their progress, and there are none. Set "
            "'marble' or 'equal' for teachers that are balanced, or 'sum_then_normalize' for the mean of their losses."
        )
    for name in _OF_REWARDS:
        if getattr(args, name) != getattr(MarbleConfig, name):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` has no effect without rewards; leave it out, or pass "
                "`reward_funcs`."
            )


def assign_teachers(teachers: Sequence[Teacher], sources: Sequence[str] | None, usable: Tensor) -> Tensor:
    """
    Which samples each teacher teaches.

    Args:
        teachers (`Sequence[Teacher]`):
            The teachers.
        sources (`Sequence[str]`, *optional*):
            The source of each sample's prompt, where the prompts have one.
        usable (`Tensor` of shape `[B]`, bool):
            Which samples can be trained on.

    Returns:
        `Tensor` of shape `[T, B]`, float32: 1 where a teacher applies, and NaN elsewhere: rows below those of the
        rewards' advantages.
    """
    rows = torch.full((len(teachers), len(usable)), torch.nan)
    for row, teacher in zip(rows, teachers, strict=True):
        own = usable if teacher.source is None else usable & torch.tensor([s == teacher.source for s in sources or []])
        row[own] = 1.0
    return rows
