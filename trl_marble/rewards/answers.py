# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What rewards have answered, as scores or features and failures."""

from concurrent.futures import CancelledError, Future
from typing import Any

import torch
from torch import Tensor

from .errors import BrokenRewardError, InfiniteRewardError, RewardError, WrongFeaturesError
from .features import check_features, find_infinite
from .protocol import errors_for_infinite, most_common_prompts, reward_tensor
from .scores import Scores


# Exceptions of code that is wrong whatever the image. Leaving out the failed images would hide it.
MISTAKES = (TypeError, NameError, AttributeError, ImportError, NotImplementedError)


class Answers:
    """
    Reads the answers to calls of rewards. A call that has not ended has failed.

    A failure of a reward that has not scored any image so far is that of a broken one ([`BrokenRewardError`]).

    Args:
        timeout (`float`, *optional*):
            How long calls are waited for, in seconds, for messages.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._answered: set[str] = set()  # the rewards that have scored an image

    def value(self, future: Future) -> Any:
        """The value that a call returned, or the exception that it raised, or a `TimeoutError`."""
        if not future.done():
            future.cancel()  # has an effect if the call has not begun or is async
            return TimeoutError(f"no answer after {self.timeout:g} seconds (`reward_timeout`)")
        try:
            error = future.exception()
        except CancelledError as cancelled:
            return cancelled
        return future.result() if error is None else error

    def scores(self, future: Future, name: str, prompts: list[str]) -> Scores:
        """The scores `[1, B]` of one reward."""
        answer = self.value(future)
        if isinstance(answer, WrongFeaturesError):  # as where features are asked for: no failure, but a mistake
            raise answer
        if isinstance(answer, BaseException):  # also SystemExit: on the thread of a reward it does not end the run
            nothing = torch.full((1, len(prompts)), torch.nan)
            return Scores(nothing, nothing.isnan(), [_failure(name, answer, prompts, name in self._answered)])
        answer = errors_for_infinite(answer, name, prompts)
        rewards = reward_tensor(answer, name, prompts)
        failed = torch.tensor([isinstance(value, Exception) for value in answer])
        errors = [
            _infinite(name, value) if isinstance(value, InfiniteRewardError) else _failure(name, value, [prompt], True)
            for value, prompt in zip(answer, prompts, strict=True)
            if isinstance(value, Exception)
        ]
        if not failed.all():
            self._answered.add(name)
        return Scores(rewards[None], failed[None], errors)

    def features(
        self, future: Future, name: str, prompts: list[str]
    ) -> tuple[Tensor | None, Tensor, list[RewardError]]:
        """The features of one reward, where it failed, and its failures."""
        answer = self.value(future)
        if isinstance(answer, BaseException):
            error = _failure(name, answer, prompts, name in self._answered)
            return None, torch.ones(len(prompts), dtype=torch.bool), [error]
        features = check_features(answer, name, len(prompts))
        self._answered.add(name)
        errors = find_infinite(features, name, prompts)
        infinite = torch.tensor([place in errors for place in range(len(prompts))])
        return features.masked_fill(infinite[:, None], torch.nan), infinite, list(errors.values())


def _failure(name: str, error: BaseException, prompts: list[str], has_answered: bool) -> RewardError:
    """The error for a failure, with the prompts of its images."""
    number = "one image" if len(prompts) == 1 else f"batch of {len(prompts)} images"
    text = f"Reward `{name}` raised {type(error).__name__}: {error} ({number} for {most_common_prompts(prompts)})."
    failure: RewardError
    if isinstance(error, MISTAKES):
        failure = BrokenRewardError(text)
    elif not has_answered:
        failure = BrokenRewardError(f"{text} It has not scored any image so far.")
    else:
        failure = RewardError(text)
    failure.__cause__ = error
    return failure


def _infinite(name: str, error: InfiniteRewardError) -> InfiniteRewardError:
    """The error for an infinite number, which begins with the name that the reward has in this run."""
    if str(error).startswith(f"Reward `{name}` "):
        return error
    return InfiniteRewardError(f"Reward `{name}` returned {type(error).__name__}: {error}")
