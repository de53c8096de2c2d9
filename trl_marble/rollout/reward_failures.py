# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What becomes of images that get no score because a reward failed, or because they are not finite."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from ..rewards import InfiniteRewardError, RewardError, Scores
from ..rewards.errors import BrokenRewardError


logger = logging.get_logger(__name__)


class FailurePolicy(NamedTuple):
    """
    What becomes of images without a score.

    Args:
        reward_failure (`str`):
            Where a reward fails: `"raise"`, or `"mask"` to treat the image as one that the reward does not apply to.
        on_nonfinite (`str`, *optional*):
            Where latents or a reward are not finite: `"raise"`, or `"skip"` to treat the image like that. By default
            as `reward_failure` says.
    """

    reward_failure: Literal["raise", "mask"]
    on_nonfinite: Literal["raise", "skip"] | None = None

    @property
    def raises_nonfinite(self) -> bool:
        """Whether latents or a reward that are not finite end the run."""
        return (self.on_nonfinite or self.reward_failure) == "raise"

    @property
    def how_to_leave_out_nonfinite(self) -> str:
        """The setting with which what is not finite is left out."""
        return "`reward_failure='mask'`" if self.on_nonfinite is None else "`on_nonfinite='skip'`"

    @property
    def leaves_out(self) -> bool:
        """Whether any image may be left out."""
        return self.reward_failure == "mask" or not self.raises_nonfinite

    def raise_failures(self, errors: Sequence[RewardError]) -> None:
        """
        Raise the first failure that ends the run, if there is one.

        Args:
            errors (`Sequence` of [`~trl_marble.rewards.RewardError`]):
                The failures for this process's images.

        Raises:
            [`~trl_marble.rewards.RewardError`]: If a reward failed for any image and the policy says so. It does not
                advise to leave out the images of a reward that is broken.
        """
        for error in errors:
            infinite = isinstance(error, InfiniteRewardError)
            if self.raises_nonfinite if infinite else self.reward_failure == "raise":
                setting = self.how_to_leave_out_nonfinite if infinite else "`reward_failure='mask'`"
                advice = f" To leave failed images out instead, set {setting}."
                text = str(error) if isinstance(error, BrokenRewardError) else f"{error}{advice}"
                raise RewardError(text) from error.__cause__  # with the traceback of the reward


def count_failures(scores: Scores, names: list[str], accelerator: Accelerator) -> dict[str, int]:
    """
    Count the failures that are left out. All processes call it.

    Args:
        scores ([`~trl_marble.rewards.Scores`]):
            The scores of this process's images.
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
