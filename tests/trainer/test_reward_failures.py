# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What training does where a reward fails."""

import time
from pathlib import Path

import pytest

from trl_marble.rewards import RewardError


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def blind_for(prompt_part, rewards):
    """`brightness`, which cannot see the images of some prompts."""

    def brightness(images, prompts, **kwargs):
        return [
            OSError("cannot see") if prompt_part in prompt else value
            for value, prompt in zip(rewards[0](images), prompts, strict=True)
        ]

    return brightness


def test_raise_stops_with_reward_prompt_and_cause_and_saves(make_trainer, rewards):
    def brightness(images, prompts, trainer_state, **kwargs):
        values = rewards[0](images)
        if trainer_state.global_step == 1:
            values[0] = OSError("cannot see")
        return values

    trainer = make_trainer(reward_funcs=[brightness, *rewards[1:]], max_steps=2)
    with pytest.raises(
        RewardError, match=r"`brightness` raised OSError: cannot see \(one image for '.*reward_failure='m"
    ):
        trainer.train()
    assert (Path(trainer.args.output_dir) / "checkpoint-1" / "marble_state.safetensors").is_file()


def test_mask_leaves_out_what_failed_and_counts_it(make_trainer, rewards):
    """A failure is to training what not applying is: the run is the one of a reward that says `None`."""

    def says_none(images, prompts, **kwargs):
        return [None if "red" in prompt else value for value, prompt in zip(rewards[0](images), prompts, strict=True)]

    settings = {"max_steps": 3, "eval_strategy": "no"}
    masked = make_trainer(
        "masked", reward_funcs=[blind_for("red", rewards), *rewards[1:]], reward_failure="mask", **settings
    )
    masked.train()
    none = make_trainer("none", reward_funcs=[says_none, *rewards[1:]], **settings)
    none.train()
    for name, parameter in masked.trainable.items():
        assert parameter.equal(none.trainable[name]), name
    failed = logged(masked, "rewards/brightness/failed")
    assert failed == [8 * (1 - valid) for valid in logged(none, "rewards/says_none/valid")]
    assert sum(failed) > 0 and set(logged(masked, "rewards/redness/failed")) == {0}
    assert not logged(none, "rewards/says_none/failed")  # counted only where they are let pass


def test_mask_raises_when_a_whole_batch_fails(make_trainer, rewards):
    trainer = make_trainer(reward_funcs=[blind_for("", rewards), *rewards[1:]], reward_failure="mask")
    with pytest.raises(RewardError, match="`brightness` failed for all images it applies to.*OSError: cannot see"):
        trainer.train()


def test_a_failed_call_masks_its_rollout_batch_only(make_trainer, rewards):
    calls = []

    def brightness(images, **kwargs):
        calls.append(None)
        if len(calls) == 1:
            raise ConnectionError("went away")
        return rewards[0](images)

    trainer = make_trainer(reward_funcs=[brightness], reward_failure="mask", rollout_batch_size=4, max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/brightness/failed") == [4]
    assert logged(trainer, "rewards/brightness/valid") == [0.5]


def test_a_reward_that_hangs_ends_training(make_trainer, rewards):
    def hangs(images, **kwargs):
        time.sleep(3)
        return [0.0] * len(images)

    trainer = make_trainer(reward_funcs=[hangs, *rewards], reward_timeout=0.2)
    with pytest.raises(RewardError, match="`hangs` raised TimeoutError: no answer after 0.2 seconds"):
        trainer.train()


def test_evaluation_counts_failures_too(make_trainer, prompts, rewards):
    trainer = make_trainer(
        reward_funcs=[blind_for("red", rewards), *rewards[1:]],
        reward_failure="mask",
        eval_dataset=prompts,
        num_generations_eval=2,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/brightness/failed"] == 2 * sum("red" in prompt for prompt in prompts["prompt"])
    assert metrics["eval_rewards/brightness/valid"] == 0.5
