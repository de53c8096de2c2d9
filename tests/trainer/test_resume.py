# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run that stops and goes on ends as the run that never stopped, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from trl_marble.checkpoint.folder import DamagedCheckpointError, find_damage
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
    "kl_target": 0.01,
    "regularizer_fraction": 0.5,  # of two timesteps
    "max_grad_norm": 1.0,
}


def state_of(trainer):
    """Everything that decides how training goes on, as one dictionary of tensors."""
    state = {f"current {name}": parameter.detach() for name, parameter in trainer.weights.trained.items()}
    state |= {f"old {name}": value for name, value in trainer.weights.old.state_dict().items()}
    state |= {f"average {name}": value for name, value in trainer.weights.averaged.state_dict().items()}
    state |= {f"balance {name}": value for name, value in trainer.schedule.state_dict().items()}
    state |= {f"KL {name}": value for name, value in trainer.update.kl_control.state_dict().items()}
    for i, moments in enumerate(trainer.optimizer.state_dict()["state"].values()):
        state |= {f"optimizer {i} {name}": torch.as_tensor(value) for name, value in moments.items()}
    return state


def assert_same_state(trainer, other):
    state, expected = state_of(trainer), state_of(other)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the runs are that several tests look at, and must not change."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def finished():
    """Trainers whose runs are over, by name."""
    return {}


@pytest.fixture
def uninterrupted(make_trainer, kept, finished):
    if "uninterrupted" not in finished:
        trainer = make_trainer(kept / "uninterrupted", **SETTINGS)
        trainer.train()
        finished["uninterrupted"] = trainer
    return finished["uninterrupted"]


