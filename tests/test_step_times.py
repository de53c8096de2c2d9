# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What is logged of a step's time: that each part has its own, and that all of them add up."""

import asyncio
import math
import time

import pytest
import torch
from rich.console import Console
from tiny import tiny_sd3
from trainer_helpers import blue, bright, prompt_set, small_trainer

from trl_marble.evaluation.time_summary import summarize_times, times_table
from trl_marble.step_times import PARTS, StepTimes


DELAY = 0.1
NOISE = 0.6  # of a machine that is busy
INSIDE = ("step", "decode", "waiting")  # of others


def rows_of(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def slow(function, seconds=DELAY):
    """The same function, which takes longer."""

    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slowed


def test_parts_are_added_up_and_divided_by_the_steps():
    times = StepTimes(torch.device("cpu"), ["dark"], images_per_step=6)
    for _ in range(2):
        times.begin("step")
        for _ in range(2):
            with times.measure("forward"):
                time.sleep(0.01)
        times.add_reward("dark", 3.0)
        times.end("step")
    logged = times.flush()
    assert 0.02 <= logged["time/forward"] <= logged["time/step"] < 1
    assert logged["time/rewards/dark"] == 3.0 and logged["time/old"] == 0.0
    assert logged["images_per_second"] == pytest.approx(6 / logged["time/step"])
    assert 0.01 < logged["memory/peak"] < 1000  # GB
    assert times.flush() == {}  # no step since


def test_cleared_times_are_forgotten():
    times = StepTimes(torch.device("cpu"), [], images_per_step=1)
    times.begin("step")
    times.end("step")
    times.begin("rollout")
    times.clear()
    assert times.flush() == {}
    with pytest.raises(KeyError):
        times.end("rollout")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_time_is_the_device_s_and_nothing_waits():
    device = torch.device("cuda")
    times = StepTimes(device, [], images_per_step=1)
    matrix = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    times.begin("step")
    with times.measure("forward"):
        for _ in range(50):
            matrix @ matrix
    times.end("step")
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    took = time.perf_counter() - begin
    logged = times.flush()
    assert queued < 0.5 * took
    assert logged["time/forward"] == pytest.approx(took, rel=0.2)
    assert logged["memory/peak"] >= 2 * matrix.nbytes / 1e9


def test_every_step_logs_where_its_time_went(tmp_path):
    """Each part is made slow in a run of its own place: it is there that the time shows up."""
    pipeline = tiny_sd3(num_layers=1)

    async def dark(images, **kwargs):
        await asyncio.sleep(3 * DELAY)
        return [0.5] * len(images)

    trainer = small_trainer(
        tmp_path, [slow(bright), blue, dark], pipeline, max_steps=2, balance_every=1, old_policy_preset=3
    )
    pipeline.vae.decode = slow(pipeline.vae.decode)
    trainer.update.gradient.finish = slow(trainer.update.gradient.finish)
    trainer.weights.old_velocity = slow(trainer.weights.old_velocity)
    trainer.weights.base_velocity = slow(trainer.weights.base_velocity, 2 * DELAY)
    trainer.update.gradient.backward = slow(trainer.update.gradient.backward)
    trainer.weights.averaged.lerp_ = slow(trainer.weights.averaged.lerp_)
    trainer.weights.velocity = slow(trainer.weights.velocity)
    trainer.train()
    first, last = rows_of(trainer)
    calls = {"old": DELAY, "reference": 2 * DELAY, "forward": DELAY, "backward": DELAY}  # at one timestep
    expected = {"decode": 2 * DELAY, "balance": DELAY, "optimizer": DELAY, "waiting": 2.5 * DELAY} | calls
    expected |= {"rewards/slowed": 2 * DELAY, "rewards/dark": 6 * DELAY, "rewards/blue": 0}  # two batches of images
    for name, seconds in expected.items():
        assert seconds <= last[f"time/{name}"] < seconds + NOISE, name
    for row in (first, last):
        assert {f"time/{part}" for part in PARTS} <= row.keys()
        in_turn = sum(row[f"time/{part}"] for part in PARTS if part not in INSIDE)
        assert 0.7 * row["time/step"] < in_turn <= row["time/step"]
        assert row["time/decode"] + row["time/waiting"] < row["time/rollout"]
        assert row["images_per_second"] == pytest.approx(4 / row["time/step"], rel=1e-3)
        assert 0.01 < row["memory/peak"] < 1000
    assert first["time/old"] == 0  # the old policy is the trained one, and is not asked


class Learns:
    """Learns slowly."""

    def __call__(self, images, **kwargs):
        return bright(images)

    def update(self, images, rewards, trainer_state):
        time.sleep(2 * DELAY)

    def state_dict(self):
        time.sleep(DELAY)
        return {}

    def load_state_dict(self, state_dict): ...


def test_the_time_of_learning_is_logged_where_a_reward_learns(tmp_path):
    trainer = small_trainer(tmp_path, [Learns(), blue])
    trainer.train()
    row = rows_of(trainer)[-1]
    assert 4 * DELAY <= row["time/learning"] < 4 * DELAY + NOISE  # the state is copied before and after
    assert row["time/learning"] + row["time/waiting"] <= row["time/rollout"]
    assert 2 * DELAY <= row["time/rewards/Learns"] < 2 * DELAY + NOISE and row["time/rewards/blue"] < DELAY
    labels = {label: seconds for label, seconds, _ in summarize_times([row]).rows()}
    assert labels["- of it rewards learning"] == row["time/learning"] and labels["other"] < NOISE
    fixed = small_trainer(tmp_path / "fixed", [blue], max_steps=1)
    fixed.train()
    assert "time/learning" not in rows_of(fixed)[-1]


def test_a_step_without_a_rollout_has_no_time_of_one(tmp_path):
    trainer = small_trainer(tmp_path, per_device_train_batch_size=2, steps_per_generation=2, beta=0.0)
    trainer.train()
    sampled, not_sampled = rows_of(trainer)
    assert sampled["time/rollout"] > 0 and sampled["time/decode"] > 0
    for part in ("rollout", "decode", "waiting", "rewards/bright", "reference"):
        assert not_sampled[f"time/{part}"] == 0
    assert not_sampled["images_per_second"] == pytest.approx(2 / not_sampled["time/step"], rel=1e-3)


def test_evaluations_are_no_part_of_a_step(tmp_path):
    trainer = small_trainer(
        tmp_path, eval_dataset=prompt_set().select([0]), eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    trainer.evaluator.evaluate = slow(trainer.evaluator.evaluate, 1.0)
    trainer.train()
    assert all(row["time/step"] < 1.0 for row in rows_of(trainer))


def test_the_summary_and_its_table():
    row = {
        "time/step": 2.0,
        "time/rollout": 1.0,
        "time/decode": 0.25,
        "time/old": 0.0,
        "time/forward": 0.5,
        "time/rewards/dark": 0.75,
        "images_per_second": 4.0,
        "memory/peak": 3.0,
    }
    other = row | {"time/step": 1.0, "time/rollout": 0.0, "images_per_second": 8.0, "memory/peak": 5.0}
    summary = summarize_times([row, {"eval_kl": 0.1}, other])
    assert summary is not None
    assert (summary.step, summary.parts["rollout"], summary.peak_memory) == (1.5, 0.5, 5.0)
    assert summary.images_per_second == pytest.approx(16 / 3)  # 8 images a step
    rows = {label: (seconds, share) for label, seconds, share in summary.rows()}
    assert list(rows) == ["rollout", "- of it decoding", "forward passes", "other", "dark (beside the rollout)"]
    assert rows["other"] == (0.5, pytest.approx(1 / 3))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(times_table(summary))
    shown = capture.get()
    assert "1.500 s a step" in shown and "5.333 images a second, peak memory 5.0 GB" in shown and "33%" in shown
    assert summarize_times([{"loss": 1.0}]) is None
    assert math.isnan(summarize_times([row | {"time/step": 0.0}]).rows()[0].share)
