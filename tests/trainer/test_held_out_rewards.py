# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that evaluations score and nothing is trained on; diversity, which nothing is trained on either."""

import logging
import math

import numpy as np
import pytest
import torch
from trainer_helpers import blue, bright, prompt_set, small_trainer

from trl_marble.rollout.diversity import group_diversity, thumbnails


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_generations_eval": 2}


def dark(images, **kwargs):
    """Minus the brightness."""
    return [-value for value in bright(images)]


def counted(calls):
    def held_out(images, prompts, tag, trainer_state):
        calls.append((trainer_state.global_step, len(images)))
        return [float(len(prompt)) if "red" in prompt else None for prompt in prompts]

    return held_out


def metrics_of(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def test_held_out_rewards_are_scored_in_evaluations_only(tmp_path):
    calls = []
    trainer = small_trainer(
        tmp_path / "with", eval_dataset=prompt_set(), eval_reward_funcs=[counted(calls), dark], **EVALUATED
    )
    trainer.train()
    assert trainer.held_out_names == ["held_out", "dark"]
    assert {step for step, _ in calls} == {0, 2} and sum(number for _, number in calls) == 2 * 12
    for evaluation in trainer.evaluations:
        assert evaluation.reward_names == ["bright", "blue", "held_out", "dark"]
        assert evaluation.rewards.shape == (4, 12)
        torch.testing.assert_close(evaluation.rewards[3], -evaluation.rewards[0])
    assert metrics_of(trainer, "eval_rewards/held_out/valid") == pytest.approx([0.5, 0.5])
    assert metrics_of(trainer, "eval_rewards/held_out/mean") == pytest.approx([np.mean([9, 7, 7])] * 2)
    assert len(metrics_of(trainer, "eval_rewards/dark/standard_error")) == 2
    assert not [key for row in trainer.state.log_history for key in row if key.startswith("rewards/dark")]
    assert trainer.run_state.identity["rewards"] == ["bright", "blue"]

    without = small_trainer(tmp_path / "without", eval_dataset=prompt_set(), **EVALUATED)
    without.train()
    assert without.held_out_names == []
    for name, parameter in trainer.weights.trained.items():
        assert torch.equal(parameter, without.weights.trained[name]), name


def test_names_are_unique_over_both_lists(tmp_path):
    def other():
        def bright(images, **kwargs):
            return [0.0] * len(images)

        return bright

    trainer = small_trainer(tmp_path, eval_dataset=prompt_set(), eval_reward_funcs=[other(), other()])
    assert trainer.scorer.names == ["bright", "blue"] and trainer.held_out_names == ["bright_1", "bright_2"]
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/bright_2/mean"] == 0 < metrics["eval_rewards/bright/mean"]


def test_a_single_held_out_reward_needs_no_list(tmp_path):
    trainer = small_trainer(
        tmp_path, eval_dataset=prompt_set(), eval_reward_funcs="trl_marble.rewards.jpeg_compressibility"
    )
    assert trainer.held_out_names == ["jpeg_compressibility"]
    assert trainer.evaluate()["eval_rewards/jpeg_compressibility/mean"] < 0


def test_bad_held_out_rewards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`eval_reward_funcs` has `blue`, which `reward_funcs` has too"):
        small_trainer(tmp_path, eval_dataset=prompt_set(), eval_reward_funcs=[dark, blue])
    with pytest.raises(ValueError, match="has `OCRAccuracy`, which"):  # made anew from its name each time
        small_trainer(tmp_path, reward_funcs=["ocr"], eval_dataset=prompt_set(), eval_reward_funcs="ocr")
    with pytest.raises(TypeError, match=r"`eval_reward_funcs\[0\]` is 3"):
        small_trainer(tmp_path, eval_dataset=prompt_set(), eval_reward_funcs=[3])


def test_held_out_rewards_without_an_evaluation_set_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path, eval_reward_funcs=dark)
    assert "Held-out rewards (dark)" in caplog.text and "eval_dataset" in caplog.text


def test_a_failing_held_out_reward_is_treated_as_others_are(tmp_path):
    def fails(images, **kwargs):
        return [ConnectionError("went away"), *bright(images[1:])]

    trainer = small_trainer(
        tmp_path,
        eval_dataset=prompt_set(),
        eval_reward_funcs=[fails],
        reward_failure="mask",
        per_device_eval_batch_size=12,
        num_generations_eval=2,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/fails/failed"] == 1 and metrics["eval_rewards/bright/failed"] == 0
    assert metrics["eval_rewards/fails/valid"] == pytest.approx(11 / 12)


def test_diversity_is_that_of_the_images_of_each_prompt(tmp_path):
    seen = []

    def keep(images, **kwargs):
        seen.extend(images)
        return bright(images)

    trainer = small_trainer(
        tmp_path, [bright, keep], eval_dataset=prompt_set(), max_steps=1, log_images=False, **EVALUATED
    )
    trainer.train()
    at_start, rollout, at_end = seen[:12], seen[12:16], seen[16:]
    for key, images in (("drift/diversity", [rollout]), ("eval_drift/diversity", [at_start, at_end])):
        values = [group_diversity(thumbnails(part), torch.arange(len(part)) // 2).mean().item() for part in images]
        assert metrics_of(trainer, key) == pytest.approx(values) and min(values) > 0


def test_one_image_a_prompt_has_no_diversity(tmp_path):
    trainer = small_trainer(tmp_path, eval_dataset=prompt_set(), num_generations_eval=1)
    metrics = trainer.evaluate()
    assert "eval_drift/diversity" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
