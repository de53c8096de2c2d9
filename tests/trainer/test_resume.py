# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run that stops and goes on ends as the run that never stopped, bit by bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_marble.rewards import RewardError


# Two optimizer steps a generation batch, two passes over it, three generation batches an epoch: checkpoints fall
# inside a generation batch, between two, and across epochs; the balance is solved at steps 0, 3, 6, ...
SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "balance_every": 3,
    "max_steps": 14,
    "save_strategy": "steps",
    "save_steps": 1,
    "beta": 0.1,
    "max_grad_norm": 1.0,
}


def state_of(trainer):
    """Everything that decides how training goes on, as one dictionary of tensors."""
    state = {f"current {name}": parameter.detach() for name, parameter in trainer.trainable.items()}
    state |= {f"old {name}": value for name, value in trainer.old_policy.state_dict().items()}
    state |= {f"average {name}": value for name, value in trainer.average.state_dict().items()}
    state |= {f"balance {name}": value for name, value in trainer.schedule.state_dict().items()}
    for i, moments in enumerate(trainer.optimizer.state_dict()["state"].values()):
        state |= {f"optimizer {i} {name}": value for name, value in moments.items()}
    return state


def assert_same_state(trainer, other):
    state, expected = state_of(trainer), state_of(other)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def uninterrupted(make_trainer):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [1, 3, 4, 6, 11, 12, 13])
def test_resumed_run_equals_the_uninterrupted_run(make_trainer, uninterrupted, step):
    checkpoint = Path(uninterrupted.args.output_dir) / f"checkpoint-{step}"
    resumed = make_trainer("resumed", log_images=True, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 14
    assert_same_state(resumed, uninterrupted)
    first = (Path(uninterrupted.args.output_dir) / "checkpoint-14/pytorch_lora_weights.safetensors").read_bytes()
    second = (Path(resumed.args.output_dir) / "checkpoint-14/pytorch_lora_weights.safetensors").read_bytes()
    assert first == second


def test_sampling_goes_on_where_it_stopped(make_trainer, uninterrupted):
    """The prompts of a resumed run are those that the uninterrupted run had after the checkpoint."""

    def with_log(folder, **kwargs):
        seen = []

        def note(images, prompts, **kwargs):
            seen.append(tuple(prompts))
            return [float(len(prompt)) for prompt in prompts]

        trainer = make_trainer(folder, reward_funcs=[note], **SETTINGS)
        trainer.train(**kwargs)
        return trainer, seen

    trainer, whole = with_log("noted")
    _, rest = with_log("noted-resumed", resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-4"))
    assert len(set(whole)) == 6  # two groups at a time, one call each: all prompts had their turn
    assert rest == whole[2:]


def test_a_failing_reward_loses_nothing(make_trainer, uninterrupted, rewards):
    calls = 0

    def breaks(images, prompts, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 6:  # the third generation batch, after 8 optimizer steps
            raise ConnectionError("scorer went away")
        return rewards[0](images)

    breaks.__name__ = "brightness"
    settings = SETTINGS | {"save_strategy": "no"}
    broken = make_trainer("broken", reward_funcs=[breaks, *rewards[1:]], **settings)
    with pytest.raises(RewardError, match="brightness.*ConnectionError: scorer went away"):
        broken.train()
    folder = Path(broken.args.output_dir)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    mended = make_trainer("broken", **settings)
    mended.train(resume_from_checkpoint=True)
    assert_same_state(mended, uninterrupted)


def test_a_failure_saves_although_an_older_run_left_a_checkpoint_of_that_step(make_trainer, rewards):
    settings = SETTINGS | {"max_steps": 4}
    older = make_trainer("shared", **settings)
    older.train()

    def breaks(images, trainer_state, **kwargs):
        if trainer_state.global_step == 4:
            raise ConnectionError("scorer went away")
        return rewards[0](images)

    breaks.__name__ = "brightness"
    own = SETTINGS | {"save_strategy": "no", "seed": 7}
    broken = make_trainer("shared", reward_funcs=[breaks, *rewards[1:]], **own)
    with pytest.raises(RewardError):
        broken.train()
    saved = load_file(Path(broken.args.output_dir) / "checkpoint-4" / "marble_state.safetensors")
    for name, parameter in broken.trainable.items():
        assert torch.equal(saved[f"current/{name}"], parameter), name


def test_a_checkpoint_without_the_optimizer_is_refused(make_trainer):
    trainer = make_trainer(**SETTINGS | {"max_steps": 1, "save_only_model": True})
    trainer.train()
    with pytest.raises(FileNotFoundError, match="save_only_model"):
        make_trainer("resumed", **SETTINGS).train(resume_from_checkpoint=trainer.args.output_dir + "/checkpoint-1")
