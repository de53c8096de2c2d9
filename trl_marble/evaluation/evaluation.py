# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The result of scoring a policy on a prompt set."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..media import Sample


@dataclass(frozen=True)
class Evaluation:
    """
    Rewards of the images that a policy sampled for a prompt set.

    Args:
        step (`int`):
            Optimizer step at which the policy was evaluated.
        reward_names (`list[str]`):
            The K rewards.
        rewards (`Tensor` of shape `[K, N]`, float32):
            Rewards of all images, those of one prompt in a row; NaN where a reward does not apply.
        gallery (`dict[str, list]`, *optional*):
            Images of some of the prompts, in the order of their seeds; a video is a list of frames.
        name (`str`, *optional*):
            The name of the prompt set, where the trainer has several; `None` for all of them together.
    """

    step: int
    reward_names: list[str]
    rewards: Tensor
    gallery: dict[str, list[Sample]] = field(default_factory=dict)
    name: str | None = None

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean over the valid images and its standard error, for each reward."""
        return {name: _mean_and_error(row) for name, row in zip(self.reward_names, self.rewards, strict=True)}

    def change_since(self, before: "Evaluation") -> dict[str, tuple[float, float]]:
        """
        How each reward changed on the same prompts and seeds.

        Args:
            before ([`Evaluation`]):
                An evaluation of the same prompt set with the same rewards.

        Returns:
            `dict[str, tuple[float, float]]`: Mean difference over the images that are valid in both, and its standard
            error (paired, image by image).

        Raises:
            `ValueError`: If the two evaluations are not of the same images and rewards.
        """
        if self.reward_names != before.reward_names or self.rewards.shape != before.rewards.shape:
            raise ValueError(
                f"Cannot compare rewards {self.reward_names} of shape {tuple(self.rewards.shape)} with "
                f"{before.reward_names} of shape {tuple(before.rewards.shape)}; evaluate both on the same prompts."
            )
        difference = self.rewards - before.rewards
        return {name: _mean_and_error(row) for name, row in zip(self.reward_names, difference, strict=True)}


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    values = values[~values.isnan()].double()
    if len(values) == 0:
        return math.nan, math.nan
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
    return values.mean().item(), error


def nan_aware_mean(values: list[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()
