# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The pictures that a run leaves, and when."""

from pathlib import Path

import torch
from PIL import Image

from trl_marble.callbacks.pictures import RolloutRecord, _captions, _histograms, choose_rows, log_rollout


EVERY_STEP = {"log_images": True, "log_images_steps": 1, "max_steps": 2}


def names_in(trainer, folder):
    return {path.name for path in (Path(trainer.args.output_dir) / folder).glob("*")}


def test_a_run_leaves_grids_histograms_and_plots(make_trainer, prompts):
    trainer = make_trainer(
        eval_dataset=prompts,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=1,
        **EVERY_STEP,
    )
    seen = []
    original = trainer._save_checkpoint

    def save(model, trial):
        original(model, trial)
        seen.append((Path(trainer.args.output_dir) / "plots" / "rewards.png").stat().st_mtime_ns)

    trainer._save_checkpoint = save
    trainer.train()
    grids = {f"train_step_{step:06}.png" for step in (1, 2)} | {f"eval_step_{step:06}.png" for step in (0, 2)}
    assert names_in(trainer, "images") == grids | {f"rewards_step_{step:06}.png" for step in (1, 2)}
    assert names_in(trainer, "plots") == {"balance.png", "rewards.png"}
    assert len(set(seen)) == 2  # drawn anew at each save
    for path in Path(trainer.args.output_dir).glob("*/*.png"):
        assert min(Image.open(path).size) > 32


def test_grids_of_rollouts_keep_their_distance_and_the_first_is_there(make_trainer):
    trainer = make_trainer(log_images=True, log_images_steps=2, logging_steps=1, max_steps=4, num_images_to_log=1)
    trainer.train()
    assert names_in(trainer, "images") == {
        f"{name}_step_{step:06}.png" for name in ("train", "rewards") for step in (1, 3)
    }


def test_without_pictures_there_are_none(make_trainer, prompts):
    trainer = make_trainer(log_images=False, eval_dataset=prompts, eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer.train()
    assert not list(Path(trainer.args.output_dir).rglob("*.png"))


def test_a_weighted_sum_has_rewards_to_plot_and_no_balance(make_trainer):
    trainer = make_trainer(multi_objective_aggregation="sum_then_normalize", **EVERY_STEP)
    trainer.train()
    assert names_in(trainer, "plots") == {"rewards.png"}


def test_the_rewards_stand_under_the_images(make_trainer):
    """A grid of the same images is higher by a line for each reward."""
    trainer = make_trainer()
    images = [Image.new("RGB", (8, 8), "red")] * 4
    heights = []
    for count in (1, 3):
        rewards = torch.rand(count, 4)
        names = [f"reward_{i}" for i in range(count)]
        rows = choose_rows(["a", "a", "b", "b"], images, rewards, {}, 2)
        log_rollout(trainer, names, RolloutRecord(rows, rewards, None))
        heights.append(Image.open(Path(trainer.args.output_dir) / "images/train_step_000000.png").height)
    assert heights[1] > heights[0] + 2 * 20


def test_of_a_generation_batch_only_the_images_that_are_shown_are_kept(make_trainer):
    trainer = make_trainer(num_images_to_log=1, **EVERY_STEP)
    trainer.train()
    (row,) = trainer._latest_rollout.rows
    assert len(row.images) == 1 and trainer.args.generation_batch_size == 8


def test_captions_say_values_first_and_where_a_reward_does_not_apply():
    rewards = torch.tensor([[0.5, 21.25], [float("nan"), -1.0]])
    assert _captions(["bright", "reader"], rewards, {}) == ["0.5000 bright\n– reader", "21.25 bright\n-1.000 reader"]


def test_histograms_leave_out_where_a_reward_does_not_apply():
    values = {"bright": [1.0, 2.0, 3.0], "reader": [float("nan"), 5.0, float("nan")]}
    assert _histograms(values, ["a", "b", "a"]) == {
        "train/rewards/bright/histogram": [1.0, 2.0, 3.0],
        "train/rewards/bright/histogram/a": [1.0, 3.0],
        "train/rewards/bright/histogram/b": [2.0],
        "train/rewards/reader/histogram": [5.0],
        "train/rewards/reader/histogram/a": [],
        "train/rewards/reader/histogram/b": [5.0],
    }
    assert list(_histograms(values, None)) == ["train/rewards/bright/histogram", "train/rewards/reader/histogram"]
