# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What becomes of a generation batch in which a reward failed."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from ..rewards import InfiniteRewardError, RewardError, Scores
from ..rewards.protocol import BrokenRewardError
from .marble_config import MarbleConfig


logger = logging.get_logger(__name__)


def raise_failures(errors: Sequence[RewardError], args: MarbleConfig) -> None:
    """
    Raise the first failure that ends training, if there is one.

    Args:
        errors (`Sequence` of [`~trl_marble.rewards.RewardError`]):
            The failures for this process's images.
        args ([`MarbleConfig`]):
            `on_nonfinite` says what an infinite reward means, `reward_failure` every other failure.

    Raises:
        [`~trl_marble.rewards.RewardError`]: If a reward failed for any image and the setting says so. It does not
            advise to leave out the images of a reward that is broken.
    """
    for error in errors:
        setting = "on_nonfinite" if isinstance(error, InfiniteRewardError) else "reward_failure"
        if getattr(args, setting) == "raise":
            advice = f" To leave failed images out instead, set `{setting}='mask'`."
            text = str(error) if isinstance(error, BrokenRewardError) else f"{error}{advice}"
            raise RewardError(text) from error.__cause__  # with the traceback of the reward


def count_failures(scores: Scores, names: list[str], accelerator: Accelerator) -> dict[str, int]:
    """
    Count the failures that are left out, as `reward_failure="mask"` or `on_nonfinite="mask"` asks for.

    Args:
        scores ([`~trl_marble.rewards.Scores`]):
            What the rewards said of this process's images.
        names (`list[str]`):
            Of the rewards.
        accelerator ([`~accelerate.Accelerator`]):
            Adds up over processes.

    Returns:
        `dict[str, int]`: How many images of all processes each reward failed for.

    Raises:
        [`~trl_marble.rewards.RewardError`]: In all processes, if a reward has no value for any image of any process
            because it failed.
    """
    own = torch.stack([scores.failed.sum(dim=1), (~scores.rewards.isnan()).sum(dim=1)])
    failed, valid = accelerator.reduce(own.to(accelerator.device), reduction="sum").tolist()
    counts = dict(zip(names, failed, strict=True))
    if not any(failed):
        return counts
    messages = gather_object([str(error) for error in scores.errors])
    for name, number, number_valid in zip(names, failed, valid, strict=True):
        if number > 0 and number_valid == 0:
            start = f"Reward `{name}` "
            message = next(text for text in messages if text.startswith(start))
            cause = next((error.__cause__ for error in scores.errors if str(error).startswith(start)), None)
            raise RewardError(
                f"Reward `{name}` failed for all images it applies to. First failure: {message}"
            ) from cause
    logger.warning(f"Left out as not applicable: {sum(failed)} failed rewards. {messages[0]}")
    return counts
