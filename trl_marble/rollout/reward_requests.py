# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scores that were asked for and are on their way."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED
from typing import Any, Self

import torch
from torch import Tensor

from ..media import Sample
from ..rewards import PendingScores, RewardScorer, Scores
from ..rewards.threads import wait_until
from .reward_failures import FailurePolicy


class RewardRequests:
    """
    The answers of several scorers about batch after batch. An exception in its context drops those on their way.

    Args:
        scorers (`Sequence[RewardScorer]`):
            The rewards to ask.
        failures ([`FailurePolicy`]):
            Which failures end the run.
        timeout (`float`, *optional*):
            `reward_timeout`, in seconds.
    """

    def __init__(self, scorers: Sequence[RewardScorer], failures: FailurePolicy, timeout: float | None) -> None:
        self.scorers, self.failures, self.timeout = scorers, failures, timeout
        self._batches: deque[tuple[list[PendingScores], Tensor]] = deque()
        self._unchecked: list[tuple[RewardScorer, PendingScores]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for waiting, _shown in self._batches:
                for pending in waiting:
                    pending.cancel()

    def ask(
        self, sampled: list[Sample], prompts: list[str], columns: dict[str, list], shown: Tensor, trainer_state: Any
    ) -> None:
        """Let all rewards score those images of a batch that are to be shown to them."""
        places = shown.nonzero().flatten().tolist()
        chosen = {name: [values[i] for i in places] for name, values in columns.items()}
        waiting = [
            scorer.submit([sampled[i] for i in places], [prompts[i] for i in places], chosen, trainer_state)
            for scorer in (self.scorers if places else [])
        ]
        self._batches.append((waiting, shown))
        self._unchecked += zip(self.scorers, waiting, strict=False)

    def raise_failures(self) -> None:
        """Raise the first failure that ends the run, among the calls that have ended by now."""
        unchecked = self._unchecked
        self._unchecked = [(scorer, pending) for scorer, pending in unchecked if not pending.done]
        for scorer, pending in unchecked:
            self.failures.raise_failures(scorer.failures(pending))

    @property
    def next_is_done(self) -> bool:
        """Whether all rewards have answered about the first batch whose scores were not collected."""
        return all(pending.done for pending in self._batches[0][0])

    def collect_next(self, deadline: float | None) -> Scores:
        """The scores of the first batch that were not collected, for which it waits until the deadline."""
        waiting, shown = self._batches[0]
        while not self.next_is_done and (deadline is None or time.monotonic() < deadline):
            calls = [call for _, pending in self._unchecked for call in pending.futures if not call.done()]
            wait_until(calls, deadline, FIRST_COMPLETED)
            self.raise_failures()
        answers = [scorer.collect(pending, deadline) for scorer, pending in zip(self.scorers, waiting, strict=False)]
        self._batches.popleft()
        for part in answers:
            self.failures.raise_failures(part.errors)
        return spread_over_batch(answers, shown, sum(len(scorer) for scorer in self.scorers))


def spread_over_batch(parts: Sequence[Scores], was_shown: Tensor, num_rewards: int) -> Scores:
    """The scores of several scorers about the images that they were shown, as one, and none for the other images."""
    rewards = torch.full((num_rewards, len(was_shown)), torch.nan)
    failed = torch.zeros(rewards.shape, dtype=torch.bool)
    if not parts:
        return Scores(rewards, failed, [])
    stacked = Scores.stack(parts)
    rewards[:, was_shown], failed[:, was_shown] = stacked.rewards, stacked.failed
    extras = {key: _spread(values, was_shown) for key, values in stacked.extras.items()}
    features = {name: _spread(values, was_shown) for name, values in stacked.features.items()}
    return stacked._replace(rewards=rewards, failed=failed, extras=extras, features=features)


def _spread(values: list[Any], was_shown: Tensor) -> list[Any]:
    """The values of the images that were shown, and `None` for the others."""
    each = iter(values)
    return [next(each) if is_shown else None for is_shown in was_shown.tolist()]