@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 6)), 3, 11, 12, 13])
def test_resumed_run_equals_the_uninterrupted_run(make_trainer, uninterrupted, step):
    checkpoint = Path(uninterrupted.args.output_dir) / f"checkpoint-{step}"
    resumed = make_trainer("resumed", log_images=True, **SETTINGS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 14
    assert_same_state(resumed, uninterrupted)
    for found, expected in zip(resumed.state.log_history, uninterrupted.state.log_history, strict=True):
        measured = {key: value for key, value in expected.items() if key.startswith("balance/")}
        assert {key: found[key] for key in measured} == pytest.approx(measured, rel=0, abs=0, nan_ok=True)
    first = (Path(uninterrupted.args.output_dir) / "checkpoint-14/pytorch_lora_weights.safetensors").read_bytes()
    second = (Path(resumed.args.output_dir) / "checkpoint-14/pytorch_lora_weights.safetensors").read_bytes()
    assert first == second


def test_sampling_goes_on_where_it_stopped(make_trainer):
    """The prompts of a resumed run are those that the uninterrupted run had after the checkpoint."""

    def with_log(folder, **kwargs):
        seen = []

        def note(images, prompts, **kwargs):
            seen.append(tuple(prompts))
            return [float(len(prompt)) for prompt in prompts]

        trainer = make_trainer(folder, reward_funcs=[note], **SETTINGS | {"max_steps": 12})
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
    repaired = make_trainer("broken", **settings)
    repaired.train(resume_from_checkpoint=True)
    assert_same_state(repaired, uninterrupted)


def test_a_failure_saves_although_an_older_run_left_a_checkpoint_of_that_step(make_trainer, rewards):
    settings = SETTINGS | {"max_steps": 4}
    older = make_trainer("shared", **settings)
    older.train()

    def breaks(images, trainer_state, **kwargs):
        if trainer_state.global_step == 4:
            raise ConnectionError("scorer went away")
        return rewards[0](images)

    breaks.__name__ = "brightness"
    own = SETTINGS | {"save_strategy": "no", "seed": 7, "overwrite_output_dir": True}
    broken = make_trainer("shared", reward_funcs=[breaks, *rewards[1:]], **own)
    with pytest.raises(RewardError):
        broken.train()
    saved = load_file(Path(broken.args.output_dir) / "checkpoint-4" / "marble_state.safetensors")
    for name, parameter in broken.weights.trained.items():
        assert torch.equal(saved[f"current/{name}"], parameter), name


def test_a_checkpoint_without_the_optimizer_is_refused(make_trainer):
    trainer = make_trainer(**SETTINGS | {"max_steps": 1, "save_only_model": True})
    trainer.train()
    fresh = make_trainer("resumed", **SETTINGS)
    before = [parameter.detach().clone() for parameter in fresh.weights.parameters]
    with pytest.raises(FileNotFoundError, match="save_only_model"):
        fresh.train(resume_from_checkpoint=trainer.args.output_dir + "/checkpoint-1")
    assert all(map(torch.equal, before, fresh.weights.parameters))  # nothing of it was loaded


# ---- Checkpoints that are not as they were written ----


SHORT = SETTINGS | {"max_steps": 6}


@pytest.fixture
def short_run(make_trainer, kept):
    """The folder of a run of six steps."""
    if not (kept / "short").exists():
        make_trainer(kept / "short", **SHORT).train()
    return kept / "short"


@pytest.fixture
def saved(short_run, tmp_path):
    """A copy of that folder, which a test may change."""
    return Path(shutil.copytree(short_run, tmp_path / "saved"))


def assert_same_checkpoint(folder, other):
    """The same weights, balance and optimizer, byte for byte."""
    assert find_damage(folder) is None
    name = "marble_state.safetensors"
    assert (folder / name).read_bytes() == (other / name).read_bytes()
    tensors, expected = (load_file(each / "optimizer.safetensors") for each in (folder, other))
    assert tensors.keys() == expected.keys() and all(tensors[key].equal(expected[key]) for key in tensors)


def test_resuming_takes_the_latest_valid_checkpoint_and_says_so(make_trainer, saved, short_run, caplog):
    (saved / "checkpoint-6" / "scheduler.safetensors").unlink()
    content = (saved / "checkpoint-5" / "optimizer.safetensors").read_bytes()
    (saved / "checkpoint-5" / "optimizer.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = make_trainer(saved, **SHORT)
    with pytest.raises(DamagedCheckpointError, match=f"optimizer.safetensors.*resume from `{saved}/checkpoint-4`"):
        resumed.train(resume_from_checkpoint=str(saved / "checkpoint-5"))
    resumed.train(resume_from_checkpoint=True)
    (warning,) = [message for message in caplog.messages if "Passed over" in message]
    assert "checkpoint-4`. Passed over: `checkpoint-6` (`scheduler.safetensors` is missing), `checkpoint-5`" in warning
    for step in (5, 6):  # written anew
        assert_same_checkpoint(saved / f"checkpoint-{step}", short_run / f"checkpoint-{step}")


def test_pickles_are_neither_written_nor_read(make_trainer, saved, short_run):
    checkpoint = saved / "checkpoint-3"
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "optimizer.bin"):
        (checkpoint / name).write_bytes(b"no pickle, and no harm")
    make_trainer("resumed", **SHORT).train(resume_from_checkpoint=str(checkpoint))
    assert_same_checkpoint(saved.parent / "resumed" / "checkpoint-6", short_run / "checkpoint-6")


# ---- What else goes on where it was ----


def test_a_run_that_was_over_takes_no_step_more(make_trainer, saved, short_run):
    """As after a kill between the last checkpoint and the end of the script."""
    resumed = make_trainer(saved, **SHORT)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    resumed.save_model()
    name = "pytorch_lora_weights.safetensors"
    assert (saved / name).read_bytes() == (short_run / "checkpoint-6" / name).read_bytes()
    assert len(list(saved.glob("checkpoint-*"))) == 6


class Counts(TrainerCallback, ExportableState):
    """A callback with a state."""

    def __init__(self, first=0):
        self.first, self.seen = first, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        assert find_damage(Path(args.output_dir) / f"checkpoint-{state.global_step}") is None

    def state(self):
        return {"args": {"first": self.first}, "attributes": {"seen": self.seen}}


def test_callbacks_with_a_state_get_it_back(make_trainer, saved, short_run):
    settings = SHORT | {"restore_callback_states_from_checkpoint": True}
    whole = make_trainer("whole", callbacks=[Counts(1)], **settings)
    whole.train()
    assert_same_checkpoint(Path(whole.args.output_dir) / "checkpoint-6", short_run / "checkpoint-6")
    resumed = make_trainer("resumed", callbacks=[Counts(1)], **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    (callback,) = [each for each in resumed.callback_handler.callbacks if isinstance(each, Counts)]
    assert callback.first == 1 and callback.seen == [1, 2, 3, 4, 5, 6]
    state = json.loads((Path(resumed.args.output_dir) / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Counts"] == [{"args": {"first": 1}, "attributes": {"seen": [*range(1, 7)]}}]


def test_other_optimizers_and_schedules_go_on(make_trainer):
    settings = SHORT | {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 4}
    whole = make_trainer("whole", **settings)
    whole.train()
    resumed = make_trainer("resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert_same_state(resumed, whole)
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


class Unsaveable(torch.optim.SGD):
    def state_dict(self):
        return super().state_dict() | {"seen": {1, 2}}


def test_an_optimizer_that_only_pickle_could_save_is_named(make_trainer, tmp_path):
    optimizer = Unsaveable([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    trainer = make_trainer("odd", optimizers=(optimizer, None), **SHORT)
    with pytest.raises(TypeError, match="the optimizer Unsaveable cannot be saved: `state_dict...seen` is a set"):
        trainer.train()
    assert not list((tmp_path / "odd").glob("*checkpoint-*"))


def test_the_best_checkpoint_is_kept_beside_the_newest(make_trainer, prompts):
    values = iter([1.0, 3.0, 2.0, 1.5])

    def judged(images, trainer_state, **kwargs):
        return [float(i) for i in range(len(images))]

    def seen_once_an_evaluation(images, **kwargs):
        return [next(values)] * len(images)

    trainer = make_trainer(
        reward_funcs=[judged],
        eval_reward_funcs=[seen_once_an_evaluation],
        eval_dataset=prompts.select(range(2)),
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="rewards/seen_once_an_evaluation/mean",
        greater_is_better=True,
        **SETTINGS | {"max_steps": 4, "save_total_limit": 2},
    )
    trainer.train()
    folder = Path(trainer.args.output_dir)
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2") and state["best_metric"] == 3.0
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


def test_the_best_checkpoint_is_loaded_at_the_end(make_trainer, prompts):
    values = iter([1.0, 3.0, 2.0])

    def judged(images, **kwargs):
        return [float(i) for i in range(len(images))]

    def seen_once_an_evaluation(images, **kwargs):
        return [next(values)] * len(images)

    trainer = make_trainer(
        reward_funcs=[judged],
        eval_reward_funcs=[seen_once_an_evaluation],
        eval_dataset=prompts.select(range(2)),
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="rewards/seen_once_an_evaluation/mean",
        load_best_model_at_end=True,
        **SETTINGS | {"max_steps": 3},
    )
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    best = load_file(folder / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    last = load_file(folder / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    saved = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in best.items())
    assert not all(torch.equal(saved[name], value) for name, value in last.items())


def test_a_metric_that_no_evaluation_has_is_refused_at_once(make_trainer, prompts):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": {"one": prompts, "two": prompts}}
    gains = ("eval_gain_worst", "two_joint_fall", "gain/redness/mean")
    for known in ("rewards/brightness/mean", "eval_one_rewards/redness/valid", "my_own_gain_worst", *gains):
        args = make_trainer(metric_for_best_model=known, eval_on_start=True, **settings).args
        assert args.greater_is_better == (known != "two_joint_fall")
    for unknown in ("rewards/beauty/mean", "gain_wrost", "one_gain/redness"):
        match = f"'{unknown}', which no evaluation has.* two_gain_worst, .* two_rewards/redness/mean"
        with pytest.raises(ValueError, match=match):
            make_trainer(metric_for_best_model=unknown, eval_on_start=True, **settings)
    for gain in gains:
        with pytest.raises(ValueError, match=f"'{gain}', which is measured from .* set `eval_on_start=True`"):
            make_trainer(metric_for_best_model=gain, **settings)


def test_half_an_update_is_not_saved(make_trainer, caplog):
    """Weights of step 3 and the averages of step 2 make no checkpoint."""

    class Interrupts(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(callbacks=[Interrupts()], **SHORT | {"save_strategy": "no"})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "Training stopped inside an update" in caplog.text and "is saved in" not in caplog.text
    assert not list(Path(trainer.args.output_dir).glob("*checkpoint-*"))


def test_where_a_checkpoint_cannot_be_loaded_nothing_is_saved(make_trainer, saved):
    """A trainer that has trained before is then neither what it was nor what was to be loaded."""
    trainer = make_trainer("other", reward_funcs=[lambda images, **kwargs: [0.0] * len(images)], max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="checkpoint-3` was written with rewards"):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-3"))
    assert not list(Path(trainer.args.output_dir).glob("*checkpoint-*"))
