# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Trains, saves, and evaluates the same weights twice: in the trainer, and as a file on a fresh pipeline."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_sd3
from trainer_helpers import bright, small_trainer

from trl_marble import MarbleNFTTrainer
from trl_marble.evaluation import EvaluationConfig, EvaluationResults, evaluate_pipeline


REPEATS = 3
PROMPTS = ["a red dog", "a cat", "red hat", "a red dog"]  # two rows of one text


def partly(images, prompts, **kwargs):
    """Applies to dogs and to the first hat of a batch: prompts with different numbers of valid images."""
    return [
        value if prompt == "a red dog" or (prompt == "red hat" and "red hat" not in prompts[:place]) else None
        for place, (prompt, value) in enumerate(zip(prompts, bright(images), strict=True))
    ]


REWARDS = (bright, partly)


def make_pipeline(bf16_base: bool = False):
    pipeline = tiny_sd3(num_layers=1)
    return pipeline.to(torch.bfloat16) if bf16_base else pipeline


def train(
    folder: Path, lora: dict[str, Any] | None = None, bf16_base: bool = False, batch_size: int = 5, **settings: Any
) -> MarbleNFTTrainer:
    """Two optimizer steps, after which the averaged weights are neither the trained nor the base model's."""
    trainer = small_trainer(
        folder / "run",
        REWARDS,
        pipeline=make_pipeline(bf16_base),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=None if lora is None else LoraConfig(**lora),
        num_generations_eval=REPEATS,
        per_device_eval_batch_size=batch_size,
        learning_rate=0.05,
        **settings,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def evaluate_file(folder: Path, bf16_base: bool = False, batch_size: int = 5, **settings: Any) -> EvaluationResults:
    """What `trl-marble eval` does with the adapter that was saved."""
    config = EvaluationConfig(
        str(folder / "evaluation"),
        adapter=str(folder / "run"),
        num_generations=REPEATS,
        seed=settings.get("seed", 42),
        num_inference_steps=2,
        max_sequence_length=16,
        batch_size=batch_size,
        bf16=settings.get("bf16", False),
    )
    return evaluate_pipeline(make_pipeline(bf16_base), list(REWARDS), Dataset.from_dict({"prompt": PROMPTS}), config)


def evaluate_both(folder: Path, lora: dict[str, Any] | None = None, **settings: Any) -> tuple[dict, dict]:
    """What the trainer and the file on a fresh pipeline say, in the same words."""
    trainer = train(folder, lora, **settings)
    return describe_trainer(trainer), describe(evaluate_file(folder, **settings))


def describe_trainer(trainer: MarbleNFTTrainer) -> dict[str, Any]:
    """What an evaluation of the trainer says."""
    metrics = trainer.evaluate()
    return {
        "rewards": dict(zip([f.__name__ for f in REWARDS], trainer.evaluations[-1].rewards.tolist(), strict=True)),
        "mean": {f.__name__: metrics[f"eval_rewards/{f.__name__}/mean"] for f in REWARDS},
        "standard_error": {f.__name__: metrics[f"eval_rewards/{f.__name__}/standard_error"] for f in REWARDS},
        "diversity": metrics["eval_drift/diversity"],
        "kl": trainer.evaluations[-1].kl.tolist(),
        "mean_kl": metrics["eval_kl"],
        "groups": trainer.evaluations[-1].groups.tolist(),
    }


def describe(results: EvaluationResults) -> dict[str, Any]:
    """What an evaluation of a file says."""
    summary = results.summary()
    return {
        "rewards": {name: results.table[name].tolist() for name in summary},
        "mean": {name: mean for name, (mean, _) in summary.items()},
        "standard_error": {name: error for name, (_, error) in summary.items()},
        "diversity": results.diversity()[0],
        "kl": results.table["kl"].tolist(),
        "mean_kl": results.kl_to_base()[0],
        "groups": results.groups.tolist(),
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Equal to the last bit; as JSON, in which NaN equals NaN."""
    assert first.keys() == second.keys()
    for key in first:
        assert json.dumps(first[key]) == json.dumps(second[key]), key
