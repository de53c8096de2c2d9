# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The scorer of a run without rewards."""

import torch

from .scoring import PendingScores, RewardScorer, Scores


class NoRewards(RewardScorer):
    """A [`RewardScorer`] of no reward, for runs that learn from teachers alone."""

    def __init__(self) -> None:
        self.funcs, self.names, self.scopes, self.learners, self.timeout = [], [], [], {}, None
        self._threads, self._loop, self._answered = {}, None, set()
        self._device = torch.device("cpu")

    def collect(self, pending: PendingScores, deadline: float | None = None) -> Scores:
        rewards = torch.empty(0, len(pending.prompts))
        return Scores(rewards, rewards.isnan(), [])
