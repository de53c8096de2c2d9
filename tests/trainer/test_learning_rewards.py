# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that learn from each generation batch: what they see and when, resuming, failures, and evaluations."""

import functools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from trainer_helpers import blue, bright, prompt_set, small_trainer

from trl_marble.rewards import AdversarialReward, FrameReward, LearningReward, RewardError
from trl_marble.trainer.run_state import REWARDS_FILE


# Two optimizer steps a generation batch: checkpoints fall inside one and between two.
SETTINGS = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "num_generations_eval": 2}


class Counting:
    """Adds the number of its updates to the brightness; notes what it is called with."""

    def __init__(self, fails_at=None):
        self.updates, self.fails_at = 0, fails_at
        self.scored, self.learned = [], []

    def __call__(self, images, **kwargs):
        self.scored.append((self.updates, len(images)))
        return [value + self.updates * (i % 2) for i, value in enumerate(bright(images))]

    def update(self, images, rewards, trainer_state, prompts, tag):
        if self.updates == self.fails_at:
            self.updates = 100  # half done
            raise OSError("disk on fire")
        self.updates += 1
        self.learned.append((trainer_state.global_step, len(images), rewards, prompts, tag))

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state_dict):
        self.updates = state_dict["updates"]


class Novelty(LearningReward):
    """How far the mean colour is from the mean of all so far."""

    def __init__(self):
        self.mean = torch.zeros(3)

    def features(self, images, prompts, **kwargs):
        colours = torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]) / 255
        colours[[prompt == "sky" for prompt in prompts]] = torch.nan  # to which it does not apply
        return colours

    def score(self, features):
        return (features - self.mean).norm(dim=1)

    def update(self, features, rewards, trainer_state, log_metric):
        assert features.isfinite().all() and len(features) == len(rewards["Novelty"])
        assert None not in rewards["Novelty"]
        self.mean = (self.mean + features.mean(dim=0)) / 2
        log_metric("novelty/seen", len(features))

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state_dict):
        self.mean = state_dict["mean"]


def adversarial():
    reference = [Image.new("RGB", (16, 16), (0, 0, i)) for i in range(0, 200, 10)]
    pixels = Novelty().features
    return AdversarialReward(reference, lambda images: pixels(images, [""] * len(images)), learning_rate=0.1)


def final_state(trainer):
    """The weights and what the rewards have learned."""
    tensors = {name: parameter.detach() for name, parameter in trainer.weights.trained.items()}
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    return tensors | load_file(folder / REWARDS_FILE)


def test_a_reward_learns_after_each_generation_batch_from_scores_of_before(tmp_path):
    reward, images = Counting(), Novelty()
    trainer = small_trainer(tmp_path, [reward, blue, images], steps_per_generation=2, max_steps=4)
    trainer.train()
    assert reward.updates == 2 and {updates for updates, _ in reward.scored} == {0, 1}
    assert [step for step, *_ in reward.learned] == [0, 2]
    for _, number, rewards, prompts, tags in reward.learned:
        assert number == len(prompts) == len(tags) == 8 and list(rewards) == ["Counting", "blue", "Novelty"]
        assert [rewards["Novelty"][i] is None for i in range(8)] == [prompt == "sky" for prompt in prompts]
        assert all(isinstance(value, float) for value in rewards["Counting"])
    # The second batch was scored by what was learned from the first, and by nothing of its own.
    assert max(reward.learned[0][2]["Counting"]) <= 1 < max(reward.learned[1][2]["Counting"]) <= 2
    assert images.mean.norm() > 0
    assert all("novelty/seen" in row for row in trainer.state.log_history if "loss" in row and row["step"] in (1, 3))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = small_trainer(
        tmp_path_factory.mktemp("learning"), [Counting(), Novelty(), adversarial()], max_steps=5, **SETTINGS
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, step):
    resumed = small_trainer(tmp_path, [Counting(), Novelty(), adversarial()], max_steps=5, **SETTINGS)
    resumed.train(resume_from_checkpoint=f"{uninterrupted.args.output_dir}/checkpoint-{step}")
    state, expected = final_state(resumed), final_state(uninterrupted)
    assert state.keys() == expected.keys() and any("head" in name for name in state)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    head = next(value for name, value in expected.items() if name.endswith("/last"))
    assert head.norm() > 0
    assert resumed.scorer.funcs[0].updates == 3


