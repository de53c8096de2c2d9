# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A call of a reward that learns from features: what `features` gets, and what it may return."""

import math

import pytest
import torch
from PIL import Image

from trl_marble.rewards import InfiniteRewardError, LearningReward, RewardError, RewardScorer, SetReward


IMAGES = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]
PROMPTS = ["a cat", "a dog", "a hat"]


class Given(LearningReward):
    """Scores by the first of the features that it was given."""

    def __init__(self, features):
        self.given = features

    def features(self, images, prompts, **kwargs):
        return self.given

    def score(self, features):
        self.scored = features
        return features[:, 0]

    def update(self, features, rewards, trainer_state): ...

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict): ...


class GivenOfSet(SetReward):
    """The same of a set."""

    scope = "group"

    def __init__(self, features):
        self.given = features

    def features(self, images, prompts, **kwargs):
        return self.given

    def credit(self, features, groups):
        return features[:, 0]


def collect(*rewards):
    scorer = RewardScorer(list(rewards))
    try:
        return scorer.collect(scorer.submit(IMAGES, PROMPTS, {}, None))
    finally:
        scorer.close()


def test_the_log_functions_are_given_to_features_that_accept_them():
    class Logs(Given):
        def features(self, images, prompts, log_metric, log_extra=None, **kwargs):
            assert not kwargs.keys() - {"trainer_state"}
            log_metric("seen", len(images))
            log_extra("name", prompts)
            return self.given

    class Narrow(Given):
        def features(self, images, prompts, trainer_state):
            return self.given

    features = torch.ones(3, 2)
    scores = collect(Logs(features), Narrow(features))
    assert scores.rewards.tolist() == [[1.0] * 3] * 2 and not scores.errors
    assert scores.metrics == {("Logs", "seen"): [3.0]} and scores.extras == {("Logs", "name"): PROMPTS}


def test_features_are_kept_of_the_images_that_it_applies_to():
    scores = collect(Given(torch.tensor([[1.0, 2.0], [math.nan, 2.0], [3.0, 4.0]])))
    first, second, third = scores.features["Given"]
    assert (first.tolist(), second, third.tolist()) == ([1, 2], None, [3, 4])
    chosen = scores.select([2, 1]).features["Given"]
    assert chosen[0] is third and chosen[1] is None


def test_nothing_is_kept_of_a_call_that_failed():
    class Fails(Given):
        def score(self, features):
            raise OSError("gone")

    scores = collect(Fails(torch.ones(3, 2)))
    assert scores.failed.all() and scores.features.get("Fails", [None] * 3) == [None] * 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.float64])
def test_features_may_be_of_any_real_dtype(dtype):
    reward = Given(torch.tensor([[1, 2], [0, 2], [3, 4]], dtype=dtype))
    scores = collect(reward)
    assert reward.scored.is_floating_point() and all(row.is_floating_point() for row in scores.features["Given"])
    assert scores.rewards[0].tolist() == ([1.0, 0.0, 1.0] if dtype == torch.bool else [1.0, 0.0, 3.0])
    of_set = GivenOfSet(reward.given)(images=IMAGES, prompts=PROMPTS, groups=[0, 0, 0])
    assert of_set == scores.rewards[0].tolist()


def test_infinite_features_are_failures_of_their_images():
    features = torch.tensor([[1.0, 2.0], [2.0, math.inf], [3.0, 4.0]])
    for values in (
        Given(features)(images=IMAGES, prompts=PROMPTS),
        GivenOfSet(features)(images=IMAGES, prompts=PROMPTS, groups=[0, 0, 0]),
    ):
        assert values[0] == 1.0 and isinstance(values[1], InfiniteRewardError) and values[2] == 3.0
    scores = collect(Given(features), Given(features))
    assert scores.failed.tolist() == [[False, True, False]] * 2 and scores.rewards[0, 1].isnan()
    assert scores.features["Given"][1] is None
    assert all(isinstance(error, InfiniteRewardError) for error in scores.errors)
    first, second = map(str, scores.errors)
    assert first == "Reward `Given` has infinite features for the prompt 'a dog'; bound them."
    assert second.startswith("Reward `Given_1` ") and "infinite features for the prompt 'a dog'" in second


@pytest.mark.parametrize(
    ("features", "shown"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(2, 4), r"shape \(2, 4\)"),
        (torch.ones(3, 2, dtype=torch.complex64), "type torch.complex64"),
        ([[1.0]] * 3, "type list"),
    ],
)
def test_features_of_another_shape_are_refused(features, shown):
    message = rf"features` returned something of {shown} for 3 images; return a tensor of shape \(3, number of feat"
    with pytest.raises(RewardError, match=message):
        Given(features)(images=IMAGES, prompts=PROMPTS)
    with pytest.raises(RewardError, match=message):
        GivenOfSet(features)(images=IMAGES, prompts=PROMPTS, groups=[0, 0, 0])
    with pytest.raises(RewardError, match=rf"^`Given.{message}"):  # whatever the failure policy is
        collect(Given(features))
