# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What becomes of a generation batch in which a reward failed."""

from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from ..rewards import RewardError, Scores


logger = logging.get_logger(__name__)


def settle_failures(
    scores: Scores, names: list[str], policy: Literal["raise", "mask"], accelerator: Accelerator
) -> dict[str, int]:
    """
    Raise for failed rewards on all processes alike, or count them.

    Args:
        scores ([`~trl_marble.rewards.Scores`]):
            What the rewards said of this process's images.
        names (`list[str]`):
            Of the rewards.
        policy (`"raise"` or `"mask"`):
            `MarbleConfig.reward_failure`.
        accelerator ([`~accelerate.Accelerator`]):
            Tells the other processes.

    Returns:
        `dict[str, int]`: How many images of all processes each reward failed for.

    Raises:
        [`~trl_marble.rewards.RewardError`]: With `"raise"` if any reward failed for any image; with `"mask"` if one
            has no value for any image of any process because it failed.
    """
    own = torch.stack([scores.failed.sum(dim=1), (~scores.rewards.isnan()).sum(dim=1)])
    failed, valid = accelerator.reduce(own.to(accelerator.device), reduction="sum").tolist()
    counts = dict(zip(names, failed, strict=True))
    if not any(failed):
        return counts
    message = gather_object([str(error) for error in scores.errors])[0]
    # With the traceback of the reward where it is at hand.
    cause = scores.errors[0].__cause__ if scores.errors else None
    if policy == "raise":
        raise RewardError(
            f"{message} What was trained so far is saved. To leave failed images out instead, set "
            "`reward_failure='mask'`."
        ) from cause
    for name, number, number_valid in zip(names, failed, valid, strict=True):
        if number > 0 and number_valid == 0:
            raise RewardError(
                f"Reward `{name}` failed for all images it applies to. First failure: {message}"
            ) from cause
    logger.warning(f"Left out as not applicable: {sum(failed)} failed rewards. {message}")
    return counts
