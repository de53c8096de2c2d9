# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that compare images are asked about whole sets, once all images are there."""

import asyncio
import functools
import math

import pytest
import torch
from PIL import Image
from trainer_helpers import small_config, small_trainer

from trl_marble import MarbleConfig
from trl_marble.processes import FailingTogether
from trl_marble.rewards import FrameReward, RewardError, RewardScorer, SetReward
from trl_marble.rewards.protocol import reward_center, reward_scope
from trl_marble.rewards.server import RewardServer
from trl_marble.rewards.signatures import check_signatures
from trl_marble.rollout import FailurePolicy, SetImages
from trl_marble.rollout.set_scores import score_sets


def plain(images, **kwargs):
    return [0.5] * len(images)


def shade(images):
    return [image.getpixel((0, 0))[0] for image in images]


class Rank:
    """How many images of its set are darker; keeps its calls."""

    def __init__(self, scope, center=None):
        self.scope, self.calls = scope, []
        if center is not None:
            self.center = center

    def __call__(self, images, prompts, groups, tag, log_extra, **kwargs):
        self.calls.append((shade(images), prompts, groups, tag))
        log_extra(f"by {self.scope}", [f"{group}" for group in groups])
        sets = groups if self.scope == "group" else [0] * len(groups)
        own = list(zip(shade(images), sets, strict=True))
        return [None if value == 0 else sum(o < value and s == own_set for o, s in own) for value, own_set in own]


class Spread(SetReward):
    """Distance to the mean of the batch, of images that are not black."""

    def features(self, images, prompts, tag, log_metric, **kwargs):
        log_metric("seen", len(images))
        return torch.tensor([[float(value) if value else math.nan, 1.0] for value in shade(images)])

    def credit(self, features, groups):
        self.groups = groups.tolist()
        return (features - features.mean(dim=0)).norm(dim=1)


