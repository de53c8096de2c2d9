# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Lets rewards that learn do so after each generation batch, with one state on all processes."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..media import Sample
from ..processes import FailingTogether
from ..rewards import LearningReward, RewardError, RewardScorer, Scores
from ..rewards.call_log import LogKey
from ..step_times import LEARNING, StepTimes
from .set_scores import SetImages


States = dict[str, Any]
"""Name of a reward that learns -> its state."""


class _Seen(NamedTuple):
    """An image of a generation batch, as processes send it to the one that learns."""

    number: int
    image: Sample | None  # where a reward learns from images
    features: dict[int, Tensor]  # by the number of a reward that learns from these, where it applies
    failed: list[bool]  # each reward
    rewards: dict[str, float | None]
    prompt: str
    columns: dict[str, Any]


class RewardLearning:
    """
    Lets the rewards that learn do so on the first process, and gives their states to the others.

    What they learn from a generation batch counts once an optimizer step has used that batch: a checkpoint that is
    saved before holds their states from before, with which a resumed run scores the batch again.

    Args:
        scorer ([`~trl_marble.rewards.RewardScorer`]):
            The rewards that are trained on.
        together ([`~trl_marble.processes.FailingTogether`]):
            Lets all processes stop where one fails.
        copy_state (`Callable[[Any, str], Any]`):
            Copies a state to the CPU, and refuses one that no checkpoint can hold; also gets what it is the state of.
        times ([`~trl_marble.step_times.StepTimes`], *optional*):
            What learning takes is added to. Defaults to measuring nothing.

    Raises:
        `TypeError`: If a reward has a state already, and no checkpoint can hold it.
    """

    def __init__(
        self,
        scorer: RewardScorer,
        together: FailingTogether,
        copy_state: Callable[[Any, str], Any],
        times: StepTimes | None = None,
    ) -> None:
        self.scorer, self.together, self.copy_state, self.times = scorer, together, copy_state, times
        self._before: States | None = None  # while no optimizer step has used the latest generation batch
        for row in scorer.learners:
            self._check_first_state(row)

    @property
    def names(self) -> list[str]:
        """The rewards that learn."""
        return [self.scorer.names[row] for row in self.scorer.learners]

    def update(self, own: SetImages, scores: Scores, trainer_state: Any) -> dict[LogKey, list[float]]:
        """
        Learn from a generation batch that was scored. All processes call it.

        Args:
            own ([`SetImages`]):
                This process's images.
            scores ([`~trl_marble.rewards.Scores`]):
                Their scores, with the features that rewards learn from.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.

        Returns:
            `dict[tuple[str, str], list[float]]`: What the rewards logged with `log_metric` on this process.

        Raises:
            [`~trl_marble.rewards.RewardError`]: If one of them failed, whatever the failure policy is: what it has
                learned is not known then.
        """
        with nullcontext() if self.times is None else self.times.measure(LEARNING):
            return self._update(own, scores, trainer_state)

    def commit(self) -> None:
        """Keep what was learned from the latest generation batch, once an optimizer step has used it."""
        self._before = None

    def roll_back(self) -> None:
        """Forget what was learned from a generation batch that no optimizer step has used."""
        if self._before is not None:
            self._load(self._before)
            self._before = None

    def state_dict(self) -> States:
        """The states that a run resumed from here begins with."""
        return self._copy_states() if self._before is None else self._before

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what [`~RewardLearning.state_dict`] returned."""
        self._before = None
        self._load(state_dict)

    def _update(self, own: SetImages, scores: Scores, trainer_state: Any) -> dict[LogKey, list[float]]:
        state = PartialState()
        with self.together.phase():
            self._before = self._copy_states()
            described = self._describe(own, scores)
        seen = [image for images in gather_object([described]) for image in images]
        logged: dict[LogKey, list[float]] = {}
        learned: list[Any] = [None]
        with self.together.phase():
            if state.is_main_process:
                seen.sort(key=lambda image: image.number)
                for row in self.scorer.learners:
                    logged |= self._learn(row, seen, trainer_state)
                learned = [self._copy_states()]
                self.scorer.release()
        if state.num_processes > 1:
            broadcast_object_list(learned)
            with self.together.phase():
                if not state.is_main_process:
                    self._load(learned[0])
        return logged

    def _check_first_state(self, row: int) -> None:
        """Refuse a state that cannot be saved before anything is sampled."""
        try:
            state = self.scorer.learners[row].state_dict()
        except Exception:  # there may be none before it has seen images; it is checked again when it learns
            return
        self._copy_state(row, state)

    def _copy_state(self, row: int, state: Any) -> Any:
        return self.copy_state(state, f"the reward `{self.scorer.names[row]}`")

    def _copy_states(self) -> States:
        return {
            self.scorer.names[row]: self._copy_state(row, self.scorer.call(row, "state_dict"))
            for row in self.scorer.learners
        }

    def _load(self, states: Mapping[str, Any]) -> None:
        for row in self.scorer.learners:
            self.scorer.call(row, "load_state_dict", states[self.scorer.names[row]])

    def _describe(self, own: SetImages, scores: Scores) -> list[_Seen]:
        """This process's images, to be sent to the first one."""
        learners = self.scorer.learners
        by_features = [row for row, learner in learners.items() if isinstance(learner, LearningReward)]
        sends_images = len(by_features) < len(learners)
        return [
            _Seen(
                own.numbers[i],
                own.images[i] if sends_images else None,
                {row: part for row in by_features if (part := self._features(row, i, scores)) is not None},
                scores.failed[:, i].tolist(),
                {
                    name: None if value != value else value  # NaN
                    for name, value in zip(self.scorer.names, scores.rewards[:, i].tolist(), strict=True)
                },
                own.prompts[i],
                {name: values[i] for name, values in own.columns.items()},
            )
            for i in own.finite.nonzero().flatten().tolist()
        ]

    def _features(self, row: int, place: int, scores: Scores) -> Tensor | None:
        """The features of an image that it was scored by; none where the reward does not apply or has failed."""
        name = self.scorer.names[row]
        features = scores.features[name][place] if name in scores.features else None
        if features is None and not scores.rewards[row, place].isnan():
            raise RewardError(
                f"`{name}` has scored an image and kept no features to learn from. Its `__call__` must call that of "
                "`LearningReward`, with all keywords that it got."
            )
        return features

    def _learn(self, row: int, seen: list[_Seen], trainer_state: Any) -> dict[LogKey, list[float]]:
        """
        Let one reward learn from the images that it applies to, by their features, or from all images, without those
        that it failed on when it scored them.
        """
        of_features = isinstance(self.scorer.learners[row], LearningReward)
        chosen = [image for image in seen if (row in image.features if of_features else not image.failed[row])]
        if not chosen:
            return {}
        start = time.perf_counter()
        logged = self.scorer.update(
            row,
            torch.stack([image.features[row] for image in chosen])
            if of_features
            else [image.image for image in chosen if image.image is not None],
            {name: [image.rewards[name] for image in chosen] for name in self.scorer.names},
            [image.prompt for image in chosen],
            {name: [image.columns[name] for image in chosen] for name in chosen[0].columns},
            trainer_state,
        )
        if self.times is not None:
            self.times.add_reward(self.scorer.names[row], time.perf_counter() - start)
        return logged