def test_what_was_learned_from_a_batch_that_no_step_has_used_is_not_saved(tmp_path):
    """The second update fails half done: the checkpoint that is saved then has the state before it."""
    settings = SETTINGS | {"save_steps": 5, "max_steps": 5}
    trainer = small_trainer(tmp_path, [Novelty(), adversarial(), Counting(fails_at=1)], **settings)
    with pytest.raises(RewardError, match=r"`Counting.update` raised OSError: disk on fire"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    trainer = small_trainer(tmp_path, [Novelty(), adversarial(), Counting()], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.scorer.funcs[2].updates == 3
    whole = small_trainer(tmp_path / "whole", [Novelty(), adversarial(), Counting()], **settings)
    whole.train()
    state = final_state(trainer)
    for name, value in final_state(whole).items():
        assert torch.equal(state[name], value), name


def test_a_checkpoint_is_of_a_run_with_the_same_learning_rewards(uninterrupted, tmp_path):
    def counting(images, **kwargs):
        return bright(images)

    counting.__name__ = "Counting"
    trainer = small_trainer(tmp_path, [counting, Novelty(), adversarial()], max_steps=5, **SETTINGS)
    with pytest.raises(ValueError, match=r"the rewards that learn are \['AdversarialReward', 'Counting', 'Novelty'\]"):
        trainer.train(resume_from_checkpoint=f"{uninterrupted.args.output_dir}/checkpoint-2")


def test_evaluations_leave_out_rewards_that_learn(tmp_path):
    trainer = small_trainer(
        tmp_path, [bright, Counting(), blue], eval_dataset=prompt_set(), eval_reward_funcs=Dark(), **EVALUATED
    )
    trainer.train()
    *_, last = [row for row in trainer.state.log_history if "eval_kl" in row]
    assert {key.split("/")[1] for key in last if key.startswith("eval_rewards/")} == {"bright", "blue", "Dark"}
    assert not [key for key in last if "Counting" in key] and math.isfinite(last["eval_gain_worst"])
    assert trainer.evaluations[-1].reward_names == ["bright", "blue", "Dark"]
    torch.testing.assert_close(trainer.evaluations[-1].rewards[2], -trainer.evaluations[-1].rewards[0])
    trainer.save_model()
    assert "Counting" in (tmp_path / "README.md").read_text()


class Dark:
    """A held-out reward."""

    def __call__(self, images, **kwargs):
        return [-value for value in bright(images)]


# ---- Features and failures ----


class Noted(Novelty):
    """Notes how many images each call has, and what it learns from; logs."""

    def __init__(self, fails=()):
        super().__init__()
        self.fails, self.calls, self.learned = fails, [], []

    def features(self, images, prompts, log_metric, **kwargs):
        self.calls.append(len(images))
        if any(prompt in self.fails for prompt in prompts):
            raise OSError("gone")
        log_metric("novelty/shown", len(images))
        return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images])  # integers

    def score(self, features):
        return features.norm(dim=1)

    def update(self, features, rewards, trainer_state, prompts, **kwargs):
        assert features.is_floating_point()
        torch.testing.assert_close(features.norm(dim=1).tolist(), rewards["Noted"])
        self.learned.append(prompts)


def test_features_are_computed_once_by_rollout_batches(tmp_path):
    reward = Noted()
    trainer = small_trainer(tmp_path, [reward, blue], rollout_batch_size=2)
    trainer.train()
    assert reward.calls == [2] * 4 and [len(prompts) for prompts in reward.learned] == [4, 4]
    assert all(row["novelty/shown"] == 2 for row in trainer.state.log_history if "loss" in row)


def test_features_are_kept_where_prompts_are_replaced(tmp_path):
    def same(images, prompts, **kwargs):
        return [float("red" in prompt) * value for prompt, value in zip(prompts, blue(images), strict=True)]

    class Seldom(Noted):
        def score(self, features):
            return torch.zeros(len(features))  # no prompt has a signal of it

        def update(self, features, rewards, trainer_state, prompts):
            assert len(features) == len(prompts) == 4 and rewards["Seldom"] == [0.0] * 4
            self.learned.append(prompts)

    reward = Seldom()
    trainer = small_trainer(tmp_path, [reward, same], resample_silent_prompts=3, rollout_batch_size=2, max_steps=3)
    trainer.train()
    assert len(reward.learned) == 3 and sum(row.get("resampled/prompts", 0) for row in trainer.state.log_history) > 0


class FailsOn(Counting):
    """Learns from images, and fails on a prompt."""

    def __call__(self, images, prompts, **kwargs):
        if "a cat" in prompts:
            raise OSError("gone")
        return bright(images)