def images_of(*shades, finite=None):
    """Two groups, 7 with the first images and 3, of which the last image is not finite unless it is said."""
    number = len(shades)
    groups = [7 if i < number // 2 else 3 for i in range(number)]
    return SetImages(
        [Image.new("RGB", (2, 2), (value, 0, 0)) for value in shades],
        [f"prompt {group}" for group in groups],
        {"tag": list(range(number))},
        list(range(number)),
        groups,
        torch.tensor([True] * (number - 1) + [False] if finite is None else finite),
    )


def ask(funcs, own, failure="raise", timeout=None):
    scorer = RewardScorer(funcs, timeout)
    try:
        return score_sets(scorer, own, None, FailurePolicy(failure), FailingTogether())
    finally:
        scorer.close()


def test_each_scope_gets_its_whole_sets() -> None:
    in_group, in_batch, spread = Rank("group"), Rank("batch"), Spread()
    scores = ask([plain, in_group, in_batch, spread], images_of(10, 30, 0, 40, 20, 99))
    nan = math.nan
    expected = torch.tensor(
        [
            [nan] * 6,  # an image's reward was asked with its own batch
            [1, 2, nan, 1, 0, nan],  # a black image, to which it does not apply, and one that is not finite
            [1, 3, nan, 4, 2, nan],
            [15, 5, nan, 15, 5, nan],  # from the mean, 25
        ]
    )
    torch.testing.assert_close(scores.rewards, expected, equal_nan=True)
    assert not scores.failed.any() and scores.errors == []
    prompts = ["prompt 7"] * 3 + ["prompt 3"] * 2
    assert in_group.calls == [([10, 30, 0, 40, 20], prompts, [7, 7, 7, 3, 3], [0, 1, 2, 3, 4])]
    assert in_batch.calls == in_group.calls and spread.groups == [7, 7, 3, 3]
    assert scores.extras["Rank", "by group"] == ["7", "7", "7", "3", "3", None]
    assert scores.metrics == {("Spread", "seen"): [5]} and set(scores.seconds) == {"Rank", "Rank_1", "Spread"}


def test_an_image_that_is_there_twice_is_in_its_set_once() -> None:
    own = images_of(10, 30, 30, 40, finite=[True] * 4)._replace(numbers=[0, 1, 1, 2], groups=[0, 0, 0, 0])
    reward = Rank("group")
    assert ask([reward], own).rewards.tolist() == [[0.0, 1.0, 1.0, 2.0]]
    assert reward.calls[0][0] == [10, 30, 40]


def test_without_any_finite_image_nothing_is_asked() -> None:
    rewards = [Rank("group"), Rank("batch"), Spread()]
    assert ask(rewards, images_of(1, 2, finite=[False, False])).rewards.isnan().all()
    assert rewards[0].calls == rewards[1].calls == []


@pytest.mark.parametrize("where", ["call", "features", "credit"])
def test_a_failure_raises_or_is_masked(where) -> None:
    def fail(*args, **kwargs):
        raise ConnectionError("gone")

    class Failing(Spread):
        pass

    if where == "call":
        reward = functools.partial(fail)
        fail.scope = "group"
    else:
        setattr(Failing, where, fail)
        reward = Failing()
    with pytest.raises(RewardError, match=r"raised ConnectionError: gone"):
        ask([reward], images_of(1, 2))
    scores = ask([reward, Rank("batch")], images_of(1, 2, 3, 4), "mask")
    assert scores.failed.tolist() == [[True, True, True, False], [False] * 4]  # nobody was asked about the last
    assert scores.rewards[0].isnan().all() and scores.rewards[1, :3].tolist() == [0, 1, 2]
    assert len(scores.errors) == 1


def test_async_rewards_and_time_limits_are_as_for_any_reward() -> None:
    async def waits(images, groups, **kwargs):
        await asyncio.sleep(60 if slow else 0)
        return groups

    waits.scope, slow = "group", False
    assert ask([waits], images_of(1, 2, 3, 4)).rewards[0, :3].tolist() == [7, 7, 3]
    slow = True
    with pytest.raises(RewardError, match=r"no answer after 0.1 seconds \(`reward_timeout`\)"):
        ask([waits], images_of(1, 2), timeout=0.1)
    assert ask([waits, Rank("group")], images_of(1, 2, 3, 4), "mask", 0.5).failed[0, :3].all()


def test_features_must_be_one_row_per_image_and_finite() -> None:
    class Wrong(Spread):
        def features(self, images, prompts, **kwargs):
            return torch.zeros(len(images))

    class Infinite(Spread):
        def features(self, images, prompts, **kwargs):
            return torch.tensor([[math.inf]] + [[1.0]] * (len(images) - 1))

    with pytest.raises(RewardError, match=r"`Wrong.features` returned something of shape \(3,\) for 3 images"):
        ask([Wrong()], images_of(1, 2, 3, 4))
    with pytest.raises(RewardError, match=r"`Infinite` has infinite features for the prompt 'prompt 7'"):
        ask([Infinite()], images_of(1, 2, 3, 4))
    scores = ask([Infinite()], images_of(1, 2, 3, 4), "mask")
    assert scores.failed.tolist() == [[True, False, False, False]] and scores.rewards[0, 1:3].tolist() == [0, 0]


def test_set_rewards_score_whole_sets_when_they_are_called() -> None:
    own = images_of(10, 30, 0, 40)
    reward = Rank("batch")
    called = Spread()(own.images, own.prompts, own.groups, tag=[0] * 4, log_metric=lambda *_: None)
    assert called == pytest.approx([50 / 3, 10 / 3, math.nan, 40 / 3], nan_ok=True)
    assert (reward_scope(reward), reward_center(reward)) == ("batch", "batch")


def test_scope_and_center_are_attributes() -> None:
    assert (reward_scope(plain), reward_center(plain)) == ("image", "group")
    assert reward_scope(functools.partial(Rank("group"))) == "group"
    assert reward_center(Rank("group")) == "group" and reward_center(Rank("batch")) == "batch"
    assert reward_center(Rank("batch", center="group")) == "group"
    with pytest.raises(ValueError, match=r"`Rank` has the attribute `scope = 'prompt'`; it must be one of 'image'"):
        RewardScorer(Rank("prompt"))
    single = Spread()
    single.scope = "image"
    with pytest.raises(ValueError, match=r"`Spread` is a `SetReward` with `scope = 'image'`"):
        RewardScorer(single)
    with pytest.raises(ValueError, match=r"`Rank` has the attribute `center = 'image'`; it must be one of 'group'"):
        reward_center(Rank("group", center="image"))


def test_what_cannot_compare_images_refuses_to() -> None:
    def compares(images, **kwargs):
        return [0.0] * len(images)

    compares.scope = "group"
    with pytest.raises(ValueError, match=r"`reward` is `compares`, which compares images with each other"):
        FrameReward(compares)
    with pytest.raises(ValueError, match=r"Reward `compares` compares images with each other, and a request"):
        RewardServer(compares, port=0)


def test_parameters_of_rewards_that_compare_are_checked() -> None:
    def no_groups(images, prompts, trainer_state):
        return [0.0] * len(images)

    no_groups.scope = "group"
    with pytest.raises(ValueError, match=r"`no_groups` has the parameters .* does not accept `groups`"):
        check_signatures([no_groups], ["no_groups"], "image", ["prompt"], "train_dataset")
    with pytest.raises(ValueError, match=r"`Spread.features` has the parameters .* no value for `tag`"):
        check_signatures([Spread()], ["Spread"], "image", ["prompt"], "train_dataset")
    check_signatures([Spread(), Rank("group")], ["Spread", "Rank"], "image", ["prompt", "tag"], "train_dataset")
    with pytest.raises(ValueError, match=r"`train_dataset` has a column `groups`"):
        check_signatures([Rank("group")], ["Rank"], "image", ["prompt", "tag", "groups"], "train_dataset")


def test_settings_that_do_not_fit_are_refused_early(tmp_path) -> None:
    settings = {"multi_objective_aggregation": "progress", "num_generations": 2}
    with pytest.raises(ValueError, match=r"`progress_base_images=4` and `num_generations=2` differ.*`Rank`"):
        small_trainer(tmp_path, [plain, Rank("group")], **settings)
    with pytest.raises(ValueError, match=r"`resample_silent_prompts=1` samples a part.*`Rank` \(`scope = 'batch'`\)"):
        small_trainer(tmp_path, [plain, Rank("batch")], resample_silent_prompts=1)
    with pytest.raises(ValueError, match=r"measures progress over all prompts, and `resample_silent_prompts=True`"):
        small_config(tmp_path, multi_objective_aggregation="progress", resample_silent_prompts=True)
    with pytest.raises(ValueError, match=r"`resample_silent_prompts` is -1; it must be at least 0"):
        MarbleConfig(str(tmp_path), use_cpu=True, resample_silent_prompts=-1)
