# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What rewards log in a run: metrics in the log, and more to say of each image under the image."""

import asyncio
import math
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from trainer_helpers import PROMPTS, blue, bright, prompt_set, small_trainer

from trl_marble.rewards import RewardError


def judge(images, prompts, trainer_state, log_metric, log_extra, **kwargs):
    values = bright(images)
    log_metric("judge/confidence", trainer_state.global_step + (1.0 if len(images) == 3 else 0.0))
    log_metric("judge/doubt", math.nan)
    log_extra("reason", [f"{prompt},\nseen" for prompt in prompts])
    log_extra("words", [len(prompt.split()) if "red" in prompt else None for prompt in prompts])
    return values


async def second_judge(images, prompts, **kwargs):
    await asyncio.sleep(0)
    kwargs["log_metric"]("length", len(prompts[0]))
    kwargs["log_extra"]("reason", [None] * len(images))
    return blue(images)


def rows_of(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def table(trainer, name):
    return pd.read_csv(Path(trainer.args.output_dir) / "images" / f"{name}.csv")


SETTINGS = {"log_images": True, "log_images_steps": 1, "num_generations_eval": 2, "max_steps": 2}


@pytest.fixture(scope="module")
def logging_run(tmp_path_factory):
    """Rollout batches of three images and of one, evaluations of five, five and two."""
    trainer = small_trainer(
        tmp_path_factory.mktemp("logging"),
        (judge, second_judge),
        eval_dataset=prompt_set(),
        eval_strategy="steps",
        eval_steps=2,
        rollout_batch_size=3,
        per_device_eval_batch_size=5,
        **SETTINGS,
    )
    trainer.train()
    return trainer


def test_metrics_are_averaged_over_calls_and_logged_by_their_name(logging_run):
    assert rows_of(logging_run, "judge/confidence") == [0.5, 1.5]
    assert all(math.isnan(value) for value in rows_of(logging_run, "judge/doubt"))
    assert len(rows_of(logging_run, "length")) == 2
    assert "judge/confidence" in [row for row in logging_run.state.log_history if "loss" in row][0]


def test_metrics_of_evaluations_have_their_prefix(logging_run):
    assert rows_of(logging_run, "eval_judge/confidence") == [2.0]
    firsts = [PROMPTS[i // 2] for i in (0, 5, 10)]
    assert rows_of(logging_run, "eval_length") == pytest.approx([sum(map(len, firsts)) / 3])
    metrics = logging_run.evaluate(prompt_set().select([1]), metric_key_prefix="test")
    assert metrics["test_length"] == len("a cat") and "test_judge/confidence" in metrics


def test_extras_stand_in_a_table_beside_the_grid(logging_run):
    for step in (1, 2):
        found = table(logging_run, f"train_step_{step:06}")
        logged = ["reason (judge)", "words", "reason (second_judge)"]
        assert list(found) == ["prompt", "image", "judge", "second_judge", *logged]
        assert len(found) == 4 and found["image"].tolist() == [0, 1, 0, 1]
        assert (found["reason (judge)"] == found["prompt"] + ",\nseen").all() and found["judge"].between(0, 1).all()
        assert (found["words"].isna() == ~found["prompt"].str.contains("red")).all()
        assert found["reason (second_judge)"].isna().all()


def test_extras_of_evaluations_too(logging_run):
    found = table(logging_run, "eval_step_000002")
    assert sorted(set(found["prompt"])) == sorted(set(found["reason (judge)"].str.removesuffix(",\nseen")))
    assert found["prompt"].nunique() == logging_run.args.num_images_to_log
    assert len(found) == 2 * logging_run.args.num_images_to_log
    assert found["words"].dropna().isin([2, 3]).all()


def test_extras_make_the_captions_longer(logging_run, tmp_path):
    plain = small_trainer(tmp_path, (bright, blue), rollout_batch_size=3, **SETTINGS)
    plain.train()
    with_extras, without = (
        Image.open(Path(trainer.args.output_dir) / "images/train_step_000001.png") for trainer in (logging_run, plain)
    )
    assert with_extras.height > without.height
    assert not list(tmp_path.glob("images/*.csv"))


def test_logging_changes_nothing_of_a_run(tmp_path):
    def quiet(images, **kwargs):
        return bright(images)

    def loud(images, log_metric, log_extra, **kwargs):
        log_metric("n", len(images))
        log_extra("n", range(len(images)))
        return bright(images)

    trainers = []
    for func in (quiet, loud):
        func.__name__ = "same"
        trainers.append(small_trainer(tmp_path / str(len(trainers)), (func, blue)))
        trainers[-1].train()
    one, other = trainers
    assert all(value.equal(other.weights.trained[name]) for name, value in one.weights.trained.items())


def test_a_wrong_log_stops_training_with_the_line_of_the_reward(tmp_path):
    def careless(images, log_metric, **kwargs):
        log_metric("loss", 1.0)
        return bright(images)

    with pytest.raises(RewardError, match="`careless` raised ValueError: `log_metric` .* 'loss'") as caught:
        small_trainer(tmp_path, (careless, blue)).train()
    assert isinstance(caught.value.__cause__, ValueError)
