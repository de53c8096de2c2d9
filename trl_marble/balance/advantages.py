# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Compute advantages from raw rewards. NaN, in both, means that the reward does not apply to the sample."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor


ScaleRewards = Literal["batch", "group", "none"]
AggregationMode = Literal["marble", "equal", "sum_then_normalize", "normalize_then_sum", "progress"]

# Added to every standard deviation before the division by it, as in TRL and in DiffusionNFT's code.
STD_EPS = 1e-4


def reward_stds(rewards: Tensor) -> Tensor:
    """
    Population standard deviation of every reward over the samples to which it applies.

    Args:
        rewards (`torch.Tensor` of shape `(K, B)`):
            Raw rewards, NaN where a reward does not apply.

    Returns:
        `torch.Tensor` of shape `(K,)`, float32: NaN for a reward that applies to no sample.
    """
    return _std(_checked_rewards(rewards)).squeeze(1).to(rewards.device, torch.float32)


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scale_rewards: ScaleRewards = "batch",
    advantage_clip: float = 5.0,
    batch_centred: Tensor | None = None,
) -> Tensor:
    """
    Group-relative advantages, one independent estimator per reward:

    `A[k, i] = clip((R[k, i] - mean of R[k] over the valid samples of i's group) / (s_k + 1e-4), -C, C)`

    The standard deviations are those of the *population* (divided by n), as in the code of
    [DiffusionNFT](https://huggingface.co/papers/2509.16117) and Flow-GRPO; TRL's `GRPOTrainer` divides by n - 1, which
    for usual batch sizes changes the scale by less than a percent. One estimator per reward is the method of
    [MARBLE](https://huggingface.co/papers/2605.06507).

    Args:
        rewards (`torch.Tensor` of shape `(K, B)`):
            Raw rewards of the generation batch of all processes. NaN where a reward does not apply.
        groups (`torch.LongTensor` of shape `(B,)`):
            Group id of every sample, the same for all samples of a prompt. Any integers, in any order.
        scale_rewards (`str`, *optional*, defaults to `"batch"`):
            The scale `s_k`: `"batch"`, the standard deviation over all valid samples; `"group"`, that over the valid
            samples of the sample's own group; `"none"`, no scale.
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            `C`, the largest absolute advantage, above 0.
        batch_centred (`torch.BoolTensor` of shape `(K,)`, *optional*):
            The rewards whose mean over all valid samples is subtracted instead of the group's: those that compare
            whole batches, where the difference between prompts is part of the signal. Their scale with `"group"` is
            that of `"batch"`: they have no group of their own. Defaults to none.

    Returns:
        `torch.Tensor` of shape `(K, B)`, float32, in `[-C, C]`, NaN where `rewards` is. If a reward is constant over a
        group, or valid for only one of its samples, the advantage is exactly 0 there, see [`mask_silent_groups`].

    Raises:
        `ValueError`: if a reward is infinite (the message names its row), or an argument has a wrong shape or an
        impossible value.
    """
    values = _checked_rewards(rewards)
    _check_settings(rewards, groups, scale_rewards, advantage_clip)
    advantages = _scaled_advantages(values, groups, scale_rewards, _rows(batch_centred, rewards))
    return advantages.clamp(-advantage_clip, advantage_clip).to(rewards.device, torch.float32)


