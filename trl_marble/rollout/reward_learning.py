# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Lets rewards that learn do so after each generation batch, with one state on all processes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..media import Sample
from ..processes import FailingTogether
from ..rewards import InfiniteRewardError, LearningReward, RewardError, RewardScorer
from ..rewards.call_log import LogKey
from .set_scores import SetImages


States = dict[str, Any]
"""Name of a reward that learns -> its state."""


class _Seen(NamedTuple):
    """An image of a generation batch, as processes send it to the one that learns."""

    number: int
    image: Sample | None  # where a reward learns from images
    features: dict[int, Tensor]  # by the number of a reward that learns from these
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
    """

    def __init__(self, scorer: RewardScorer, together: FailingTogether, copy_state: Callable[[Any, str], Any]) -> None:
        self.scorer, self.together, self.copy_state = scorer, together, copy_state
        self._before: States | None = None  # while no optimizer step has used the latest generation batch

    @property
    def names(self) -> list[str]:
        """The rewards that learn."""
        return [self.scorer.names[row] for row in self.scorer.learners]

    def update(self, own: SetImages, rewards: Tensor, trainer_state: Any) -> dict[LogKey, list[float]]:
        """
        Learn from a generation batch that was scored. All processes call it.

        Args:
            own ([`SetImages`]):
                This process's images.
            rewards (`Tensor` of shape `[K, B]`):
                Their rewards.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.

        Returns:
            `dict[tuple[str, str], list[float]]`: What the rewards logged with `log_metric` on this process.

        Raises:
            [`~trl_marble.rewards.RewardError`]: If one of them failed, whatever the failure policy is: what it has
                learned is not known then.
        """
        if not self.names:
            return {}
        state = PartialState()
        with self.together.phase():
            self._before = self._copy_states()
            described = self._describe(own, rewards, trainer_state)
        seen = [image for images in gather_object([described]) for image in images]
        logged: dict[LogKey, list[float]] = {}
        learned: list[Any] = [None]
        with self.together.phase():
            if state.is_main_process:
                seen.sort(key=lambda image: image.number)
                for row in self.scorer.learners:
                    logged |= self._learn(row, seen, trainer_state)
                learned = [self._copy_states()]
        if state.num_processes > 1:
            broadcast_object_list(learned)
            with self.together.phase():
                if not state.is_main_process:
                    self._load(learned[0])
        return logged

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

    def _copy_states(self) -> States:
        return {
            self.scorer.names[row]: self.copy_state(
                self.scorer.call(row, "state_dict"), f"the reward `{self.scorer.names[row]}`"
            )
            for row in self.scorer.learners
        }

    def _load(self, states: Mapping[str, Any]) -> None:
        for row in self.scorer.learners:
            self.scorer.call(row, "load_state_dict", states[self.scorer.names[row]])

    def _describe(self, own: SetImages, rewards: Tensor, trainer_state: Any) -> list[_Seen]:
        """This process's images, to be sent to the first one."""
        shown = own.finite.nonzero().flatten().tolist()
        if not shown:
            return []
        prompts = [own.prompts[i] for i in shown]
        columns = {name: [values[i] for i in shown] for name, values in own.columns.items()}
        images = [own.images[i] for i in shown]
        learners = self.scorer.learners.items()
        asked: dict[int, LearningReward] = {row: each for row, each in learners if isinstance(each, LearningReward)}
        sends_images = len(asked) < len(self.scorer.learners)
        pending = self.scorer.submit_features(images, prompts, columns, trainer_state, asked)
        features, answer = self.scorer.collect_features(pending)
        self.scorer.release()
        for error in answer.errors:
            if not isinstance(error, InfiniteRewardError):  # images with infinite features are left out
                raise RewardError(f"{error} Nothing can be learned from this generation batch.") from error.__cause__
        return [
            _Seen(
                own.numbers[i],
                images[place] if sends_images else None,
                {row: part[place] for row, part in zip(asked, features, strict=True) if part is not None},
                {
                    name: None if value != value else value  # NaN
                    for name, value in zip(self.scorer.names, rewards[:, i].tolist(), strict=True)
                },
                prompts[place],
                {name: values[place] for name, values in columns.items()},
            )
            for place, i in enumerate(shown)
        ]

    def _learn(self, row: int, seen: list[_Seen], trainer_state: Any) -> dict[LogKey, list[float]]:
        """Let one reward learn from the images that it applies to, by their features, or from all images."""
        chosen = [image for image in seen if row not in image.features or not image.features[row].isnan().any()]
        if not chosen:
            return {}
        of_features = isinstance(self.scorer.learners[row], LearningReward)
        return self.scorer.update(
            row,
            torch.stack([image.features[row] for image in chosen])
            if of_features
            else [image.image for image in chosen if image.image is not None],
            {name: [image.rewards[name] for image in chosen] for name in self.scorer.names},
            [image.prompt for image in chosen],
            {name: [image.columns[name] for image in chosen] for name in chosen[0].columns},
            trainer_state,
        )
