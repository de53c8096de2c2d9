# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The metrics of a rollout: of its rewards, its failures, and how its images differ."""

import warnings

import torch
from accelerate import Accelerator
from torch import Tensor

from ..balance import zero_std_fractions
from ..metrics import MetricBuffer, mean_rms
from .diversity import group_diversity, thumbnails
from .gathering import gather_rows
from .reward_failures import count_failures
from .reward_logs import average_logged
from .sampler import RolloutSampler, Samples


class RolloutMetrics:
    """
    Records metrics of rollouts, and warns once of each reward that applied to no image.

    Args:
        sampler ([`RolloutSampler`]):
            Knows what becomes of failures.
        names (`list[str]`):
            Of the rewards.
        accelerator ([`~accelerate.Accelerator`]):
            Gathers over processes.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
    """

    def __init__(
        self, sampler: RolloutSampler, names: list[str], accelerator: Accelerator, metrics: MetricBuffer
    ) -> None:
        self.sampler, self.names, self.accelerator, self.metrics = sampler, names, accelerator, metrics
        self._silent_rewards: set[str] = set()

    def record(self, samples: Samples, finite: Tensor, rewards: Tensor, groups: Tensor, step: int) -> None:
        """
        Record the metrics of this process's samples, with what is known of those of all processes: which have finite
        latents `[B]`, their rewards `[K, B]` and their groups `[B]`; after so many optimizer steps.
        """
        failures = self.sampler.failures
        if not failures.raises_nonfinite:
            self.metrics.record("nonfinite/latents", int((~finite).sum()))
        failed: dict[str, int] = {}
        if failures.leaves_out:
            with self.sampler.together.phase():
                failed = count_failures(samples.scores, self.names, self.accelerator)
        silent = zero_std_fractions(rewards, groups).tolist()
        for name, row, fraction in zip(self.names, rewards, silent, strict=True):
            valid = row[~row.isnan()]
            if failures.leaves_out:
                self.metrics.record(f"rewards/{name}/failed", failed[name])
            self.metrics.record(f"rewards/{name}/valid", len(valid) / len(row))
            self.metrics.record(f"rewards/{name}/mean", valid.mean().item() if len(valid) else float("nan"))
            std = valid.std(correction=0).item() if len(valid) else float("nan")
            self.metrics.record(f"rewards/{name}/std", std)
            self.metrics.record(f"rewards/{name}/zero_std_fraction", fraction)
            if len(valid) == 0:
                self._warn_once(name, len(row), step)
        for name, mean in average_logged(samples.scores.metrics).items():
            self.metrics.record(name, mean)
        own_features = thumbnails(samples.images).masked_fill(~samples.finite[:, None], torch.nan)
        features = gather_rows(self.accelerator, own_features)
        self.metrics.record("drift/diversity", group_diversity(features, groups).nanmean().item())
        own_finite = samples.finite.to(samples.latents.device)
        self.metrics.record("drift/latent_rms", mean_rms(samples.latents[own_finite]))

    def _warn_once(self, name: str, num_images: int, step: int) -> None:
        if name not in self._silent_rewards and self.accelerator.is_main_process:
            warnings.warn(
                f"Reward `{name}` applied to none of the {num_images} images of step {step + 1}; it takes no part in "
                "it. (This is said once for each reward.)",
                stacklevel=3,
            )
        self._silent_rewards.add(name)