def aggregate_advantages(
    rewards: Tensor,
    groups: Tensor,
    reward_weights: Tensor,
    mode: AggregationMode,
    scale_rewards: ScaleRewards = "batch",
    advantage_clip: float = 5.0,
    batch_centred: Tensor | None = None,
) -> Tensor:
    """
    Advantages for each value of `multi_objective_aggregation`.

    - `"marble"`, `"equal"`: one row per reward, see [`group_advantages`]. Rewards are mixed later, by their gradients,
      and `reward_weights` are not used.
    - `"sum_then_normalize"`: the weighted sum of the raw rewards that apply, then one advantage, as in
      [DiffusionNFT](https://huggingface.co/papers/2509.16117) and TRL.
    - `"normalize_then_sum"`: per-reward advantages, their weighted sum over the rewards that apply, standardized again
      over the batch ([GDPO](https://huggingface.co/papers/2601.05242)). Only the result is clipped. TRL always scales
      the per-reward advantages by group, as here with `scale_rewards="group"`.
    - `"progress"`: as `"normalize_then_sum"`, with the weights of [`ProgressWeights`].

    Args:
        rewards (`torch.Tensor` of shape `(K, B)`):
            Raw rewards, NaN where a reward does not apply.
        groups (`torch.LongTensor` of shape `(B,)`):
            Group id of every sample.
        reward_weights (`torch.Tensor` of shape `(K,)` or `(K, B)`):
            Weight of every reward in the sums, or that of every reward for every sample.
        mode (`str`):
            One of the modes above.
        scale_rewards (`str`, *optional*, defaults to `"batch"`):
            See [`group_advantages`].
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            See [`group_advantages`].
        batch_centred (`torch.BoolTensor` of shape `(K,)`, *optional*):
            See [`group_advantages`]. Of a sum of raw rewards each part is centred in its own way; with
            `scale_rewards="group"` it is divided by the batch's standard deviation if any part is centred on the
            batch.

    Returns:
        `torch.Tensor` of shape `(K, B)` for `"marble"` and `"equal"`, otherwise `(1, B)` with NaN where no reward
        applies; float32, in `[-advantage_clip, advantage_clip]`.

    Raises:
        `ValueError`: for an unknown mode, and as [`group_advantages`].
    """
    values = _checked_rewards(rewards)
    _check_settings(rewards, groups, scale_rewards, advantage_clip)
    if mode not in get_args(AggregationMode):
        raise ValueError(
            f"Unknown multi_objective_aggregation {mode!r}: use one of {', '.join(get_args(AggregationMode))}."
        )
    weights = torch.as_tensor(reward_weights).detach().cpu().double()
    if weights.shape not in (rewards.shape[:1], rewards.shape):
        raise ValueError(
            f"reward_weights has shape {tuple(weights.shape)} for {len(rewards)} rewards: give one weight per reward."
        )
    if weights.ndim == 1:
        weights = weights[:, None]
    if not weights.isfinite().all():
        raise ValueError(f"reward_weights must be finite, got {weights.tolist()}.")

    centred_on_batch = _rows(batch_centred, rewards)
    if mode in ("marble", "equal"):
        advantages = _scaled_advantages(values, groups, scale_rewards, centred_on_batch)
    elif mode == "sum_then_normalize":
        advantages = _advantages_of_sum(values, weights, groups, scale_rewards, centred_on_batch)
    else:
        scaled = _scaled_advantages(values, groups, scale_rewards, centred_on_batch)
        total = _weighted_sum_of_valid(scaled, weights)
        # Its mean is 0 already: every reward is centred over the samples on which it is in the sum.
        advantages = total / (_std(total) + STD_EPS)
    return advantages.clamp(-advantage_clip, advantage_clip).to(rewards.device, torch.float32)


def mask_silent_groups(advantages: Tensor, groups: Tensor) -> Tensor:
    """
    Count groups on which a reward does not tell samples apart as groups to which it does not apply.

    Args:
        advantages (`torch.Tensor` of shape `(K, B)`):
            What [`aggregate_advantages`] returned.
        groups (`torch.LongTensor` of shape `(B,)`):
            Group id of every sample.

    Returns:
        `torch.Tensor` of shape `(K, B)`: NaN in the place of advantages of a reward that are 0 for all of its valid
        samples of a group. So such a group is in no mean over samples, as it is in no gradient.
    """
    masked = advantages.clone()
    for group in groups.unique():
        members = groups.to(advantages.device) == group
        silent = (advantages[:, members].nan_to_num(nan=0.0) == 0).all(dim=1)
        masked[:, members] = masked[:, members].masked_fill(silent[:, None], torch.nan)
    return masked


def zero_std_fractions(rewards: Tensor, groups: Tensor) -> Tensor:
    """
    Of the groups that a reward applies to, the fraction on which it is the same for all samples.

    Args:
        rewards (`torch.Tensor` of shape `(K, B)`):
            Raw rewards, NaN where a reward does not apply.
        groups (`torch.LongTensor` of shape `(B,)`):
            Group id of every sample.

    Returns:
        `torch.Tensor` of shape `(K,)`, float64 on the CPU, in `[0, 1]`: NaN for a reward that applies to no sample.
    """
    values = _checked_rewards(rewards)
    spreads = torch.stack([_std(values[:, groups.cpu() == group]).squeeze(1) for group in groups.cpu().unique()])
    return (spreads == 0).double().masked_fill(spreads.isnan(), torch.nan).nanmean(dim=0)