def test_nothing_is_learned_from_images_that_it_failed_on(tmp_path):
    by_features, by_images = Noted(fails=("a cat",)), FailsOn()
    trainer = small_trainer(
        tmp_path, [by_features, by_images], reward_failure="mask", rollout_batch_size=2, max_steps=3
    )
    trainer.train()
    learned = [prompts for *_, prompts, _ in by_images.learned]
    assert by_features.learned == learned and sorted(map(len, learned)) == [2, 4, 4]
    assert not any("a cat" in prompts for prompts in learned)
    failed = [row["rewards/Noted/failed"] for row in trainer.state.log_history if "loss" in row]
    assert sorted(failed) == [0, 0, 2]


def test_a_call_that_hangs_is_named_where_the_reward_is_to_learn(tmp_path):
    class Hangs(Noted):
        def features(self, images, prompts, **kwargs):
            if self.calls:
                time.sleep(4.0)
            return super().features(images, prompts, **kwargs)

    trainer = small_trainer(
        tmp_path, [Hangs(), bright], reward_failure="mask", reward_timeout=0.4, rollout_batch_size=2
    )
    message = r"`Hangs.state_dict` could not be called: an earlier call of `Hangs`, .* It scores 2 images for '"
    with pytest.raises(RewardError, match=message):
        trainer.train()


def test_a_call_of_its_own_must_keep_the_features(tmp_path):
    class Own(Noted):
        def __call__(self, images, prompts, **kwargs):
            return bright(images)

    with pytest.raises(RewardError, match="`Own` has scored an image and kept no features to learn from"):
        small_trainer(tmp_path, [Own(), blue]).train()


class OwnState(Counting):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def state_dict(self):
        if isinstance(self.state, Exception) and not self.scored:
            raise self.state
        return {"mean": [self.state if not self.updates else self.updates]}


def test_a_state_that_cannot_be_saved_is_refused_at_once(tmp_path):
    message = r"state of the reward `OwnState` .*`state_dict\(\).mean.0` is a ndarray.*`torch.from_numpy`"
    with pytest.raises(TypeError, match=message) as caught:
        small_trainer(tmp_path, [OwnState(np.zeros(3)), blue], save_only_model=True)
    assert "save_only_model" not in str(caught.value)


def test_a_reward_may_have_no_state_before_it_has_seen_images(tmp_path):
    reward = OwnState(AttributeError("no network yet"))
    trainer = small_trainer(tmp_path, [reward, blue], max_steps=1)
    with pytest.raises(TypeError, match=r"`state_dict\(\).mean.0` is a AttributeError"):
        trainer.train()
    assert reward.scored


# ---- What is refused before anything is sampled ----


class OnlyUpdates:
    def __call__(self, images, **kwargs):
        return bright(images)

    def update(self, images, rewards, trainer_state):
        pass


class AsksForMore(Counting):
    def update(self, images, rewards, trainer_state, weather):
        pass


class KnowsNoRewards(Counting):
    def update(self, images, trainer_state):
        pass


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        (OnlyUpdates(), {}, r"`OnlyUpdates` has the method `update`, so it learns, and not `state_dict` and"),
        (AsksForMore(), {}, r"`AsksForMore.update` has the parameters .*there is no value for `weather`"),
        (KnowsNoRewards(), {}, r"`KnowsNoRewards.update` .* does not accept `rewards`"),
        (
            functools.partial(Counting()),
            {"multi_objective_aggregation": "progress"},
            r"'progress'` compares scores .* the reward `Counting` learns",
        ),
        (Counting(), {"eval_dataset": prompt_set()}, r"on eval_dataset: all rewards learn \(Counting\)"),
        (blue, {"eval_reward_funcs": [Counting()]}, r"`eval_reward_funcs` has `Counting`, which learns"),
        (
            [blue, Counting()],
            {
                "eval_dataset": prompt_set(),
                "metric_for_best_model": "rewards/Counting/mean",
                "eval_on_start": True,
                "eval_strategy": "steps",
                "save_strategy": "best",
            },
            r"'rewards/Counting/mean', which no evaluation has",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path, rewards, settings, message):
    with pytest.raises(ValueError, match=message):
        small_trainer(tmp_path, rewards, **settings)


def test_a_reward_of_frames_does_not_learn():
    with pytest.raises(ValueError, match="`reward` is `Counting`, which learns from images"):
        FrameReward(Counting())


def test_a_reward_server_does_not_learn():
    server = pytest.importorskip("trl_marble.rewards.server")
    with pytest.raises(ValueError, match="`Counting` learns, and nobody would call its `update` here"):
        server.RewardServer([Counting()], port=0)
