# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards of images on the frames of videos, and rewards of videos."""

import asyncio
import functools
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trl_marble.rewards import (
    FrameReward,
    ModelReward,
    RemoteReward,
    RewardError,
    RewardScorer,
    VLMJudge,
    jpeg_compressibility,
    load_reward,
    reward_names,
)
from trl_marble.rewards.protocol import check_media
from trl_marble.rewards.server import RewardServer


# Two videos of five frames, of red 0, 10, 20, 30, 40 and of red 100, 110, ...
VIDEOS = [[Image.new("RGB", (4, 2), (start + 10 * k, 0, 0)) for k in range(5)] for start in (0, 100)]
PROMPTS = ["a cat", "a dog"]


def red(images, **kwargs):
    """The red of the first pixel, from 0 to 255."""
    return [image.getpixel((0, 0))[0] for image in images]


def motion(videos, **kwargs):
    """Mean absolute difference between a frame and the next."""
    return [np.abs(np.diff([np.asarray(frame, dtype=float) for frame in video], axis=0)).mean() for video in videos]


def score(*reward_funcs, **columns):
    """What a scorer says of the two videos."""
    scorer = RewardScorer(list(reward_funcs))
    try:
        return scorer.collect(scorer.submit(VIDEOS, PROMPTS, columns, trainer_state=None))
    finally:
        scorer.close()


def test_a_reward_of_videos_gets_lists_of_frames():
    received = {}

    def seen(**kwargs):
        received.update(kwargs)
        return [1, None]

    scores = score(seen, motion, tag=["x", "y"])
    assert set(received) == {"videos", "prompts", "tag", "trainer_state", "log_metric", "log_extra"}
    assert received["videos"] == VIDEOS
    assert scores.rewards[0, 0] == 1 and scores.rewards[0, 1].isnan()
    assert scores.rewards[1].tolist() == pytest.approx([10 / 3, 10 / 3])  # of three channels one


def test_a_reward_of_tensors_gets_one_tensor_of_all_videos():
    def red_of_the_third(videos, **kwargs):
        assert videos.shape == (2, 5, 3, 2, 4)
        return videos[:, 2, 0].mean(dim=(1, 2))

    red_of_the_third.image_type = "pt"
    assert score(red_of_the_third).rewards[0].tolist() == pytest.approx([20 / 255, 120 / 255])


def test_a_reward_cannot_change_the_frames_of_the_next_one():
    def greedy(videos, **kwargs):
        for video in videos:
            video.clear()
        return [0, 0]

    def modest(videos, **kwargs):
        return [len(video) for video in videos]

    assert score(greedy, modest).rewards[1].tolist() == [5, 5]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 8])
def test_frames_are_averaged(num_frames):
    assert score(FrameReward(red, num_frames)).rewards[0].tolist() == [20, 120]


def test_only_evenly_spaced_frames_are_scored_with_the_prompt_and_columns_of_their_video():
    received = {}

    def seen(**kwargs):
        received.update(kwargs)
        return list(range(4))

    state = object()
    values = FrameReward(seen, num_frames=2)(videos=VIDEOS, prompts=PROMPTS, tag=["x", "y"], trainer_state=state)
    assert values == [0.5, 2.5]
    assert received["images"] == [VIDEOS[0][0], VIDEOS[0][4], VIDEOS[1][0], VIDEOS[1][4]]
    assert received["prompts"] == ["a cat", "a cat", "a dog", "a dog"] and received["tag"] == ["x", "x", "y", "y"]
    assert received["trainer_state"] is state and set(received) == {"images", "prompts", "tag", "trainer_state"}


def test_videos_of_different_lengths_are_averaged_over_their_own_frames():
    assert FrameReward(red)(videos=[VIDEOS[0][:2], VIDEOS[1]], prompts=PROMPTS) == [5, 120]


