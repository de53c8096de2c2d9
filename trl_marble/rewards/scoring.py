# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Score batches of images or videos with several rewards at once, while the next batch is sampled."""

import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..media import Sample, to_rgb, to_tensor
from .call_log import LOG_KEYWORDS, CallLog, LogKey, join_extras
from .extractor_reward import ExtractorReward
from .frame_reward import FrameReward
from .learning_reward import LearningReward
from .model_reward import ModelReward
from .parameters import accepts, accepts_log_function, call_signature
from .protocol import (
    BrokenRewardError,
    InfiniteRewardError,
    RewardError,
    RewardFunc,
    Scope,
    errors_for_infinite,
    find_learner,
    most_common_prompts,
    reward_names,
    reward_scope,
    reward_tensor,
    validate_reward_funcs,
)
from .set_reward import SetReward
from .threads import EventLoopThread, Worker, wait_until


# Exceptions of code that is wrong whatever the image. Leaving out the failed images would hide it.
MISTAKES = (TypeError, NameError, AttributeError, ImportError, NotImplementedError)


class PendingScores(NamedTuple):
    """
    Scores that are being computed: one future for each reward that was asked, the prompts, the log of each call, and
    which of the scorer's rewards were asked.
    """

    futures: list[Future]
    prompts: list[str]
    logs: list[CallLog]
    rows: list[int]

    @property
    def done(self) -> bool:
        """Whether all calls have ended."""
        return all(future.done() for future in self.futures)

    def cancel(self) -> None:
        """Drop the calls that have not begun, and cancel async ones."""
        for future in self.futures:
            future.cancel()


