# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Other prompts for groups on which no reward differs."""

import math

import torch
from datasets import Dataset
from tiny import tiny_sd3
from trainer_helpers import bright, small_trainer

from trl_marble.rollout.resampling import OtherPrompts, find_silent_groups


GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_a_group_is_silent_if_no_reward_has_a_signal() -> None:
    nan = math.nan
    advantages = torch.tensor([[0, 0, 1, -1, 0, nan], [0, 0, nan, nan, nan, nan]])
    assert find_silent_groups(advantages, GROUPS) == [0, 2]


def test_rows_are_other_ones_each_once_and_the_same_on_all_processes() -> None:
    drawn = [OtherPrompts([3, 3, 1, 1, 5, 5], 2) for _ in range(2)]
    assert [each.draw([0, 2], 8, seed=1) for each in drawn] == [[0, 1, 4, 5]] * 2
    assert drawn[0].rows == drawn[1].rows and drawn[0].number_drawn == 2
    first, second = drawn[0].rows[0], drawn[0].rows[4]
    assert drawn[0].replaced == {0: first, 1: first, 4: second, 5: second}
    assert len({first, second, 3, 1, 5}) == 5
    assert drawn[0].draw([0], 8, seed=2) == [0, 1] and len({drawn[0].rows[0], first, second, 3, 1, 5}) == 6


def test_a_source_keeps_its_share_and_a_group_its_prompt_where_none_is_left() -> None:
    prompts = OtherPrompts([0, 0, 3, 3], 2, sources=["a", "a", "a", "b", "a"])
    assert prompts.draw([0, 1], 5, seed=0) == [0, 1]  # the source `b` has no other row
    assert prompts.rows[0] in (1, 2, 4) and prompts.rows[2:] == [3, 3]


PROMPTS = ["long one", "long two", "long three", "a", "b", "c"]  # of which short ones are drawn first


def if_long(images, prompts, **kwargs):
    return [value if len(prompt) > 1 else 0.3 for value, prompt in zip(bright(images), prompts, strict=True)]


def train(folder, **settings):
    trainer = small_trainer(
        folder,
        [if_long],
        pipeline=tiny_sd3(num_layers=1),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        resample_silent_prompts=2,
        balance_every=1,
        **settings,
    )
    batches = []
    arrange = trainer.rollouts._arranger.arrange
    trainer.rollouts._arranger.arrange = lambda *args: batches.append(arrange(*args)) or batches[-1]
    return trainer, batches


def change(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.weights.parameters])


def test_prompts_without_a_signal_are_replaced_and_found_again_when_a_run_resumes(tmp_path) -> None:
    settings = {"steps_per_generation": 2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    whole, batches = train(tmp_path / "whole", max_steps=2, **settings)
    whole.train()
    assert {len(set(batch.prompts)) for batch in batches} == {2}
    assert all(len(prompt) > 1 for batch in batches for prompt in batch.prompts)
    drawn = [row["resampled/prompts"] for row in whole.state.log_history if "resampled/prompts" in row]
    assert len(drawn) == 1 and drawn[0] >= 1 and batches[0].replaced
    assert whole.state.log_history[0]["resampled/still_silent"] == 0
    assert whole.state.log_history[0]["rewards/if_long/zero_std_fraction"] == 0

    resumed, none = train(tmp_path / "resumed", max_steps=2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert none == [] and resumed._batch.replaced == batches[0].replaced
    assert resumed._batch.prompts == batches[0].prompts
    assert change(resumed).equal(change(whole))
