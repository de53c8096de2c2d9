# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What training does where a reward fails."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from trl_marble.rewards import RewardError, threads


# A test that would wait for ever fails after this many seconds instead.
PATIENCE = 60


@pytest.fixture
def waits(monkeypatch):
    """Set when all images are sampled and the trainer waits for their scores."""
    waits, wait = threading.Event(), threads.wait

    def say_and_wait(*args, **kwargs):
        waits.set()
        return wait(*args, **kwargs)

    monkeypatch.setattr(threads, "wait", say_and_wait)
    return waits


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
    for name, parameter in masked.weights.trained.items():
        assert parameter.equal(none.weights.trained[name]), name
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
    release = threading.Event()

    def hangs(images, **kwargs):
        release.wait(PATIENCE)
        return [0.0] * len(images)

    trainer = make_trainer(reward_funcs=[hangs], reward_timeout=0.2)
    with pytest.raises(RewardError, match="`hangs` raised TimeoutError: no answer after 0.2 seconds"):
        trainer.train()
    release.set()


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


# ---- Early ----


ONE_AT_A_TIME = {"rollout_batch_size": 1, "per_device_train_batch_size": 8, "max_steps": 1}


def count_calls(trainer):
    """When the pipeline was called so far."""
    calls = []
    trainer.pipeline.vae.decoder.register_forward_hook(lambda *_: calls.append(time.monotonic()))
    return calls


def raises(images, **kwargs):
    raise OSError("went away")


async def raises_later(images, **kwargs):
    raise OSError("went away")


def answers_too_little(images, **kwargs):
    return []


def answers_an_exception(images, **kwargs):
    return [OSError("cannot see")]


BROKEN = {
    raises: "`raises` raised OSError: went away .* It has not scored any image so far.$",
    raises_later: "`raises_later` raised OSError: went away",
    answers_too_little: "`answers_too_little` returned 0 values for 1 images",
    answers_an_exception: "`answers_an_exception` raised OSError: cannot see .*set `reward_failure='mask'`",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda func: func.__name__)
def test_training_stops_at_the_first_failed_call(make_trainer, rewards, broken):
    trainer = make_trainer(reward_funcs=[*rewards, broken], **ONE_AT_A_TIME)
    calls = count_calls(trainer)
    with pytest.raises(RewardError, match=BROKEN[broken]) as caught:
        trainer.train()
    assert 1 <= len(calls) <= 4  # of 8: a thread may need a moment
    assert "saved" not in str(caught.value)  # nothing is, at step 0
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("held_out", [False, True])
def test_an_evaluation_stops_at_the_first_failed_call(make_trainer, prompts, rewards, held_out):
    funcs = {"eval_reward_funcs": [raises]} if held_out else {"reward_funcs": [*rewards, raises]}
    trainer = make_trainer(eval_dataset=prompts, per_device_eval_batch_size=1, num_generations_eval=2, **funcs)
    calls = count_calls(trainer)
    with pytest.raises(RewardError, match="`raises` raised OSError"):
        trainer.evaluate()
    assert 1 <= len(calls) <= 5  # of 12


def test_a_failure_does_not_wait_for_a_slow_reward(make_trainer, rewards, waits):
    release = threading.Event()

    def slow(images, **kwargs):
        release.wait(PATIENCE)
        return [0.0] * len(images)

    def fails_late(images, **kwargs):
        waits.wait(PATIENCE)
        raise OSError("went away")

    trainer = make_trainer(reward_funcs=[slow, *rewards, fails_late], rollout_batch_size=8, max_steps=1)
    begin = time.monotonic()
    with pytest.raises(RewardError, match="`fails_late` raised OSError"):
        trainer.train()
    assert time.monotonic() - begin < PATIENCE / 2
    release.set()


