# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the trainer's evaluations say of rewards, and which of their images are kept."""

import math

from datasets import Dataset
from trainer_helpers import bright, small_trainer


PROMPTS = ["a red dog", "a cat", "red hat", "a red dog"]  # two rows of one text


def trainer_of(folder, prompts):
    dataset = Dataset.from_dict({"prompt": prompts})
    return small_trainer(folder, bright, eval_dataset=dataset, num_generations_eval=3, per_device_eval_batch_size=12)


def test_one_prompt_has_a_mean_and_no_standard_error(tmp_path):
    metrics = trainer_of(tmp_path, ["a red dog"] * 2).evaluate()
    assert metrics["eval_rewards/bright/mean"] > 0
    assert math.isnan(metrics["eval_rewards/bright/standard_error"])


def test_images_are_kept_of_the_first_and_the_latest_evaluation(tmp_path):
    trainer = trainer_of(tmp_path, PROMPTS)
    for _ in range(4):
        trainer.evaluate()
    assert [bool(evaluation.gallery) for evaluation in trainer.evaluations] == [True, False, False, True]
    assert len({evaluation.rewards.shape for evaluation in trainer.evaluations}) == 1
