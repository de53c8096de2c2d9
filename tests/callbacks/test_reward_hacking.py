# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A real run that trains on brightness while darkness is watched, and what the callback says of it."""

import logging
from pathlib import Path

import pytest
from trainer_helpers import bright, prompt_set, small_trainer

from trl_marble import RewardHackingCallback
from trl_marble.callbacks.reward_hacking import find_signals
from trl_marble.shapeworld import load_pipeline, load_prompts


NAMES, HELD_OUT = ["bright", "blue"], ["dark", "sharp"]


def dark(images, **kwargs):
    """Minus the brightness: falls as surely as the trained reward rises."""
    return [-value for value in bright(images)]


def hacked(folder, callback, max_steps=12, held_out=(dark,)):
    """ShapeWorld soon gets brighter at this learning rate: by six standard errors at step 6, with three seeds."""
    return small_trainer(
        folder,
        [bright],
        pipeline=load_pipeline(),
        train_dataset=load_prompts("train"),
        eval_dataset=load_prompts("test").select(range(0, 48, 6)),
        eval_reward_funcs=list(held_out),
        callbacks=[callback],
        max_steps=max_steps,
        num_inference_steps=4,
        max_sequence_length=None,
        learning_rate=5e-3,
        per_device_train_batch_size=24,
        num_generations=8,
        old_policy_preset=0,
        weight_ema_decay=0.0,
        beta=0.0,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        num_generations_eval=2,
        per_device_eval_batch_size=16,
        save_strategy="steps",
        save_steps=100,
    )


def said(caplog):
    return [record.message for record in caplog.records if "Reward hacking" in record.message]


@pytest.mark.slow
def test_a_hacked_run_stops_with_a_checkpoint_and_goes_on_when_resumed(tmp_path, caplog):
    stopped = hacked(tmp_path, RewardHackingCallback("stop"))
    stopped.train()
    step = stopped.state.global_step
    assert 2 <= step < 12 and step % 2 == 0
    (message,) = said(caplog)
    assert message.startswith(f"Reward hacking at step {step}: held-out `dark` fell from -0.21")
    for part in ("`bright` rose from 0.21", "standard errors", "Training stops here", "raise `beta`"):
        assert part in message
    first, *_, last = [row for row in stopped.state.log_history if "eval_rewards/dark/mean" in row]
    errors = [row["eval_rewards/dark/standard_error"] for row in (first, last)]
    fall = first["eval_rewards/dark/mean"] - last["eval_rewards/dark/mean"]
    assert fall >= 2 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    assert (Path(stopped.args.output_dir) / f"checkpoint-{step}").is_dir()

    caplog.clear()
    resumed = hacked(tmp_path, RewardHackingCallback("stop"), max_steps=step + 2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == step + 2
    again = [row for row in resumed.state.log_history if "eval_rewards/dark/mean" in row]
    assert again[0] == first and len(again) == step // 2 + 3  # one more at the start of the resumed run
    assert said(caplog) == []  # was said before


def entry(step=0, diversity=0.2, **means):
    """An evaluation's row of the log, with standard errors of 0.01."""
    row = {"step": step, "eval_drift/diversity": diversity}
    for name, mean in means.items():
        row |= {f"eval_rewards/{name}/mean": mean, f"eval_rewards/{name}/standard_error": 0.01}
    return row


def signals(first, now, threshold=2.0, min_diversity=0.7):
    found = find_signals(first, now, NAMES, HELD_OUT, threshold=threshold, min_diversity=min_diversity)
    return [signal.fallen for signal in found]


BEFORE = entry(bright=0.5, blue=0.5, dark=0.5, sharp=0.5)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ({"bright": 0.6, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, ["dark"]),
        ({"bright": 0.6, "blue": 0.6, "dark": 0.4, "sharp": 0.4}, ["dark", "sharp"]),
        ({"bright": 0.6, "blue": 0.5, "dark": 0.6, "sharp": 0.5}, []),  # both rise
        ({"bright": 0.5, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, []),  # falls alone: a bad run, not a hacked one
        ({"bright": 0.4, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, []),
        ({"bright": 0.527, "blue": 0.5, "dark": 0.4, "sharp": 0.5}, []),  # 1.9 standard errors of the difference
        ({"bright": 0.529, "blue": 0.5, "dark": 0.471, "sharp": 0.5}, ["dark"]),  # 2.1
        ({"bright": 0.6, "blue": 0.5, "dark": 0.473, "sharp": 0.5}, []),
        ({"bright": float("nan"), "blue": 0.5, "dark": 0.1, "sharp": 0.5}, []),
        ({"bright": 0.9, "blue": 0.5, "dark": float("nan"), "sharp": 0.5}, []),
    ],
)
def test_a_signal_needs_a_clear_rise_and_a_clear_fall(now, expected):
    assert signals(BEFORE, entry(step=3, **now)) == expected


def test_the_threshold_is_in_standard_errors_of_the_difference():
    now = entry(bright=0.6, blue=0.5, dark=0.4, sharp=0.5)  # +-7.07 of them
    assert signals(BEFORE, now, threshold=7.0) == ["dark"] and signals(BEFORE, now, threshold=7.1) == []


def test_diversity_is_a_signal_of_its_own():
    assert signals(BEFORE, entry(diversity=0.13)) == ["diversity"]
    assert signals(BEFORE, entry(diversity=0.15)) == []
    assert signals(BEFORE, entry(diversity=0.13), min_diversity=0.5) == []
    without = {key: value for key, value in BEFORE.items() if "diversity" not in key}
    assert signals(without, entry(diversity=0.0)) == []


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"action": "halt"}, "`action` is 'halt'"),
        ({"threshold": 0}, "`threshold` is 0"),
        ({"threshold": float("inf")}, "`threshold` is inf"),
        ({"min_diversity": 1.0}, "`min_diversity` is 1.0"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        RewardHackingCallback(**settings)


def test_what_is_missing_is_said_at_the_start(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        small_trainer(tmp_path, callbacks=[RewardHackingCallback()], max_steps=1).train()
    assert "`eval_strategy` is 'no'" in caplog.text
    caplog.clear()
    evaluated = {"eval_dataset": prompt_set(), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    small_trainer(tmp_path, callbacks=[RewardHackingCallback()], **evaluated).train()
    assert "watches diversity only" in caplog.text
    caplog.clear()
    small_trainer(tmp_path, callbacks=[RewardHackingCallback()], eval_reward_funcs=dark, **evaluated).train()
    assert "RewardHackingCallback" not in caplog.text


def test_an_evaluation_before_training_or_of_another_name_is_let_pass(tmp_path, caplog):
    trainer = small_trainer(
        tmp_path, callbacks=[RewardHackingCallback()], eval_dataset=prompt_set(), eval_reward_funcs=dark, max_steps=1
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate(metric_key_prefix="test")
    assert said(caplog) == []
