# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What makes generation batches."""

import functools
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from ...balance import ProgressWeights, aggregate_advantages, weighted_sum_weights
from ...checkpoint.tensor_tree import copy_tree
from ...metrics import MetricBuffer
from ...pipelines import Teacher
from ...rewards import RewardScorer
from ...rewards.protocol import reward_center
from ...rollout import (
    BaseImageSettings,
    BatchLayout,
    ProgressMeter,
    RewardLearning,
    RolloutSampler,
    RolloutSettings,
    RolloutSource,
)
from ..balance_slider import share_draws
from ..marble_config import MarbleConfig
from ..teachers import assign_teachers
from .update import build_policy_loss


def build_source(
    sampler: RolloutSampler,
    scorer: RewardScorer,
    dataset: Dataset,
    edits: bool,
    accelerator: Accelerator,
    metrics: MetricBuffer,
    args: MarbleConfig,
    teachers: Sequence[Teacher] = (),
) -> RolloutSource:
    """What makes generation batches."""
    loss = build_policy_loss(args, has_rewards=len(scorer) > 0)
    reward_weights = torch.tensor(args.reward_weights or [1.0] * len(scorer))
    batch_centred = torch.tensor([reward_center(func) == "batch" for func in scorer.funcs])
    meter = _build_meter(sampler, scorer, dataset, edits, accelerator, metrics, args)

    def compute_advantages(rewards: Tensor, groups: Tensor, shares: Tensor | None = None) -> Tensor:
        if len(rewards) == 0:
            return rewards
        weights = reward_weights if shares is None else reward_weights[:, None] * shares.T
        if meter is not None:
            rewards, weights = meter.weights.in_units_of_scales(rewards), meter.weights.weights
        mode, scale = args.multi_objective_aggregation, args.scale_rewards
        return aggregate_advantages(rewards, groups, weights, mode, scale, args.advantage_clip, batch_centred)

    return RolloutSource(
        sampler,
        scorer,
        dataset,
        _build_layout(args),
        RolloutSettings(
            args.seed,
            args.num_generations,
            args.rollout_batch_size,
            edits,
            int(args.resample_silent_prompts),
            share_draws(args, len(scorer)),
        ),
        compute_advantages,
        functools.partial(_compare_with_sum, reward_weights=reward_weights, args=args),
        accelerator,
        metrics,
        meter,
        functools.partial(loss.window, num_steps=args.num_inference_steps, seed=args.seed),
        functools.partial(assign_teachers, teachers) if teachers else None,
        RewardLearning(scorer, sampler.together, copy_tree, sampler.times) if scorer.learners else None,
    )


def _build_layout(args: MarbleConfig) -> BatchLayout:
    """How a generation batch is cut into optimizer steps and micro-batches."""
    return BatchLayout(
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.steps_per_generation,
        args.num_iterations,
    )


def _build_meter(
    sampler: RolloutSampler,
    scorer: RewardScorer,
    dataset: Dataset,
    edits: bool,
    accelerator: Accelerator,
    metrics: MetricBuffer,
    args: MarbleConfig,
) -> ProgressMeter | None:
    """What compares generation batches with the base model, where their weights come from that."""
    if args.multi_objective_aggregation != "progress":
        return None
    weights = ProgressWeights(
        scorer.names,
        args.progress_temperature,
        args.progress_ema,
        args.reward_targets,
        args.reward_bounds,
        args.reward_priorities,
    )
    settings = BaseImageSettings(args.seed, args.progress_base_images, args.rollout_batch_size, edits)
    return ProgressMeter(weights, sampler, scorer, dataset, settings, accelerator, metrics)


def _compare_with_sum(rewards: Tensor, taught: Tensor, reward_weights: Tensor, args: MarbleConfig) -> Tensor:
    """
    How "weighted sum of the raw rewards, then one advantage" would mix the per-reward gradients, and add those of
    teachers: `[K + T]`. Without teachers the common scale is left open.
    """
    scales = args.scale_rewards != "none"
    of_teachers = args.teacher_weight * (~taught.isnan()).float().mean(dim=1)
    if len(rewards) == 0:
        return of_teachers
    valid = ~rewards.isnan()
    stds = torch.ones(len(rewards))
    if scales:
        rows = [row[keep] for row, keep in zip(rewards, valid, strict=True)]
        stds = torch.tensor([row.std(correction=0).item() if len(row) else 0.0 for row in rows])
    of_rewards = weighted_sum_weights(reward_weights, stds, valid.sum(dim=1))
    if len(taught) > 0:
        sums = (reward_weights[:, None] * rewards).nansum(dim=0)[valid.any(dim=0)]
        scale = (reward_weights.abs() * stds * valid.sum(dim=1)).sum() / max(1, len(sums))
        of_rewards = of_rewards * scale / (sums.std(correction=0).clamp_min(1e-4) if scales else 1.0)
    return torch.cat([of_rewards, of_teachers.to(of_rewards)])
