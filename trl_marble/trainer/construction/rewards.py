# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What calls the rewards of a run."""

from typing import Any

import torch

from ...rewards import RewardScorer
from ...rewards.held_out import held_out_scorer
from ...rewards.no_rewards import NoRewards
from ..marble_config import MarbleConfig


def build_scorers(reward_funcs: Any, eval_reward_funcs: Any, args: MarbleConfig) -> list[RewardScorer]:
    """
    What calls the rewards: those that are trained on, and the held-out ones where there are any.

    Raises:
        `ValueError`: If `reward_weights`, `reward_priorities`, `reward_targets` or `reward_bounds` does not have one
            value per reward, a held-out reward is trained on or learns, a reward learns whose progress would be
            measured, or `progress_base_images` or `resample_silent_prompts` does not fit a reward that compares
            images.
    """
    # An empty list is refused by the scorer; without teachers so is `None`, which is said later.
    scorer = NoRewards() if reward_funcs is None else RewardScorer(reward_funcs, args.reward_timeout)
    for setting, what in (
        ("reward_weights", "weight"),
        ("reward_priorities", "priority"),
        ("reward_targets", "target (or `None`)"),
        ("reward_bounds", "bound (or `None`)"),
    ):
        values = getattr(args, setting)
        if values is not None and len(values) != len(scorer):
            raise ValueError(
                f"`{setting}` has {len(values)} values ({values}) for {len(scorer)} rewards "
                f"({', '.join(scorer.names)}); pass one {what} per reward, in their order."
            )
    sets = [name for name, scope in zip(scorer.names, scorer.scopes, strict=True) if scope != "image"]
    if sets and args.multi_objective_aggregation == "progress" and args.progress_base_images != args.num_generations:
        raise ValueError(
            f"`progress_base_images={args.progress_base_images}` and `num_generations={args.num_generations}` differ, "
            f"and what a reward that compares images says, such as `{sets[0]}`, depends on how many it compares. Set "
            f"`progress_base_images={args.num_generations}`."
        )
    if scorer.learners and args.multi_objective_aggregation == "progress":
        learner = scorer.names[next(iter(scorer.learners))]
        raise ValueError(
            f"`multi_objective_aggregation='progress'` compares scores with those of the base model's images from the "
            f"start of the run, and the reward `{learner}` learns: its scores then and now are not of one reward. Use "
            "'marble' or another aggregation, or leave the reward out."
        )
    for name, scope in zip(scorer.names, scorer.scopes, strict=True):
        if scope == "batch" and args.resample_silent_prompts:
            raise ValueError(
                f"`resample_silent_prompts={args.resample_silent_prompts}` samples a part of the generation batch "
                f"again, and the reward `{name}` (`scope = 'batch'`) compares all of its images; leave one of the two "
                "out."
            )
    held_out = held_out_scorer(eval_reward_funcs, reward_funcs, scorer)
    scorers = [scorer] if held_out is None else [scorer, held_out]
    for each in scorers:
        each.to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    return scorers
