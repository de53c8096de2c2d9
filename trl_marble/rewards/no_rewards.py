# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The scorer of a run without rewards."""

from .answers import Answers
from .reward_calls import RewardCalls
from .scoring import RewardScorer


class NoRewards(RewardScorer):
    """A [`RewardScorer`] of no reward, for runs that learn from teachers alone."""

    def __init__(self) -> None:
        self.funcs, self.names, self.scopes, self.learners, self.timeout = [], [], [], {}, None
        self._calls, self._answers, self._hanging = RewardCalls(), Answers(None), {}
