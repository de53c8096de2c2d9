# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Score batches of images or videos with several rewards at once, while the next batch is sampled."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from ..media import Sample
from .answers import Answers
from .call_log import LOG_KEYWORDS, CallLog, LogKey
from .errors import RewardError
from .extractor_reward import ExtractorReward
from .frame_reward import FrameReward
from .human import HumanReward
from .learning_reward import LearningReward
from .model_reward import ModelReward
from .parameters import accepts, accepts_log_function, call_signature
from .protocol import (
    RewardFunc,
    Scope,
    find_learner,
    most_common_prompts,
    reward_names,
    reward_scope,
    validate_reward_funcs,
    without_partials,
)
from .reward_calls import PendingScores, RewardCalls, media_keyword
from .scores import Scores
from .set_reward import SetReward
from .threads import wait_until


class RewardScorer:
    """
    Calls the rewards of a run.

    Each sync reward has its own thread, so a reward is never called twice at the same time and need not be
    thread-safe; async rewards share one event loop. Threads are started when they are first used and end with
    [`close`]. No thread prevents the interpreter from ending.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            The rewards; strings are names for [`load_reward`]. The list is not changed.
        timeout (`float`, *optional*):
            Longest time in seconds that [`collect`] waits. Defaults to no limit.

    Attributes:
        names (`list[str]`): The unique name of each reward.
        scopes (`list[str]`): What a score of each reward depends on, see [`RewardFunc`].
        learners (`dict[int, Learner | LearningReward]`): The rewards that learn, by their number.

    Raises:
        `ValueError`: If two settings of a reward, or one of its and `timeout`, do not fit together.
    """

    def __init__(
        self, reward_funcs: str | RewardFunc | Sequence[str | RewardFunc], timeout: float | None = None
    ) -> None:
        self.funcs = validate_reward_funcs(reward_funcs)
        self.names = reward_names(self.funcs)
        self.scopes = [reward_scope(func) for func in self.funcs]
        for row in self.by_features:
            if self.scopes[row] == "image":
                raise ValueError(
                    f"Reward `{self.names[row]}` is a `SetReward` with `scope = 'image'`; set 'group' or 'batch'."
                )
        found = {row: find_learner(func) for row, func in enumerate(self.funcs)}
        self.learners = {row: learner for row, learner in found.items() if learner is not None}
        self.timeout = timeout
        for func, name in zip(self.funcs, self.names, strict=True):
            _check_timeout(func, name, timeout)
        self._calls, self._answers = RewardCalls(), Answers(timeout)
        self._hanging: dict[int, PendingScores] = {}  # calls that were given up, by the number of the reward

    def __len__(self) -> int:
        return len(self.funcs)

    @property
    def of_sets(self) -> Tensor:
        """Which rewards compare images, so that they can be asked about whole sets only: of shape `[K]`, bool."""
        return torch.tensor([scope != "image" for scope in self.scopes])

    @property
    def by_features(self) -> dict[int, SetReward]:
        """Those that are a [`SetReward`], of which features are gathered instead of images, by their numbers."""
        return {row: func for row, func in enumerate(self.funcs) if isinstance(func, SetReward)}

    @property
    def fixed_names(self) -> list[str]:
        """The rewards that do not learn, so that their scores at different steps can be compared."""
        return [name for row, name in enumerate(self.names) if row not in self.learners]

    def submit(
        self,
        samples: Sequence[Sample],
        prompts: list[str],
        columns: dict[str, list],
        trainer_state: Any,
        scope: Scope = "image",
        groups: Sequence[int] | None = None,
    ) -> PendingScores:
        """
        Start scoring and return at once.

        Args:
            samples (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
                The images or videos, of any mode; rewards get them in RGB.
            prompts (`list[str]`):
                Their prompts.
            columns (`dict[str, list]`):
                The other columns of the dataset, one value per sample.
            trainer_state ([`~transformers.TrainerState`]):
                Passed to the rewards.
            scope (`str`, *optional*, defaults to `"image"`):
                The rewards of this scope are asked.
            groups (`list[int]`, *optional*):
                The group of each sample, for rewards of another scope than `"image"`.
        """
        rows = [row for row, own in enumerate(self.scopes) if own == scope and row not in self.by_features]
        more = {} if groups is None else {"groups": list(groups)}
        calls = [self._call(row, self.funcs[row], samples, prompts, columns, trainer_state, more) for row in rows]
        return PendingScores([future for future, _ in calls], list(prompts), [log for _, log in calls], rows)

    def submit_features(
        self,
        samples: Sequence[Sample],
        prompts: list[str],
        columns: dict[str, list],
        trainer_state: Any,
        asked: Mapping[int, SetReward],
    ) -> PendingScores:
        """
        Start to compute the features for some rewards, by their numbers. For the other arguments see [`submit`].
        """
        calls = [
            self._call(row, func.features, samples, prompts, columns, trainer_state, {}) for row, func in asked.items()
        ]
        return PendingScores([future for future, _ in calls], list(prompts), [log for _, log in calls], list(asked))

    def submit_credit(self, row: int, features: Tensor, groups: Tensor, prompts: list[str]) -> PendingScores:
        """
        Start to compute the credit of the images of all processes by a [`SetReward`].

        Args:
            row (`int`):
                The number of the reward.
            features (`Tensor` of shape `[N, D]`):
                The features of the images that it applies to.
            groups (`Tensor` of shape `[N]`, int64):
                Their groups.
            prompts (`list[str]`):
                Their prompts, for messages.
        """
        log = CallLog(len(prompts))
        kwargs = {"features": features, "groups": groups}
        future = self._calls.start(self.by_features[row].credit, self.names[row], kwargs, log)
        return PendingScores([future], prompts, [log], [row])

    def update(
        self,
        row: int,
        seen: list[Sample] | Tensor,
        rewards: dict[str, list[float | None]],
        prompts: list[str],
        columns: dict[str, list],
        trainer_state: Any,
    ) -> dict[LogKey, list[float]]:
        """
        Let a reward learn, see [`~trl_marble.rewards.Learner.update`], and wait for it.

        Args:
            row (`int`):
                The number of the reward.
            seen (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]` or `Tensor` of shape `[N, D]`):
                Images or videos, or for a [`LearningReward`] their features.
            rewards (`dict[str, list[float | None]]`):
                Name of each reward -> one score per image.
            prompts (`list[str]`):
                Their prompts.
            columns (`dict[str, list]`):
                The other columns of the dataset, one value per image.
            trainer_state ([`~transformers.TrainerState`]):
                The state of the run.

        Returns:
            `dict[tuple[str, str], list[float]]`: what it logged with `log_metric`.

        Raises:
            [`RewardError`]: See [`call`].
        """
        update = self.learners[row].update
        shown = {"features": seen} if isinstance(seen, Tensor) else media_keyword(self.funcs[row], seen)
        log = CallLog(len(prompts))
        optional = {**columns, "prompts": prompts, "log_metric": log.log_metric}
        signature = call_signature(update)
        known = {key: value for key, value in optional.items() if signature is None or accepts(signature, key)}
        self.call(row, "update", **known, **shown, rewards=rewards, trainer_state=trainer_state)
        return {(self.names[row], metric): values for metric, values in log.metrics.items()}

    def call(self, row: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """
        Call a method of a reward that learns, a sync one on the reward's thread and an async one on the event loop of
        async rewards, and wait for the result.

        Args:
            row (`int`):
                The number of the reward.
            method (`str`):
                The name of the method.
            args, kwargs:
                Its arguments.

        Raises:
            [`RewardError`]: If it failed, or did not end within `timeout` seconds.
        """
        func = functools.partial(getattr(self.learners[row], method), *args)
        future = self._calls.start(func, self.names[row], kwargs, CallLog(0))
        self._wait(PendingScores([future], [], [], [row]), None)
        hanging = self._hanging.get(row)
        if not future.done() and hanging is not None and not hanging.done:
            future.cancel()
            name, prompts = self.names[row], hanging.prompts
            raise RewardError(
                f"`{name}.{method}` could not be called: an earlier call of `{name}`, which was given up, has not "
                f"ended another {self.timeout:g} seconds later (`reward_timeout`), and the calls of a reward run one "
                f"after the other. It scores {len(prompts)} images for {most_common_prompts(prompts)}. Give what it "
                "waits for a time limit of its own, or raise `reward_timeout`."
            )
        answer = self._answers.value(future)
        if isinstance(answer, BaseException):
            raise RewardError(f"`{self.names[row]}.{method}` raised {type(answer).__name__}: {answer}.") from answer
        return answer

    def collect(self, pending: PendingScores, deadline: float | None = None) -> Scores:
        """
        Wait for scores.

        A reward fails for all images of a call if it raises or takes too long, and for single images if it returns an
        exception or an infinite number ([`InfiniteRewardError`]) for them. The result has all failures, and the caller
        decides what to do.

        The rewards that were not asked have no score.

        Args:
            pending ([`PendingScores`]):
                The result of [`submit`].
            deadline (`float`, *optional*):
                When to stop waiting, in the time of `time.monotonic()`. With the same deadline for several batches
                their waits do not add up. Defaults to `timeout` seconds from now.

        Raises:
            [`RewardError`]: If a reward returned something that is neither a reward nor a failure, which is a mistake
                in its code.
        """
        self._wait(pending, deadline)
        read = [self._answers.scores(future, name, pending.prompts) for future, name in self._named(pending)]
        rewards = torch.full((len(self), len(pending.prompts)), torch.nan)
        failed = torch.zeros(rewards.shape, dtype=torch.bool)
        for row, part in zip(pending.rows, read, strict=True):
            rewards[row], failed[row] = part.rewards[0], part.failed[0]
        self._note_hanging(pending)
        errors = [error for part in read for error in part.errors]
        return Scores(rewards, failed, errors, *self._logs(pending), self._features(pending, failed))

    def collect_features(
        self, pending: PendingScores, deadline: float | None = None
    ) -> tuple[list[Tensor | None], Scores]:
        """
        Wait for features, for those of each reward that [`submit_features`] has asked.

        Args:
            pending ([`PendingScores`]):
                The result of [`submit_features`].
            deadline (`float`, *optional*):
                See [`collect`].

        Returns:
            `tuple[list[Tensor], Scores]`: for each of these rewards features of shape `[B, D]` on the CPU, NaN where
            it does not apply or failed, `None` where it failed for all images; and scores without any, which have the
            failures and what was logged.

        Raises:
            [`RewardError`]: If a reward returned something that is not one row of features per image.
        """
        self._wait(pending, deadline)
        features: list[Tensor | None] = []
        failed = torch.zeros(len(self), len(pending.prompts), dtype=torch.bool)
        errors: list[RewardError] = []
        for row, future in zip(pending.rows, pending.futures, strict=True):
            own, failed[row], own_errors = self._answers.features(future, self.names[row], pending.prompts)
            features.append(own)
            errors += own_errors
        self._note_hanging(pending)
        nothing = torch.full(failed.shape, torch.nan)
        return features, Scores(nothing, failed, errors, *self._logs(pending))

    def failures(self, pending: PendingScores) -> list[RewardError]:
        """
        The failures of those calls that have ended.

        Args:
            pending ([`PendingScores`]):
                The result of [`submit`].

        Raises:
            [`RewardError`]: As in [`collect`].
        """
        calls = [(future, name) for future, name in self._named(pending) if future.done()]
        read = [self._answers.scores(future, name, pending.prompts) for future, name in calls]
        return [error for part in read for error in part.errors]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """
        Set the device of the rewards that are models, and their dtype unless they have their own. It also becomes the
        current device of every thread of a reward.
        """
        self._calls.device = device
        for func in self.funcs:
            if isinstance(model := without_partials(func), ModelReward | FrameReward | ExtractorReward):
                model.to(device, dtype)

    def release(self) -> None:
        """Move the rewards that are models with `offload` to the CPU."""
        for func in self.funcs:
            if isinstance(model := without_partials(func), ModelReward | FrameReward | ExtractorReward):
                model.release()

    def close(self) -> None:
        """
        Stop the threads. They start again when needed.

        Calls that have not begun are dropped and async calls are cancelled. A sync call that is running goes on, since
        nothing can end it, but nobody waits for it.
        """
        self._calls.stop()

    def _wait(self, pending: PendingScores, deadline: float | None) -> None:
        if deadline is None and self.timeout is not None:
            deadline = time.monotonic() + self.timeout
        wait_until(pending.futures, deadline)

    def _note_hanging(self, pending: PendingScores) -> None:
        """Remember the calls that were given up, and go on."""
        for row, future in zip(pending.rows, pending.futures, strict=True):
            if not future.done():
                self._hanging[row] = PendingScores([future], pending.prompts, [], [row])

    def _features(self, pending: PendingScores, failed: Tensor) -> dict[str, list[Tensor | None]]:
        """What the rewards that learn from features learn from: nothing of an image that they failed on."""
        return {
            self.names[row]: [
                None if has_failed else own for own, has_failed in zip(log.features, failed[row].tolist(), strict=True)
            ]
            for row, log in zip(pending.rows, pending.logs, strict=True)
            if log.features is not None
        }

    def _logs(
        self, pending: PendingScores
    ) -> tuple[dict[LogKey, list[float]], dict[LogKey, list[Any]], dict[str, float]]:
        """Metrics, columns and seconds of the calls."""
        logs = [(self.names[row], log) for row, log in zip(pending.rows, pending.logs, strict=True)]
        return (
            {(name, metric): values for name, log in logs for metric, values in log.metrics.items()},
            {(name, column): values for name, log in logs for column, values in log.extras.items()},
            {name: log.seconds for name, log in logs},
        )

    def _named(self, pending: PendingScores) -> list[tuple[Future, str]]:
        return list(zip(pending.futures, [self.names[row] for row in pending.rows], strict=True))

    def _call(
        self,
        row: int,
        func: Callable,
        samples: Sequence[Sample],
        prompts: list[str],
        columns: dict[str, list],
        trainer_state: Any,
        more: dict[str, Any],
    ) -> tuple[Future, CallLog]:
        """Start a call of a reward, or of one of its methods, with the keywords of rewards."""
        kwargs: dict[str, Any] = {column: list(values) for column, values in columns.items()}
        kwargs |= media_keyword(self.funcs[row], samples)
        kwargs |= {"prompts": list(prompts), "trainer_state": trainer_state, **more}
        log = CallLog(len(prompts))
        keywords: tuple[str, ...] = LOG_KEYWORDS
        if isinstance(self.learners.get(row), LearningReward):
            keywords = (*keywords, "log_features")
        # Only to rewards that accept them: others work without.
        kwargs |= {key: getattr(log, key) for key in keywords if accepts_log_function(func, key)}
        return self._calls.start(func, self.names[row], kwargs, log), log


def _check_timeout(func: RewardFunc, name: str, timeout: float | None) -> None:
    """Refuse people whose votes are waited for longer than for any answer: those that came would be lost."""
    inner = without_partials(func)
    if not isinstance(inner, HumanReward) or inner.timeout is None or timeout is None:
        return
    if inner.timeout >= timeout:
        raise ValueError(
            f"Reward `{name}` waits {inner.timeout:g} seconds for votes (its `timeout`), and `reward_timeout` is "
            f"{timeout:g}: the votes would be lost. Make `timeout` less than `reward_timeout`."
        )
