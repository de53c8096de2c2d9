# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Runs whose weights follow the progress of the rewards since the base model."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.shapeworld import load_pipeline, load_prompts
from trl_marble.shapeworld.rewards import coverage


RUN = {"multi_objective_aggregation": "progress", "progress_base_images": 2, "beta": 0.1}
# Checkpoints fall inside a generation batch, between two, and across epochs.
LONG = RUN | {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 14,
    "save_strategy": "steps",
    "save_steps": 1,
}
STATE = "marble_state.safetensors"


def build(make_trainer, *args, **settings):
    """`balance_every` of the fixture's settings has no effect here, and 1 is its default."""
    return make_trainer(*args, **RUN | settings)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the uninterrupted run is, which tests look at and do not change."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def whole(make_trainer, kept):
    """The folder of an uninterrupted run."""
    if not (kept / "whole").exists():
        build(make_trainer, kept / "whole", **LONG).train()
    return kept / "whole"


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def base_means(trainer):
    """Prompt id -> mean rewards of the base model's images."""
    state = trainer.rollouts.progress.state_dict()
    return dict(zip(state["prompts"].tolist(), state["means"], strict=True))


def test_each_prompt_gets_its_base_images_once_and_they_do_not_depend_on_when(make_trainer, rewards):
    """Nor on the policy: with this learning rate the trained one is far from the base model when it is asked."""

    def run(data_seed):
        seen = []

        def brightness(images, prompts, **kwargs):
            seen.extend(prompts)
            return rewards[0](images)

        own = [brightness, *rewards[1:]]
        trainer = build(make_trainer, reward_funcs=own, max_steps=6, data_seed=data_seed, rollout_batch_size=3)
        trainer.train()
        return trainer, seen

    (first, seen), (second, _) = run(0), run(1)
    in_rollouts = 6 * 2 * 4  # steps x prompts x images
    assert len(seen) == in_rollouts + 6 * 2 and len(base_means(first)) == 6
    assert list(base_means(first)) != list(base_means(second))
    for prompt, mean in base_means(first).items():
        assert torch.allclose(mean, base_means(second)[prompt], atol=1e-3, equal_nan=True)  # rounding to 8 bits
    applies = [not mean[1].isnan() for mean in base_means(first).values()]
    assert sum(applies) == 3  # of the prompts that ask for red
    for name in ("brightness", "redness", "darkness"):
        values, weights = logged(first, f"progress/{name}"), logged(first, f"progress/weight/{name}")
        assert len(values) == len(weights) == 6 and all(map(math.isfinite, weights))
    assert sum(logged(first, f"progress/weight/{name}")[-1] for name in ("brightness", "redness", "darkness")) == (
        pytest.approx(1)
    )
    assert not logged(first, "balance/alpha/brightness")


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 5, 12))])
def test_a_resumed_run_ends_as_the_uninterrupted_one(make_trainer, whole, step):
    resumed = build(make_trainer, "resumed", **LONG)
    resumed.train(resume_from_checkpoint=str(whole / f"checkpoint-{step}"))
    last = whole / "checkpoint-14" / STATE
    assert (Path(resumed.args.output_dir) / "checkpoint-14" / STATE).read_bytes() == last.read_bytes()
    saved = load_file(last)
    assert len(saved["progress/prompts"]) == 6 and saved["progress/measured"].all()


