# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that compare images, in evaluations of pipelines: a group is the images of one prompt."""

import numpy as np
import pytest
from evaluation_helpers import Unusual, bright, prompt_set, rank_in_prompt, red_only, small_evaluation
from tiny import tiny_sd3

from trl_marble.evaluation import evaluate_pipeline
from trl_marble.rewards import RewardError


REWARDS = [bright, red_only, rank_in_prompt, Unusual()]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd3(t5=False, num_layers=1)


def test_sets_are_scored_when_all_images_are_there_and_again_when_it_is_continued(pipeline, tmp_path) -> None:
    results = evaluate_pipeline(pipeline, REWARDS, prompt_set(), small_evaluation(tmp_path))
    table = results.table
    ranks = table.groupby("prompt")["bright"].rank(method="min") - 1
    np.testing.assert_array_equal(table["rank_in_prompt"], ranks)
    np.testing.assert_allclose(table["Unusual"], (table["bright"] - table["bright"].mean()).abs(), atol=1e-6)
    assert table["Unusual"].std() > 0 and results.failed == dict.fromkeys(results.reward_names, 0)

    seen = []

    def counted(images, **kwargs):
        seen.extend(images)
        return bright(images)

    counted.__name__ = "bright"
    again = evaluate_pipeline(pipeline, [counted, *REWARDS[1:]], prompt_set(), small_evaluation(tmp_path))
    assert seen == [] and again.table.equals(table)


def test_a_set_that_cannot_be_scored_stops_the_evaluation_or_is_masked(pipeline, tmp_path) -> None:
    def judge(images, prompts, groups, **kwargs):
        if broken:
            raise ConnectionError("judge went away")
        return [TimeoutError("late") if prompt == "tree" else 1.0 for prompt in prompts]

    judge.scope, broken = "group", True
    task = [bright, judge], prompt_set()
    with pytest.raises(RewardError, match="judge went away.* evaluate again with the same settings to continue"):
        evaluate_pipeline(pipeline, *task, small_evaluation(tmp_path))
    broken = False
    results = evaluate_pipeline(pipeline, *task, small_evaluation(tmp_path, reward_failure="mask"))
    assert results.failed == {"bright": 0, "judge": 3}
    assert results.table["judge"].isna().sum() == 3 and results.table["bright"].notna().all()