def test_frames_that_it_does_not_apply_to_do_not_count():
    def late(images, **kwargs):
        return [None if value in (0, 10, 20) else float("nan") if value == 30 else value for value in red(images)]

    assert FrameReward(late)(videos=VIDEOS, prompts=PROMPTS) == [40, 120]
    assert FrameReward(late)(videos=[VIDEOS[0][:4], VIDEOS[1]], prompts=PROMPTS) == [None, 120]


def test_a_frame_that_failed_fails_its_video_only():
    def blind(images, **kwargs):
        return [ValueError("too bright") if value == 130 else value for value in red(images)]

    scores = score(FrameReward(blind))
    assert scores.failed.tolist() == [[False, True]] and scores.rewards[0, 0] == 20 and scores.rewards[0, 1].isnan()
    assert "Reward `blind` raised ValueError: too bright (one image for 'a dog')" in str(scores.errors[0])


def test_a_reward_that_raises_fails_for_all_videos():
    def broken(images, **kwargs):
        raise OSError("no such file")

    scores = score(FrameReward(broken))
    assert scores.failed.all() and "no such file" in str(scores.errors[0])


def test_one_value_per_video_instead_of_frame_is_refused():
    def wrong(images, **kwargs):
        return [1.0, 2.0]

    with pytest.raises(RewardError, match="`wrong` returned 2 values for 10 images"):
        FrameReward(wrong)(videos=VIDEOS, prompts=PROMPTS)


@pytest.mark.parametrize("kind", ["function", "object", "partial"])
def test_an_async_reward_shares_the_event_loop(kind):
    async def later(images, **kwargs):
        await asyncio.sleep(0)
        return red(images)

    class Later:
        async def __call__(self, images, **kwargs):
            return await later(images)

    inner = {"function": later, "object": Later(), "partial": functools.partial(later, extra=1)}[kind]
    scorer = RewardScorer([FrameReward(inner)])
    try:
        scores = scorer.collect(scorer.submit(VIDEOS, PROMPTS, {}, None))
        assert scores.rewards[0].tolist() == [20, 120]
        assert not scorer._calls.threads  # none was needed
    finally:
        scorer.close()


def test_a_reward_server_scores_the_frames():
    def red_of_red(images, prompts, tag, **kwargs):
        return [None if t == "y" and value > 120 else value for t, value in zip(tag, red(images), strict=True)]

    with RewardServer(red_of_red, port=0) as server:
        remote = RemoteReward(server.url, "red_of_red", batch_size=3)
        scores = score(FrameReward(remote), tag=["x", "y"])
    assert not scores.errors and scores.rewards[0].tolist() == [20, 110]  # of 100, 110 and 120


def test_a_reward_of_tensors_gets_frames_as_one():
    def red_of_tensor(images, **kwargs):
        assert images.shape == (10, 3, 2, 4)
        return images[:, 0].mean(dim=(1, 2)).numpy()

    red_of_tensor.image_type = "pt"
    assert score(FrameReward(red_of_tensor)).rewards[0].tolist() == pytest.approx([20 / 255, 120 / 255])


class _Scale(ModelReward):
    """Red times a weight, for prompts of cats."""

    value_range = "0 to 510"
    seen: ClassVar[list] = []

    def load(self):
        return nn.Linear(1, 1)

    def applies(self, prompts, **columns):
        return ["cat" in prompt for prompt in prompts]

    def score(self, images, prompts, **columns):
        self.seen.append((self.model.weight.dtype, len(images)))
        return [2.0 * value for value in red(images)]