@pytest.mark.parametrize("step", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_batch_that_no_step_has_used_is_not_counted_twice(make_trainer, whole, step):
    """Step 4 ends with an error after the second generation batch was sampled; resumed, that one is sampled again."""

    class Interrupts(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    broken = build(make_trainer, "broken", callbacks=[Interrupts()], **LONG | {"save_strategy": "no"})
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    folder = Path(broken.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    name = f"checkpoint-{step}/{STATE}"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    repaired = build(make_trainer, "broken", **LONG | {"max_steps": 8})
    repaired.train(resume_from_checkpoint=True)
    name = f"checkpoint-8/{STATE}"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_may_change_to_weights_by_progress_and_back(make_trainer):
    first = make_trainer("first", multi_objective_aggregation="sum_then_normalize", max_steps=1, save_strategy="epoch")
    first.train()
    second = build(make_trainer, "second", max_steps=2, save_strategy="steps", save_steps=1)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
    assert len(base_means(second)) == 2
    third = make_trainer("third", max_steps=3)
    third.train(resume_from_checkpoint=f"{second.args.output_dir}/checkpoint-2")
    assert third.state.global_step == 3


def test_in_another_dataset_no_prompt_is_taken_for_another(make_trainer, prompts):
    first = build(make_trainer, "first", max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    other = prompts.map(
        lambda row, i: {"prompt": row["prompt"] if i < 3 else f"not {row['prompt']}"}, with_indices=True
    )
    second = build(make_trainer, "second", train_dataset=other, max_steps=6)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-3")
    assert len(base_means(first)) == 6 and len(base_means(second)) == 9


def test_where_all_targets_are_reached_only_what_keeps_the_policy_near_acts(make_trainer, caplog):
    trainer = build(make_trainer, max_steps=3, reward_targets=[0.0, -1.0, 0.0])
    trainer.train()
    assert logged(trainer, "progress/weight/brightness") == [0, 0, 0]
    assert all(map(math.isfinite, logged(trainer, "loss"))) and logged(trainer, "kl")[-1] < 1e-6
    said = [message for message in caplog.messages if "All rewards have reached their targets (brightness" in message]
    assert len(said) == 1


def test_a_run_leaves_a_picture_and_a_card_of_its_weights(make_trainer):
    trainer = build(make_trainer, log_images=True, reward_targets=[None, 0.9, None])
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    assert {path.name for path in (folder / "plots").iterdir()} == {"progress.png", "rewards.png"}
    card = (folder / "README.md").read_text()
    weight = logged(trainer, "progress/weight/darkness")[-1]
    assert "Weight at the end" in card and f" | {weight:.3f} |" in card
    assert (folder / "progress.png").is_file() and "(progress.png)" in card
    assert "| `reward_targets` | `[None, 0.9, None]` |" in card and "`balance_every`" not in card


def test_a_reward_at_its_target_leaves_the_sum_to_the_others(make_trainer, rewards):
    def run(folder, **settings):
        trainer = build(make_trainer, folder, max_steps=1, **settings)
        trainer.train()
        return trainer._batch.advantages

    both = run("both", reward_funcs=[rewards[0], rewards[2]], reward_targets=[None, 0.0])
    alone = run("alone", reward_funcs=[rewards[0]])
    assert torch.allclose(both, alone, atol=1e-5) and both.abs().max() > 0.1


def test_a_bound_below_the_base_model_is_refused_with_the_values(make_trainer):
    trainer = build(make_trainer, reward_bounds=[0.1, None, None])
    with pytest.raises(ValueError, match=r"bound of reward `brightness` is 0\.1, and its mean over .* is 0\.\d+"):
        trainer.train()


def test_base_images_that_a_reward_fails_for_are_left_out(make_trainer, rewards, caplog):
    calls = []

    def brightness(images, **kwargs):
        calls.append(len(images))
        if len(calls) == 1:  # two images of each of two prompts
            return [OSError("cannot see")] * 3 + rewards[0](images[3:])
        return rewards[0](images)

    trainer = build(make_trainer, reward_funcs=[brightness, rewards[2]], max_steps=1, reward_failure="mask")
    trainer.train()
    state = trainer.rollouts.progress.state_dict()
    assert state["means"].isnan().tolist() == [[True, False], [False, False]]
    assert "3 images of the base model lack a score" in caplog.text and "cannot see" in caplog.text
    assert all(map(math.isfinite, logged(trainer, "progress/brightness")))


def test_priorities_reach_the_weights(make_trainer):
    weights = []
    for name, priorities in (("equal", [1.0, 1.0, 1.0]), ("other", [1.0, 1.0, 4.0])):
        trainer = build(make_trainer, name, max_steps=1, reward_priorities=priorities)
        trainer.train()
        weights.append(logged(trainer, "progress/weight/brightness"))
    assert weights[0] != weights[1]


def test_one_value_for_each_reward(make_trainer):
    with pytest.raises(ValueError, match="`reward_priorities` has 2 values .* for 3 rewards .* one priority"):
        build(make_trainer, reward_priorities=[1.0, 2.0])
    for setting in ("reward_targets", "reward_bounds"):
        with pytest.raises(ValueError, match=f"`{setting}` has 2 values .* for 3 rewards .*or `None`"):
            build(make_trainer, **{setting: [None, 0.9]})


def luck(images, **kwargs):
    """A reward that no training can raise: it depends on every pixel, and on nothing that can be learned."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return [int.from_bytes(digest[:4], "big") / 2**32 for digest in digests]


@pytest.mark.slow
def test_a_reward_that_lags_behind_gets_the_weight(tmp_path):
    args = MarbleConfig(
        str(tmp_path),
        multi_objective_aggregation="progress",
        num_generations=8,
        per_device_train_batch_size=96,
        gradient_accumulation_steps=1,
        rollout_batch_size=96,
        num_inference_steps=5,
        timestep_fraction=0.4,
        learning_rate=2e-3,
        beta=0.0,
        old_policy_preset=0,
        max_steps=8,
        save_strategy="no",
        log_images=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = MarbleNFTTrainer(load_pipeline(), [coverage, luck], args, load_prompts("train"))
    trainer.train()
    last = trainer.state.log_history[-2]
    assert last["progress/coverage"] > 0.1 + last["progress/luck"]
    assert last["progress/weight/luck"] > 0.6