class Scores(NamedTuple):
    """
    The scores of a batch by all rewards.

    Args:
        rewards (`Tensor` of shape `[K, B]`, float32):
            The scores; NaN where a reward does not apply or failed.
        failed (`Tensor` of shape `[K, B]`, bool):
            Where a reward failed.
        errors (`list` of [`RewardError`]):
            Each failure, with the exception of the reward as its cause.
        metrics (`Mapping[tuple[str, str], list[float]]`, *optional*):
            Numbers that rewards logged with `log_metric`: reward and metric -> its numbers.
        extras (`Mapping[tuple[str, str], list]`, *optional*):
            Columns that rewards logged with `log_extra`: reward and column -> B values, `None` where there is none.
        seconds (`Mapping[str, float]`, *optional*):
            Reward -> how long its calls took, added up; calls of one batch run beside those of other rewards.
    """

    rewards: Tensor
    failed: Tensor
    errors: list[RewardError]
    metrics: Mapping[LogKey, list[float]] = MappingProxyType({})
    extras: Mapping[LogKey, list[Any]] = MappingProxyType({})
    seconds: Mapping[str, float] = MappingProxyType({})

    @staticmethod
    def concatenate(parts: "Sequence[Scores]") -> "Scores":
        """Join the scores of several batches."""
        keys = dict.fromkeys(key for part in parts for key in part.metrics)
        return Scores(
            torch.cat([part.rewards for part in parts], dim=1),
            torch.cat([part.failed for part in parts], dim=1),
            [error for part in parts for error in part.errors],
            {key: [value for part in parts for value in part.metrics.get(key, [])] for key in keys},
            join_extras([(part.extras, part.rewards.shape[1]) for part in parts]),
            {
                name: math.fsum(part.seconds.get(name, 0.0) for part in parts)
                for name in dict.fromkeys(name for part in parts for name in part.seconds)
            },
        )

    def select(self, chosen: Sequence[int]) -> "Scores":
        """The scores of some of the images, with everything that is not of single images."""
        index = torch.tensor(chosen, dtype=torch.int64)
        extras = {key: [values[i] for i in chosen] for key, values in self.extras.items()}
        return self._replace(rewards=self.rewards[:, index], failed=self.failed[:, index], extras=extras)

    @staticmethod
    def stack(parts: "Sequence[Scores]") -> "Scores":
        """The scores of the same images by several scorers, the rows of one below those of the other."""
        metrics: dict[LogKey, list[float]] = {}
        extras: dict[LogKey, list[Any]] = {}
        seconds: dict[str, float] = {}
        for part in parts:
            metrics |= part.metrics
            extras |= part.extras
            seconds |= part.seconds
        rewards, failed = torch.cat([part.rewards for part in parts]), torch.cat([part.failed for part in parts])
        return Scores(rewards, failed, [error for part in parts for error in part.errors], metrics, extras, seconds)

    @staticmethod
    def join(parts: "Sequence[Scores]") -> "Scores":
        """The scores of the same images by different rewards, each part with NaN in the rows of the others."""
        first, *others = parts
        rewards, failed = first.rewards, first.failed
        metrics, extras, seconds = dict(first.metrics), dict(first.extras), dict(first.seconds)
        for part in others:
            rewards, failed = torch.where(part.rewards.isnan(), rewards, part.rewards), failed | part.failed
            metrics |= part.metrics
            extras |= part.extras
            seconds |= {name: seconds.get(name, 0.0) + value for name, value in part.seconds.items()}
        return Scores(rewards, failed, [error for part in parts for error in part.errors], metrics, extras, seconds)


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
        self._device = torch.device("cpu")
        self._answered: set[str] = set()  # the rewards that have scored an image
        self._threads: dict[str, Worker] = {}
        self._loop: EventLoopThread | None = None

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
        asked: Mapping[int, SetReward] | Mapping[int, LearningReward],
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
        future = self._start(self.by_features[row].credit, self.names[row], kwargs, log)
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
        shown = {"features": seen} if isinstance(seen, Tensor) else self._media(row, seen)
        log = CallLog(len(prompts))
        optional = {**columns, "prompts": prompts, "log_metric": log.log_metric}
        signature = call_signature(update)
        known = {key: value for key, value in optional.items() if signature is None or accepts(signature, key)}
        self.call(row, "update", **known, **shown, rewards=rewards, trainer_state=trainer_state)
        return {(self.names[row], metric): values for metric, values in log.metrics.items()}

    def call(self, row: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """
        Call a method of a reward that learns where its calls run, so that none runs at the same time, and wait for the
        result.

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
        future = self._start(func, self.names[row], kwargs, CallLog(0))
        self._wait(PendingScores([future], [], [], [row]), None)
        answer = self._answer(future)
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
        read = [self._read(future, name, pending.prompts) for future, name in self._named(pending)]
        rewards = torch.full((len(self), len(pending.prompts)), torch.nan)
        failed = torch.zeros(rewards.shape, dtype=torch.bool)
        for row, part in zip(pending.rows, read, strict=True):
            rewards[row], failed[row] = part.rewards[0], part.failed[0]
        return Scores(rewards, failed, [error for part in read for error in part.errors], *self._logs(pending))

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
            own, failed[row], own_errors = self._read_features(future, self.names[row], pending.prompts)
            features.append(own)
            errors += own_errors
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
        ended = [(future, name) for future, name in self._named(pending) if future.done()]
        return [error for future, name in ended for error in self._read(future, name, pending.prompts).errors]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """
        Set the device of the rewards that are models, and their dtype unless they have their own. It also becomes the
        current device of every thread of a reward.
        """
        self._device = device
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward | ExtractorReward):
                func.to(device, dtype)

    def release(self) -> None:
        """Move the rewards that are models with `offload` to the CPU."""
        for func in self.funcs:
            if isinstance(func, ModelReward | FrameReward | ExtractorReward):
                func.release()

    def close(self) -> None:
        """
        Stop the threads. They start again when needed.

        Calls that have not begun are dropped and async calls are cancelled. A sync call that is running goes on, since
        nothing can end it, but nobody waits for it.
        """
        for worker in self._threads.values():
            worker.stop()
        self._threads.clear()
        if self._loop is not None:
            self._loop.stop()
            self._loop = None

    def _wait(self, pending: PendingScores, deadline: float | None) -> None:
        if deadline is None and self.timeout is not None:
            deadline = time.monotonic() + self.timeout
        wait_until(pending.futures, deadline)

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

    def _read(self, future: Future, name: str, prompts: list[str]) -> Scores:
        """The scores of one reward. A call that has not ended has failed."""
        answer = self._answer(future)
        if isinstance(answer, BaseException):  # also SystemExit: on the thread of a reward it does not end the run
            nothing = torch.full((1, len(prompts)), torch.nan)
            return Scores(nothing, nothing.isnan(), [_failure(name, answer, prompts, name in self._answered)])
        answer = errors_for_infinite(answer, name, prompts)
        rewards = reward_tensor(answer, name, prompts)
        failed = torch.tensor([isinstance(value, Exception) for value in answer])
        errors = [
            value if isinstance(value, InfiniteRewardError) else _failure(name, value, [prompt], True)
            for value, prompt in zip(answer, prompts, strict=True)
            if isinstance(value, Exception)
        ]
        if not failed.all():
            self._answered.add(name)
        return Scores(rewards[None], failed[None], errors)

    def _read_features(
        self, future: Future, name: str, prompts: list[str]
    ) -> tuple[Tensor | None, Tensor, list[RewardError]]:
        """The features of one reward, where it failed, and its failures. A call that has not ended has failed."""
        answer = self._answer(future)
        if isinstance(answer, BaseException):
            error = _failure(name, answer, prompts, name in self._answered)
            return None, torch.ones(len(prompts), dtype=torch.bool), [error]
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(prompts):
            shown = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"type {type(answer).__name__}"
            raise RewardError(
                f"`{name}.features` returned something of {shown} for {len(prompts)} images; return a tensor of shape "
                f"({len(prompts)}, number of features)."
            )
        self._answered.add(name)
        infinite = answer.detach().cpu().isinf().any(dim=1)
        errors: list[RewardError] = [
            InfiniteRewardError(f"Reward `{name}` has infinite features for the prompt {prompt!r}; bound them.")
            for prompt, is_infinite in zip(prompts, infinite.tolist(), strict=True)
            if is_infinite
        ]
        return answer.detach().cpu().masked_fill(infinite[:, None], torch.nan), infinite, errors

    def _answer(self, future: Future) -> Any:
        """The value that a call returned, or the exception that it raised, or a `TimeoutError`."""
        if not future.done():
            future.cancel()  # has an effect if the call has not begun or is async
            return TimeoutError(f"no answer after {self.timeout:g} seconds (`reward_timeout`)")
        try:
            error = future.exception()
        except CancelledError as cancelled:
            return cancelled
        return future.result() if error is None else error

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
        kwargs |= self._media(row, samples)
        kwargs |= {"prompts": list(prompts), "trainer_state": trainer_state, **more}
        log = CallLog(len(prompts))
        # Only to rewards that accept them: others work without.
        kwargs |= {key: getattr(log, key) for key in LOG_KEYWORDS if accepts_log_function(func, key)}
        return self._start(func, self.names[row], kwargs, log), log

    def _media(self, row: int, samples: Sequence[Sample]) -> dict[str, Any]:
        """The keyword with the images or videos, as a reward gets them."""
        keyword = "videos" if isinstance(samples[0], list) else "images"
        as_tensor = getattr(self.funcs[row], "image_type", "pil") == "pt"
        return {keyword: to_tensor(samples) if as_tensor else _own_lists(samples)}

    def _start(self, func: Callable, name: str, kwargs: dict[str, Any], log: CallLog) -> Future:
        if _is_async(func):
            if self._loop is None:
                self._loop = EventLoopThread("async-rewards", self._device)
            return self._loop.submit(functools.partial(_timed_async, log, func, kwargs))
        if name not in self._threads:
            self._threads[name] = Worker(f"reward-{name}", self._device)
        return self._threads[name].submit(functools.partial(_timed, log, func, kwargs))


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


def _timed(log: CallLog, func: Callable, kwargs: dict[str, Any]) -> Any:
    """Call a reward and note how long it took."""
    start = time.perf_counter()
    try:
        return func(**kwargs)
    finally:
        log.seconds = time.perf_counter() - start


async def _timed_async(log: CallLog, func: Callable, kwargs: dict[str, Any]) -> Any:
    """Call an async reward and note how long it took."""
    start = time.perf_counter()
    try:
        return await func(**kwargs)
    finally:
        log.seconds = time.perf_counter() - start


def _is_async(func: Any) -> bool:
    """Whether a reward is an async function, or an object with an async `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    if isinstance(func, FrameReward):
        return _is_async(func.reward)
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def _own_lists(samples: Sequence[Sample]) -> list[Sample]:
    """The images in RGB, in new lists that a reward may change."""
    return [[to_rgb(frame) for frame in sample] if isinstance(sample, list) else to_rgb(sample) for sample in samples]
