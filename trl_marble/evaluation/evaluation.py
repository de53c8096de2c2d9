# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The result of scoring a policy on a prompt set."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..media import Sample
from .gains import GainPoint, measure_gains
from .statistics import clustered_mean


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
            Rewards of all images; NaN where a reward does not apply.
        groups (`Tensor` of shape `[N]`, int64):
            The number of each image's prompt, see [`~trl_marble.evaluation.statistics.number_prompts`]. The images of
            one prompt are not independent, so that standard errors are taken over prompts.
        gallery (`dict[str, list]`, *optional*):
            Images of some of the prompts, in the order of their seeds; a video is a list of frames.
        name (`str`, *optional*):
            The name of the prompt set, where the trainer has several; `None` for all of them together.
        kl (`Tensor` of shape `[N]`, float32, *optional*):
            The distance of the policy from the base model at a noised version of each image, the mean of
            `(v - v_base)^2` over its elements; NaN for images whose latents are not finite.
        digest (`str`, *optional*):
            Of the prompts, the seeds, the names of the rewards and the settings of sampling: evaluations with the same
            one can be compared image by image.
        held_out_names (`list[str]`, *optional*):
            Those of the rewards that are not trained on.
    """

    step: int
    reward_names: list[str]
    rewards: Tensor
    groups: Tensor
    gallery: dict[str, list[Sample]] = field(default_factory=dict)
    name: str | None = None
    kl: Tensor | None = None
    digest: str = ""
    held_out_names: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, tuple[float, float]]:
        """
        Mean of each reward over the images that it applies to, and its standard error over prompts.

        Returns:
            `dict[str, tuple[float, float]]`: Reward name -> mean and standard error, see
            [`~trl_marble.evaluation.clustered_mean`]. The error is NaN where only one prompt has valid images.
        """
        return self._means_and_errors(self.rewards)

    def kl_to_base(self) -> tuple[float, float]:
        """Mean of `kl` over all images, and its standard error over prompts; NaN where it was not measured."""
        if self.kl is None:
            return math.nan, math.nan
        return clustered_mean(self.kl.numpy(), self.groups.numpy())

    def change_since(self, before: "Evaluation") -> dict[str, tuple[float, float]]:
        """
        How each reward changed on the same prompts and seeds.

        Args:
            before ([`Evaluation`]):
                An evaluation of the same prompt set with the same rewards.

        Returns:
            `dict[str, tuple[float, float]]`: Mean difference, image by image, over the images that are valid in both,
            and its standard error over prompts.

        Raises:
            `ValueError`: If the two evaluations are not of the same images and rewards.
        """
        self._check_same_images(before)
        return self._means_and_errors(self.rewards.double() - before.rewards.double())

    def gains_since(self, before: "Evaluation") -> GainPoint:
        """
        How far the rewards came on the same prompts and seeds, on how many prompts all of them rose, and the KL to the
        base model that it was paid with. Held-out rewards have a gain, and do not count in the worst and mean gain and
        in the shares of prompts.

        Args:
            before ([`Evaluation`]):
                An evaluation of the same prompt set with the same rewards.

        Raises:
            `ValueError`: If the two evaluations are not of the same images and rewards.
        """
        self._check_same_images(before)
        first, second = (
            dict(zip(self.reward_names, each.rewards.double().numpy(), strict=True)) for each in (before, self)
        )
        return measure_gains(first, second, self.groups.numpy(), self.kl_to_base(), self.held_out_names)

    def _check_same_images(self, before: "Evaluation") -> None:
        if self.reward_names != before.reward_names or self.rewards.shape != before.rewards.shape:
            raise ValueError(
                f"Cannot compare rewards {self.reward_names} of shape {tuple(self.rewards.shape)} with "
                f"{before.reward_names} of shape {tuple(before.rewards.shape)}; evaluate both on the same prompts."
            )
        if not torch.equal(self.groups, before.groups):
            raise ValueError("Cannot compare images of other prompts; evaluate both on the same prompts.")

    def _means_and_errors(self, values: Tensor) -> dict[str, tuple[float, float]]:
        groups = self.groups.numpy()
        return {name: clustered_mean(row.numpy(), groups) for name, row in zip(self.reward_names, values, strict=True)}
