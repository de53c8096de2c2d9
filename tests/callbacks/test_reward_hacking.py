# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A real run that trains on brightness while darkness is watched, and what the callback says of it."""

from pathlib import Path

import pytest
from trainer_helpers import bright, prompt_set, small_config, small_trainer

from trl_marble import RewardHackingCallback
from trl_marble.callbacks.hacking_signals import HackingSignal
from trl_marble.callbacks.reward_hacking import advise
from trl_marble.shapeworld import load_pipeline, load_prompts


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
    return [record.message for record in caplog.records if "eward hacking at step" in record.message]


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
    assert not any("`dark` fell" in message for message in said(caplog))  # was said before


def test_the_advice_is_about_the_setting_that_decides_the_drift(tmp_path):
    signal = HackingSignal("drift", None, "")
    assert "raise `beta` (0.2 now), or" in advise(signal, small_config(tmp_path, beta=0.2), 0, [])
    advice = advise(signal, small_config(tmp_path, beta=0.2, kl_target=0.03), 0, [])
    assert "lower `kl_target` (0.03 now; `beta` follows it), or" in advice and "raise" not in advice


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"action": "halt"}, "`action` is 'halt'"),
        ({"threshold": 0}, "`threshold` is 0"),
        ({"threshold": float("inf")}, "`threshold` is inf"),
        ({"min_diversity": 1.0}, "`min_diversity` is 1.0"),
        ({"max_drift": 0.0}, "`max_drift` is 0.0"),
        ({"max_velocity_growth": 1.0}, "`max_velocity_growth` is 1.0"),
        ({"window": 1}, "`window` is 1"),
        ({"step_threshold": -1.0}, "`step_threshold` is -1.0"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        RewardHackingCallback(**settings)


def test_one_line_says_that_there_are_no_evaluations(tmp_path, caplog):
    def lines():
        return [record.message for record in caplog.records if "RewardHackingCallback" in record.message]

    small_trainer(tmp_path, callbacks=[RewardHackingCallback()], max_steps=1).train()
    (line,) = lines()
    assert "watches the logged steps only" in line and "`eval_strategy='no'`" in line
    caplog.clear()
    small_trainer(tmp_path, callbacks=[RewardHackingCallback()], max_steps=1, logging_strategy="no").train()
    assert "has nothing to watch" in lines()[0]
    caplog.clear()
    evaluated = {"eval_dataset": prompt_set(), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    small_trainer(tmp_path, callbacks=[RewardHackingCallback()], **evaluated).train()
    assert lines() == []


def cooling(images, trainer_state, **kwargs):
    """Falls with each step, and differs between the images of a prompt."""
    return [place % 2 - trainer_state.global_step for place in range(len(images))]


def warming(images, trainer_state, **kwargs):
    return [place % 2 + trainer_state.global_step for place in range(len(images))]


def drifting(folder, action, **overrides):
    """No evaluations. Two steps are a window, so that the rewards of steps 3 and 4 are compared with the first two."""
    callback = RewardHackingCallback(action, window=2, step_threshold=1.5, max_drift=1e-12)
    return small_trainer(
        folder,
        (cooling, warming),
        callbacks=[callback],
        beta=1e-4,
        learning_rate=1e-2,
        **{"save_strategy": "steps", "save_steps": 1} | overrides,
    )


def test_a_run_without_evaluations_is_watched_by_its_steps_and_a_resumed_one_repeats_nothing(tmp_path, caplog):
    drifting(tmp_path, "warn", max_steps=4).train()
    drift, fallen = said(caplog)
    assert drift.startswith("A sign of reward hacking at step 2: the KL to the base model is ")
    assert "raise `beta` (0.0001 now), or lower `learning_rate` (0.01)" in drift
    assert "There is no checkpoint from before" in drift
    assert fallen.startswith("Reward hacking at step 4: trained `cooling` fell from 0.0000 to -2.000")
    assert "while `warming` rose from 1.000 to 3.000" in fallen
    assert f"go back to is `{tmp_path / 'checkpoint-2'}`" in fallen

    caplog.clear()
    drifting(tmp_path, "warn", max_steps=6).train(resume_from_checkpoint=True)
    assert said(caplog) == []


def test_steps_stop_a_run_with_an_evaluation_and_a_checkpoint(tmp_path, caplog):
    evaluated = {"eval_dataset": prompt_set().select(range(2)), "eval_strategy": "steps", "eval_steps": 100}
    trainer = drifting(tmp_path, "stop", max_steps=6, save_steps=100, num_generations_eval=1, **evaluated)
    trainer.train()
    assert [evaluation.step for evaluation in trainer.evaluations] == [2]
    assert trainer.state.global_step == 2 and (tmp_path / "checkpoint-2").is_dir()
    assert "Training stops here" in said(caplog)[0]


def test_an_evaluation_before_training_or_of_another_name_is_let_pass(tmp_path, caplog):
    trainer = small_trainer(
        tmp_path, callbacks=[RewardHackingCallback()], eval_dataset=prompt_set(), eval_reward_funcs=dark, max_steps=1
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate(metric_key_prefix="test")
    assert said(caplog) == []