def test_what_cannot_be_called_with_the_columns_is_refused_at_construction(make_trainer, prompts, rewards):
    def narrow(images, prompts):
        return [0.0] * len(images)

    def needs_a_target(images, target, **kwargs):
        return target

    with pytest.raises(ValueError, match=r"`narrow` has the parameters \(images, prompts\) and does not accept"):
        make_trainer(reward_funcs=[*rewards, narrow])
    with pytest.raises(ValueError, match=r"`narrow` .*columns of `eval_dataset` \(`source`\)"):
        make_trainer(eval_reward_funcs=narrow, eval_dataset=prompts)
    with pytest.raises(ValueError, match=r"no value for `target`.* the columns of `train_dataset` \(`source`\)"):
        make_trainer(reward_funcs=needs_a_target)
    with_target = prompts.add_column("target", [0.0] * len(prompts))
    with pytest.raises(ValueError, match=r"no value for `target`.* the columns of `eval_dataset` \(`source`\)"):
        make_trainer(reward_funcs=needs_a_target, train_dataset=with_target, eval_dataset=prompts)
    trainer = make_trainer(reward_funcs=needs_a_target, train_dataset=with_target)
    with pytest.raises(ValueError, match="no value for `target`"):
        trainer.evaluate(prompts)


def test_the_first_failure_told_is_one_of_the_reward_that_failed_everywhere(make_trainer, rewards):
    trainer = make_trainer(reward_funcs=[blind_for("red", rewards), raises], reward_failure="mask", max_steps=1)
    with pytest.raises(RewardError, match="`raises` failed for all images .* First failure: Reward `raises` raised"):
        trainer.train()


# ---- In time ----


class Clock(TrainerCallback):
    """Keeps when updates began."""

    def __init__(self, times):
        self.times = times

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.times.append(time.monotonic())


def test_rollout_batches_do_not_add_up_their_waits(make_trainer, rewards):
    release, scored = threading.Event(), []

    def hangs_at_the_third(images, **kwargs):
        scored.append(None)
        if len(scored) == 3:
            release.wait(PATIENCE)
        return [float(len(scored))] * len(images)

    settings = {"reward_timeout": 2.0, **ONE_AT_A_TIME}
    masked = make_trainer("masked", reward_funcs=[hangs_at_the_third, *rewards], reward_failure="mask", **settings)
    masked_calls, begun = count_calls(masked), []
    masked.add_callback(Clock(begun))
    masked.train()
    assert logged(masked, "rewards/hangs_at_the_third/failed") == [6]  # those that waited for their turn, too
    assert begun[0] - masked_calls[-1] < 11  # 12 s and more where the waits add up
    raised = make_trainer("raised", reward_funcs=[hangs_at_the_third, *rewards], **settings)
    raised_calls = count_calls(raised)
    scored.clear()
    with pytest.raises(RewardError, match="TimeoutError: no answer after 2 seconds .`reward_timeout`. .*='mask'"):
        raised.train()
    assert time.monotonic() - raised_calls[-1] < 11
    release.set()


@pytest.fixture
def sigint_interrupts():
    """Also where the tests run in the background of a shell, which lets its children ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks"])
def test_ctrl_c_leaves_a_hanging_reward_behind(make_trainer, rewards, sigint_interrupts, waits, kind):
    """The signal comes while the trainer waits for a reward that never answers."""
    release, calls = threading.Event(), []

    def interrupt():
        calls.append(None)
        if len(calls) == 1:
            threading.Thread(target=lambda: waits.wait(PATIENCE) and os.kill(os.getpid(), signal.SIGINT)).start()

    def hangs(images, **kwargs):
        interrupt()
        release.wait(PATIENCE)
        return [0.0] * len(images)

    async def hangs_too(images, **kwargs):
        interrupt()
        await asyncio.Event().wait()

    async def blocks(images, **kwargs):
        return hangs(images)

    hanging = {"sync": hangs, "async": hangs_too, "async that blocks": blocks}[kind]
    trainer = make_trainer(reward_funcs=[*rewards, hanging], max_steps=1)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    release.set()
    assert time.monotonic() - begin < PATIENCE / 2


HANGING_RUN = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from trainer_helpers import bright, small_trainer
from trl_marble.rewards import threads

wait = threads.wait

def say_and_wait(*args, **kwargs):
    print("waiting", flush=True)
    return wait(*args, **kwargs)

threads.wait = say_and_wait

def hangs(images, **kwargs):
    threading.Event().wait()

small_trainer(sys.argv[2], [bright, hangs]).train()
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_process_whose_reward_hangs(tmp_path):
    command = [sys.executable, "-c", HANGING_RUN, str(Path(__file__).parents[1] / "support"), str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=PATIENCE)
        assert run.returncode == -signal.SIGINT, err
        assert "KeyboardInterrupt" in err
    finally:
        run.kill()
