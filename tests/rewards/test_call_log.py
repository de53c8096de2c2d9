# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Metrics and columns that rewards log in addition to their scores."""

import asyncio
import math
import threading
from decimal import Decimal

import numpy as np
import pytest
import torch
from PIL import Image

from trl_marble.rewards import FrameReward, ModelReward, OCRAccuracy, RewardScorer, Scores
from trl_marble.rewards.call_log import CallLog, column_names


IMAGES = [Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "red")]


@pytest.mark.parametrize(
    "value",
    [1, 1.0, True, Decimal(1), np.float32(1), np.bool_(1), torch.tensor(1.0), torch.tensor([1]), np.array([1])],
)
def test_numbers_of_all_kinds_are_metrics(value):
    log = CallLog(2)
    log.log_metric("confidence", value)
    log.log_metric("confidence", math.nan)
    first, second = log.metrics["confidence"]
    assert first == 1.0 and type(first) is float and math.isnan(second)


@pytest.mark.parametrize("value", [None, "high", "0.5", 1j, [1.0, 2.0], torch.zeros(2), {}])
def test_a_metric_that_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match="`log_metric.'confidence', ...\\)` was called with .*; pass one number"):
        CallLog(2).log_metric("confidence", value)


@pytest.mark.parametrize("name", ["loss", "kl", "epoch", "rewards/bright/mean", "balance/x", "eval_x", "train_loss"])
def test_a_metric_with_the_name_of_one_of_the_trainer_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}', which the trainer uses for its own metrics"):
        CallLog(2).log_metric(name, 1.0)


@pytest.mark.parametrize("function", ["log_metric", "log_extra"])
@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_name_is_a_text(function, name):
    with pytest.raises(TypeError, match=f"`{function}` was called with the name"):
        getattr(CallLog(1), function)(name, 1.0 if function == "log_metric" else [1.0])


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (["a", None], ["a", None]),
        ((1, 2.5), [1, 2.5]),
        (torch.tensor([1, 2]), [1, 2]),
        (np.array([True, False]), [True, False]),
        ([torch.tensor(0.5), np.int64(3)], [0.5, 3]),
        ([{"box": 1}, [1, 2]], ["{'box': 1}", "[1, 2]"]),
    ],
)
def test_extras_are_kept_as_what_can_be_written(values, kept):
    log = CallLog(2)
    log.log_extra("answer", values)
    assert log.extras == {"answer": kept} and [type(v) for v in log.extras["answer"]] == [type(v) for v in kept]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (["a"], ValueError, "was called with 1 values for 2 images; pass one for each"),
        (["a"] * 3, ValueError, "was called with 3 values for 2 images"),
        ("ab", TypeError, "was called with a str; pass a list"),
        (1.0, TypeError, "was called with a float; pass a list"),
        (torch.tensor(1.0), TypeError, "was called with a Tensor; pass a list"),
    ],
)
def test_extras_are_one_value_for_each_image(values, error, message):
    with pytest.raises(error, match=message):
        CallLog(2).log_extra("answer", values)


def test_a_column_is_logged_once_per_call():
    log = CallLog(1)
    log.log_extra("answer", ["a"])
    with pytest.raises(ValueError, match="'answer', ...\\)` was called twice in one call"):
        log.log_extra("answer", ["b"])


def test_many_threads_may_log():
    log, start = CallLog(1), threading.Barrier(8)

    def work(number):
        start.wait(20)
        for i in range(200):
            log.log_metric("n", i)
        log.log_extra(f"thread {number}", [number])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.metrics["n"]) == 1600 and len(log.extras) == 8


def test_columns_of_one_name_get_the_name_of_their_reward():
    assert column_names([("a", "why"), ("b", "why"), ("b", "box")]) == ["why (a)", "why (b)", "box"]


def test_scores_have_the_logs_of_sync_and_async_rewards_for_each_call():
    def sharp(images, number, log_metric, log_extra, **kwargs):
        log_metric("mean", number[0])
        if number[0] == 0:  # not in every call
            log_extra("why", [f"{n}" for n in number])
        return [0.0] * len(images)

    async def judge(images, number, **kwargs):
        await asyncio.sleep(0)
        kwargs["log_metric"]("mean", math.nan)
        kwargs["log_extra"]("why", number)
        return [1.0] * len(images)

    def before(images, prompts, number, trainer_state):  # written before rewards could log
        return [2.0] * len(images)

    scorer = RewardScorer([sharp, judge, before])
    try:
        pending = [scorer.submit(IMAGES, ["a", "b"], {"number": [i, i + 1]}, None) for i in (0, 2)]
        scores = Scores.concatenate([scorer.collect(each) for each in pending])
    finally:
        scorer.close()
    assert not scores.errors
    assert scores.metrics[("sharp", "mean")] == [0.0, 2.0] and len(scores.metrics[("judge", "mean")]) == 2
    assert scores.extras == {("sharp", "why"): ["0", "1", None, None], ("judge", "why"): [0, 1, 2, 3]}


def test_a_wrong_use_is_a_failure_of_the_reward_with_its_own_line():
    def judge(images, log_extra, **kwargs):
        log_extra("why", ["one"])
        return [0.0] * len(images)

    scorer = RewardScorer(judge)
    try:
        (error,) = scorer.collect(scorer.submit(IMAGES, ["a", "b"], {}, None)).errors
    finally:
        scorer.close()
    assert "Reward `judge` raised ValueError: `log_extra('why', ...)` was called with 1 values for 2" in str(error)
    assert isinstance(error.__cause__, ValueError)


def test_logged_values_of_frames_become_one_list_per_video():
    def red(images, log_metric, log_extra, **kwargs):
        values = [image.getpixel((0, 0))[0] for image in images]
        log_metric("frames", len(images))
        log_extra("red", values)
        return values

    def plain(images, prompts, trainer_state):
        return [0] * len(images)

    def wrong(images, log_extra, **kwargs):
        log_extra("red", [0] * 2)

    scorer = RewardScorer([FrameReward(red), FrameReward(plain), FrameReward(wrong)])
    try:
        scores = scorer.collect(scorer.submit([IMAGES, IMAGES[1:]], ["a", "b"], {}, None))
    finally:
        scorer.close()
    assert scores.extras == {("red", "red"): ["[0, 255]", "[255]"]} and scores.metrics == {("red", "frames"): [3.0]}
    (error,) = scores.errors
    assert "`wrong` raised ValueError" in str(error) and "2 values for 3 images" in str(error)


def test_rewards_of_the_package_work_with_log_functions():
    class Constant(ModelReward):
        value_range = "1"

        def load(self):
            return torch.nn.Linear(1, 1)

        def score(self, images, prompts, **columns):
            assert set(columns) == {"tag"}
            return [1.0] * len(images)

    scorer = RewardScorer([Constant(), OCRAccuracy()])
    try:
        scores = scorer.collect(scorer.submit(IMAGES, ["a cat", "a dog"], {"tag": ["x", "y"]}, None))
    finally:
        scorer.close()
    assert not scores.errors and scores.rewards[0].tolist() == [1, 1] and scores.rewards[1].isnan().all()
