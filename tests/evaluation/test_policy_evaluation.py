# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the trainer's evaluations say of rewards, beside what `evaluate_pipeline` says of the same images."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import tiny_sd3
from trainer_helpers import bright, small_trainer

from trl_marble.evaluation import EvaluationConfig, evaluate_pipeline


REPEATS = 3
PROMPTS = ["a red dog", "a cat", "red hat", "a red dog"]  # two rows of one text


def partly(images, prompts, **kwargs):
    """Applies to dogs and to the first hat: prompts with different numbers of valid images."""
    return [
        value if prompt == "a red dog" or (prompt == "red hat" and prompts[place - 1] != prompt) else None
        for place, (prompt, value) in enumerate(zip(prompts, bright(images), strict=True))
    ]


def trainer_of(folder, prompts, **settings):
    trainer = small_trainer(
        folder,
        (bright, partly),
        eval_dataset=Dataset.from_dict({"prompt": prompts}),
        num_generations_eval=REPEATS,
        per_device_eval_batch_size=12,
        **settings,
    )
    generator = torch.Generator().manual_seed(1)
    for value in trainer.average.state_dict().values():
        value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return trainer


def test_the_trainer_and_the_command_say_the_same(tmp_path):
    trainer = trainer_of(tmp_path / "run", PROMPTS)
    metrics = trainer.evaluate()
    trainer.save_model()
    config = EvaluationConfig(
        str(tmp_path / "evaluation"),
        adapter=str(tmp_path / "run"),
        num_generations=REPEATS,
        seed=trainer.args.seed,
        num_inference_steps=2,
        max_sequence_length=16,
        batch_size=12,
    )
    results = evaluate_pipeline(
        tiny_sd3(num_layers=1), [bright, partly], Dataset.from_dict({"prompt": PROMPTS}), config
    )
    assert results.table["partly"].notna().sum() == 7
    for name, (mean, error) in results.summary().items():
        assert error > 0
        assert metrics[f"eval_rewards/{name}/mean"] == pytest.approx(mean, rel=1e-4)
        assert metrics[f"eval_rewards/{name}/standard_error"] == pytest.approx(error, rel=1e-3)
    assert metrics["eval_drift/diversity"] == pytest.approx(results.diversity()[0], rel=1e-3)
    evaluation = trainer.evaluations[-1]
    assert evaluation.groups.tolist() == results.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3


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
