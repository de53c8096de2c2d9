# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Scores of rewards that compare images: asked once all images are there, about whole sets from all processes."""

from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from ..media import Sample
from ..processes import FailingTogether
from ..rewards import RewardScorer, Scores
from ..rewards.protocol import Scope
from .reward_failures import FailurePolicy
from .reward_requests import spread_over_batch


class SetImages(NamedTuple):
    """
    This process's images, to be compared with those of all processes.

    Args:
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            The images, or videos.
        prompts (`list[str]`):
            Their prompts.
        columns (`dict[str, list]`):
            The other columns of the dataset, one value per image.
        numbers (`list[int]`):
            The number of each image among those of all processes, which is their order in a set. An image may be on
            several processes; then it is in its sets once.
        groups (`list[int]`):
            The group of each image, by a number that images of one prompt share on all processes.
        finite (`Tensor` of shape `[B]`, bool):
            Which of them rewards are shown.
    """

    images: list[Sample]
    prompts: list[str]
    columns: dict[str, list]
    numbers: list[int]
    groups: list[int]
    finite: Tensor


def score_sets(
    scorer: RewardScorer,
    own: SetImages,
    trainer_state: Any,
    failures: FailurePolicy,
    together: FailingTogether,
) -> Scores:
    """
    Ask the rewards that compare images. All processes call it.

    A group is scored by the process that has its first image, a whole batch by the first process; images that lie
    elsewhere are sent there. Of a [`~trl_marble.rewards.SetReward`] features are sent instead, to all processes.

    Args:
        scorer ([`~trl_marble.rewards.RewardScorer`]):
            The rewards.
        own ([`SetImages`]):
            This process's images.
        trainer_state ([`~transformers.TrainerState`]):
            Passed on to the rewards.
        failures ([`FailurePolicy`]):
            Which failures end the run.
        together ([`~trl_marble.processes.FailingTogether`]):
            Lets all processes stop where one fails.

    Returns:
        [`~trl_marble.rewards.Scores`]: of this process's images; NaN in the rows of the other rewards. Failures and
        what was logged are with the process that called the reward.

    Raises:
        [`~trl_marble.rewards.RewardError`]: If a reward returned something that is not a score, or failed and the
            failure policy is to raise.
    """
    parts = [_nothing(len(scorer), len(own.numbers))]
    for scope in ("group", "batch"):
        if any(each == scope and row not in scorer.by_features for row, each in enumerate(scorer.scopes)):
            parts.append(_score_images(scorer, scope, own, trainer_state, failures, together))
    if scorer.by_features:
        parts.append(_score_features(scorer, own, trainer_state, failures, together))
    with together.phase():
        scorer.release()
    return Scores.join(parts)


class _Member(NamedTuple):
    """An image as processes send it to each other."""

    number: int
    group: int
    owner: int
    image: Sample
    prompt: str
    columns: dict[str, Any]


def _score_images(
    scorer: RewardScorer,
    scope: Scope,
    own: SetImages,
    trainer_state: Any,
    failures: FailurePolicy,
    together: FailingTogether,
) -> Scores:
    """The scores of the rewards of a scope that are shown images."""
    shown = own.finite.nonzero().flatten().tolist()
    process = PartialState().process_index
    places = gather_object([(own.numbers[i], process, own.groups[i]) for i in shown])
    owners = {group: first for _, first, group in sorted(places, reverse=True)} if scope == "group" else {}
    members = [
        _Member(
            own.numbers[i],
            own.groups[i],
            owners.get(own.groups[i], 0),
            own.images[i],
            own.prompts[i],
            {name: values[i] for name, values in own.columns.items()},
        )
        for i in shown
    ]
    sent = gather_object([member for member in members if member.owner != process])
    asked = {member.number: member for member in [*sent, *members] if member.owner == process}
    chosen = [asked[number] for number in sorted(asked)]
    answer = _nothing(len(scorer), 0)
    with together.phase():
        if chosen:
            pending = scorer.submit(
                [member.image for member in chosen],
                [member.prompt for member in chosen],
                {name: [member.columns[name] for member in chosen] for name in own.columns},
                trainer_state,
                scope,
                [member.group for member in chosen],
            )
            answer = scorer.collect(pending)
            failures.raise_failures(answer.errors)
    sent_back = answer._replace(
        errors=[], metrics={}, extras=dict(answer.extras), seconds={}, features=dict(answer.features)
    )
    scored = Scores.concatenate(gather_object([sent_back]))
    numbers = gather_object([member.number for member in chosen])
    return _pick(scored, numbers, own.numbers)._replace(
        errors=answer.errors, metrics=answer.metrics, seconds=answer.seconds
    )


def _score_features(
    scorer: RewardScorer, own: SetImages, trainer_state: Any, failures: FailurePolicy, together: FailingTogether
) -> Scores:
    """The scores of the rewards that compare features."""
    shown = own.finite.nonzero().flatten().tolist()
    prompts = [own.prompts[i] for i in shown]
    features: list[Tensor | None] = [None] * len(scorer.by_features)
    with together.phase():
        answer = _nothing(len(scorer), 0)
        if shown:
            columns = {name: [values[i] for i in shown] for name, values in own.columns.items()}
            images = [own.images[i] for i in shown]
            pending = scorer.submit_features(images, prompts, columns, trainer_state, scorer.by_features)
            features, answer = scorer.collect_features(pending)
            failures.raise_failures(answer.errors)
    parts = [spread_over_batch([answer], own.finite, len(scorer))]
    places = [(own.numbers[i], own.groups[i], prompt) for i, prompt in zip(shown, prompts, strict=True)]
    sent = gather_object([(places, features)])
    for column, row in enumerate(scorer.by_features):
        members: dict[int, tuple[int, str, Tensor]] = {}
        for images, of_process in sent:
            if of_process[column] is not None:
                for (number, group, prompt), values in zip(images, of_process[column], strict=True):
                    if not values.isnan().any():
                        members[number] = group, prompt, values
        numbers = sorted(members)
        if numbers:
            with together.phase():
                groups, texts, vectors = zip(*[members[number] for number in numbers], strict=True)
                pending = scorer.submit_credit(row, torch.stack(vectors), torch.tensor(groups), list(texts))
                credit = scorer.collect(pending)
                failures.raise_failures(credit.errors)
            parts.append(_pick(credit, numbers, own.numbers))
    return Scores.join(parts)


def _pick(scores: Scores, numbers: list[int], wanted: list[int]) -> Scores:
    """The scores of some images out of those of others, by their numbers; none for an image that is not there."""
    place = {number: i for i, number in enumerate(numbers)}
    one_more = Scores.concatenate([scores, _nothing(len(scores.rewards), 1)])
    return one_more.select([place.get(number, len(numbers)) for number in wanted])


def _nothing(num_rewards: int, num_images: int) -> Scores:
    """No score of any image."""
    rewards = torch.full((num_rewards, num_images), torch.nan)
    return Scores(rewards, torch.zeros(rewards.shape, dtype=torch.bool), [])
