# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that evaluations score beside those that are trained on."""

from typing import Any

from ..rewards import RewardScorer
from ..rewards.protocol import find_learner, reward_names, validate_reward_funcs


def held_out_scorer(eval_reward_funcs: Any, reward_funcs: Any, trained: RewardScorer) -> RewardScorer | None:
    """
    Calls the held-out rewards, whose names are told from those of the trained ones as two of one list are.

    Args:
        eval_reward_funcs (`str`, `RewardFunc` or a list of them, *optional*):
            The held-out rewards as the trainer is given them.
        reward_funcs (`str`, `RewardFunc` or a list of them):
            Those that are trained on, as the trainer is given them.
        trained ([`~trl_marble.rewards.RewardScorer`]):
            What calls these.

    Returns:
        [`~trl_marble.rewards.RewardScorer`]: `None` where there is no held-out reward.

    Raises:
        `ValueError`: If one of them is trained on too, or learns.
    """
    given = _as_list(eval_reward_funcs)
    if not given:
        return None
    funcs = validate_reward_funcs(given, "eval_reward_funcs")
    for func, entry, name in zip(funcs, given, reward_names(funcs), strict=True):
        # A name makes a new object each time.
        if func in trained.funcs or isinstance(entry, str) and entry in _as_list(reward_funcs):
            raise ValueError(
                f"`eval_reward_funcs` has `{name}`, which `reward_funcs` has too; held-out rewards are those that are "
                "not trained on. Leave it out: evaluations score the rewards that are trained on anyway."
            )
        if find_learner(func) is not None:
            raise ValueError(
                f"`eval_reward_funcs` has `{name}`, which learns. Held-out rewards are scored in evaluations, where "
                "nothing is learned from: leave it out, or train on it."
            )
    scorer = RewardScorer(funcs, trained.timeout)
    scorer.names = reward_names([*trained.funcs, *funcs])[len(trained) :]
    return scorer


def _as_list(funcs: Any) -> list[Any]:
    """No reward, one or several, as a list."""
    return [funcs] if callable(funcs) or isinstance(funcs, str) else list(funcs or [])
