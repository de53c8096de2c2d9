# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""With which settings each part of a run was trained: written to checkpoints, and compared when a run is resumed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments


SETTINGS_FILE = "settings.json"
# Where a run is and how it is watched is no part of what was trained. (Tokens are never written.)
NOT_KEPT = {
    "output_dir",
    "run_name",
    "logging_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "disable_tqdm",
    "local_rank",
}

Settings = dict[str, Any]
Changes = dict[str, tuple[Any, Any]]  # before and after


@dataclass(frozen=True)
class SettingsFrom:
    """
    The settings that were in use from some step on.

    Args:
        step (`int`):
            Optimizer steps that were taken before.
        settings (`dict[str, Any]`):
            Name -> value, as JSON has it.
    """

    step: int
    settings: Settings


def describe_settings(args: TrainingArguments) -> Settings:
    """
    All settings of a run and its number of processes, but for tokens and for where the run is.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The settings.

    Returns:
        `dict[str, Any]`: Name -> value, as JSON has it.
    """
    given = args.to_dict() | {"num_processes": args.world_size}
    kept = {name: value for name, value in given.items() if not name.endswith("_token")}
    return json.loads(json.dumps({name: kept[name] for name in kept.keys() - NOT_KEPT}, default=str, sort_keys=True))


def save_settings(folder: Path, history: Sequence[SettingsFrom]) -> None:
    """
    Write the settings of a run to a checkpoint.

    Args:
        folder (`Path`):
            The checkpoint folder.
        history (`Sequence[SettingsFrom]`):
            The settings since the run began, the first ones first.
    """
    content = [vars(each) for each in history]
    (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_settings(folder: Path) -> list[SettingsFrom]:
    """
    Read what [`save_settings`] wrote; nothing from a checkpoint of a version that did not write it.

    Args:
        folder (`Path`):
            The checkpoint folder.
    """
    file = folder / SETTINGS_FILE
    return [SettingsFrom(**each) for each in json.loads(file.read_text())] if file.is_file() else []


def find_changes(before: Settings, after: Settings) -> Changes:
    """
    The settings that differ.

    Args:
        before (`dict[str, Any]`):
            Settings.
        after (`dict[str, Any]`):
            Other ones. A setting that only one of them has, as from another version, is left out.

    Returns:
        `dict[str, tuple[Any, Any]]`: Name -> both values, by name.
    """
    shared = sorted(before.keys() & after.keys())
    return {name: (before[name], after[name]) for name in shared if before[name] != after[name]}


def describe_changes(changes: Changes) -> str:
    """
    Changes in words, such as `"beta 0.0 -> 0.1, learning_rate 0.001 -> 1e-05"`.

    Args:
        changes (`dict[str, tuple[Any, Any]]`):
            See [`find_changes`].
    """
    return ", ".join(f"{name} {before} -> {after}" for name, (before, after) in changes.items())


def use_own_settings(optimizer: torch.optim.Optimizer, scheduler: Any, own: list[Settings]) -> None:
    """
    After an optimizer's saved state was loaded, go on with the settings of this run where they differ from the saved
    ones, as with another learning rate. What was learned, such as moments, and the number of steps taken stay: the
    next step has the learning rate that this run's schedule has for it.

    Args:
        optimizer (`torch.optim.Optimizer`):
            With the saved state. Changed in place.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`):
            With the saved state. Changed in place.
        own (`list[dict[str, Any]]`):
            The settings of each parameter group before the state was loaded, see [`group_settings`].
    """
    for place, (group, wanted) in enumerate(zip(optimizer.param_groups, own, strict=True)):
        group |= {name: value for name, value in wanted.items() if name not in ("lr", "initial_lr")}
        if not isinstance(scheduler, LambdaLR):  # others go on from the rate that they have come to
            continue
        group["initial_lr"] = scheduler.base_lrs[place] = peak = wanted["initial_lr"]
        group["lr"] = scheduler._last_lr[place] = peak * scheduler.lr_lambdas[place](scheduler.last_epoch)


def group_settings(optimizer: torch.optim.Optimizer) -> list[Settings]:
    """
    The settings of each parameter group of an optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer.
    """
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