def _checked_rewards(rewards: Tensor) -> Tensor:
    """Rewards `(K, B)` on the CPU in float64: the data is small, and some devices have no float64."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be of shape (rewards, samples), got {tuple(rewards.shape)}.")
    values = rewards.detach().cpu().double()
    infinite = values.isinf()
    if infinite.any():
        row, column = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"Reward {row} is {values[row, column].item()} for sample {column}: rewards must be finite. Return None "
            "or NaN where a reward does not apply."
        )
    return values


def _check_settings(rewards: Tensor, groups: Tensor, scale_rewards: ScaleRewards, advantage_clip: float) -> None:
    if groups.shape != rewards.shape[1:]:
        raise ValueError(
            f"groups has shape {tuple(groups.shape)} for {rewards.shape[1]} samples: give one group id per sample."
        )
    if groups.is_floating_point():
        # float32 has not all integers above 2 ** 24, so that the groups of two prompts could get the same id.
        raise ValueError(f"groups must be integers, got {groups.dtype}: use torch.int64 ids.")
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(f"Unknown scale_rewards {scale_rewards!r}: use one of {', '.join(get_args(ScaleRewards))}.")
    if not 0 < advantage_clip < math.inf:
        raise ValueError(f"advantage_clip must be positive and finite, got {advantage_clip}.")


def _rows(batch_centred: Tensor | None, rewards: Tensor) -> Tensor:
    """Which rows are centred on the batch, of shape `(K,)`, on the CPU."""
    if batch_centred is None:
        return torch.zeros(len(rewards), dtype=torch.bool)
    if batch_centred.shape != rewards.shape[:1] or batch_centred.dtype != torch.bool:
        raise ValueError(
            f"batch_centred has shape {tuple(batch_centred.shape)} and {batch_centred.dtype} for {len(rewards)} "
            "rewards: give one bool per reward."
        )
    return batch_centred.cpu()


def _scaled_advantages(values: Tensor, groups: Tensor, scale_rewards: ScaleRewards, batch_centred: Tensor) -> Tensor:
    """Advantages `(K, B)` before they are clipped."""
    centred = torch.empty_like(values)
    scale = torch.ones_like(values)
    groups = groups.detach().cpu()
    for group in groups.unique():
        members = groups == group
        centred[:, members] = _centre(values[:, members])
        if scale_rewards == "group":
            scale[:, members] = _std(values[:, members]) + STD_EPS
    if scale_rewards == "batch":
        scale = _std(values) + STD_EPS
    if batch_centred.any():
        on_batch = batch_centred[:, None]
        centred = torch.where(on_batch, _centre(values), centred)
        if scale_rewards == "group":
            scale = torch.where(on_batch, _std(values) + STD_EPS, scale)
    return centred / scale


def _advantages_of_sum(
    values: Tensor, weights: Tensor, groups: Tensor, scale_rewards: ScaleRewards, batch_centred: Tensor
) -> Tensor:
    """Advantages `(1, B)` of the weighted sum of the rewards, before they are clipped."""
    total = _weighted_sum_of_valid(values, weights)
    none = torch.zeros(1, dtype=torch.bool)
    if not batch_centred.any():
        return _scaled_advantages(total, groups, scale_rewards, none)
    parts = [
        _scaled_advantages(
            _weighted_sum_of_valid(values[rows], weights[rows]), groups, "none", torch.tensor([on_batch])
        )
        for rows, on_batch in ((~batch_centred, False), (batch_centred, True))
        if rows.any()
    ]
    centred = torch.cat(parts).nansum(dim=0, keepdim=True).masked_fill(total.isnan(), torch.nan)
    return centred if scale_rewards == "none" else centred / (_std(total) + STD_EPS)


def _centre(values: Tensor) -> Tensor:
    """Subtract from each row its mean over the entries that are not NaN."""
    # One of the values is subtracted first. Otherwise a constant reward would keep the rounding error of the mean, and
    # divided by STD_EPS and normalized to a unit gradient, this error would be an update in a random direction.
    shifted = values - values.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True)
    return shifted - shifted.nanmean(dim=1, keepdim=True)


def _std(values: Tensor) -> Tensor:
    """Population standard deviation `(K, 1)` of the rows over the entries that are not NaN."""
    return _centre(values).square().nanmean(dim=1, keepdim=True).sqrt()


def _weighted_sum_of_valid(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum `(1, B)` over the rewards that apply; NaN where none does."""
    total = (weights * values).nansum(dim=0, keepdim=True)
    return total.masked_fill(values.isnan().all(dim=0, keepdim=True), torch.nan)