def test_a_model_moves_to_the_trainers_device_and_back():
    inner = _Scale(batch_size=3, offload=True)
    reward = FrameReward(inner)
    scorer = RewardScorer([reward])
    try:
        scorer.to(torch.device("meta"), torch.bfloat16)
        assert inner.device.type == "meta"
        scorer.to(torch.device("cpu"), torch.bfloat16)
        scores = scorer.collect(scorer.submit(VIDEOS, PROMPTS, {}, None))
        assert scores.rewards[0, 0] == 40 and scores.rewards[0, 1].isnan()
        assert inner.seen == [(torch.bfloat16, 3), (torch.bfloat16, 2)]
        inner.model.to("meta")
        with pytest.raises(NotImplementedError, match="meta"):  # the weights are asked back, and have no values here
            scorer.release()
    finally:
        scorer.close()
    assert reward.to("cpu") is reward and FrameReward(red).to("cpu").release() is None


def test_a_partial_of_a_reward_of_tensors_gets_a_tensor():
    def is_tensor(images, weight, **kwargs):
        return [weight * isinstance(images, torch.Tensor)] * len(images)

    is_tensor.image_type = "pt"
    assert score(FrameReward(functools.partial(is_tensor, weight=2))).rewards.tolist() == [[2, 2]]


def test_it_has_the_name_of_the_reward_in_it(monkeypatch, tmp_path):
    rewards = [FrameReward(red), FrameReward("pickscore"), FrameReward(functools.partial(red)), red]
    assert reward_names(rewards) == ["red", "PickScore", "red_1", "red_2"]
    (tmp_path / "own_video_rewards.py").write_text(
        "from trl_marble.rewards import FrameReward\non_frames = FrameReward('jpeg_compressibility', num_frames=2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = load_reward("own_video_rewards.on_frames")  # as the command line and configuration files name it
    del sys.modules["own_video_rewards"]
    assert reward_names([reward]) == ["jpeg_compressibility"] and reward.num_frames == 2
    assert reward(videos=VIDEOS, prompts=PROMPTS)[0] < 0


def test_refuses_rewards_that_cannot_score_frames():
    with pytest.raises(ValueError, match="`num_frames` must be at least 1, got 0"):
        FrameReward(red, num_frames=0)
    with pytest.raises(TypeError, match="`reward` is 3; it must be a callable that scores images"):
        FrameReward(3)
    with pytest.raises(ValueError, match="Did you mean 'pickscore'"):
        FrameReward("pikscore")
    for whole in (motion, FrameReward(red)):
        with pytest.raises(ValueError, match="scores videos itself; pass it without `FrameReward`"):
            FrameReward(whole)


IMAGE_REWARDS = [
    red,
    functools.partial(red, extra=1),
    jpeg_compressibility,
    _Scale(),
    load_reward("pickscore"),
    load_reward("geneval"),
    RemoteReward("http://127.0.0.1:1", "red"),
    VLMJudge("judge", "http://127.0.0.1:1"),
]


@pytest.mark.parametrize("reward", IMAGE_REWARDS, ids=lambda reward: reward_names([reward])[0])
def test_a_reward_of_images_is_refused_for_a_pipeline_of_videos(reward):
    names = reward_names([reward])
    with pytest.raises(ValueError, match=rf"Reward `{names[0]}` scores images, and Wan makes videos. Pass `Frame"):
        check_media([reward], names, "video", "Wan")
    check_media([reward], names, "image", "SD3")
    check_media([FrameReward(reward)], names, "video", "Wan")


@pytest.mark.parametrize("reward", [motion, FrameReward(red)])
def test_a_reward_of_videos_is_refused_for_a_pipeline_of_images(reward):
    names = reward_names([reward])
    with pytest.raises(ValueError, match=rf"Reward `{names[0]}` scores videos, and SD3 makes images"):
        check_media([reward], names, "image", "SD3")
    check_media([reward], names, "video", "Wan")
    with pytest.raises(ValueError, match="a client of the server makes images"):
        RewardServer(reward, port=0)


def test_a_reward_without_a_parameter_for_media_is_accepted():
    def either(images=None, videos=None, **kwargs):
        return []

    def texts(prompts, **kwargs):
        return []

    for reward in (either, texts, max):
        for output in ("image", "video"):
            check_media([reward], ["reward"], output, "Pipeline")
