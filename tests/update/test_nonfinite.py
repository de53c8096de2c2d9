# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""NaN and infinity put into a run on purpose: they are named and counted, and no weight ever holds one."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import blue, bright, small_trainer
from transformers import TrainerCallback

from trl_marble.checkpoint.tensor_tree import load_tree
from trl_marble.rewards import RewardError


# Two prompts x four images, two micro-batches and two timesteps; no clipping and a small step, to compare gradients.
SETTINGS = {
    "num_generations": 4,
    "gradient_accumulation_steps": 2,
    "timestep_fraction": 1.0,
    "balance_every": 1,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-6,
    "max_steps": 1,
    "beta": 0.0,
}


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        self.gradients.append(None if grads[0] is None else torch.cat([grad.flatten() for grad in grads]))


class Fault:
    """Multiplies one sample of one call of the transformer by NaN or infinity, as an overflow inside would."""

    def __init__(self, trainer, call, row=None, *, training, factor=math.nan):
        self.calls, self.call, self.row, self.training, self.factor = 0, call, row, training, factor
        trainer.flow.transformer.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if output[0].requires_grad != self.training:
            return None
        self.calls += 1
        if self.calls != self.call and self.call is not None:
            return None
        factor = torch.ones(len(output[0]), 1, 1, 1)
        factor[slice(None) if self.row is None else self.row] = self.factor
        return (output[0] * factor, *output[1:])


def build(folder, rewards=(bright, blue), **overrides):
    keep = KeepGradients()
    trainer = small_trainer(folder, rewards, callbacks=[keep], **(SETTINGS | overrides))
    trainer.kept = keep.gradients
    return trainer


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_finite(trainer):
    for group in trainer.weights.state_dict().values():
        assert all(tensor.isfinite().all() for tensor in group.values())


def assert_saved_finite(folder):
    """A checkpoint that holds no NaN where there must be none."""
    state = load_file(folder / "marble_state.safetensors") | load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for name, value in state.items() if not name.startswith("balance/"))


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.weights.parameters])


# ---- Rewards ----


def unless_first(value):
    """`bright`, which answers `value` for the first image of each batch."""

    def reward(images, **kwargs):
        return [value, *bright(images[1:])]

    return reward


def test_an_infinite_reward_is_masked_like_one_that_does_not_apply(tmp_path):
    masked = build(tmp_path / "a", (unless_first(math.inf), blue), on_nonfinite="skip")
    masked.train()
    none = build(tmp_path / "b", (unless_first(None), blue))
    none.train()
    assert masked.kept[0].equal(none.kept[0]) and masked.kept[0].norm() > 0
    assert logged(masked, "rewards/reward/failed") == [2] and logged(masked, "rewards/blue/failed") == [0]


@pytest.mark.parametrize("reward_failure", ["raise", "mask"])
def test_an_infinite_reward_stops_training_whatever_failures_mean(tmp_path, reward_failure):
    trainer = build(tmp_path, (unless_first(-math.inf), blue), reward_failure=reward_failure)
    with pytest.raises(RewardError, match=r"`reward` returned float -inf for the prompt '.*on_nonfinite='skip'"):
        trainer.train()


def test_a_failure_is_not_masked_because_infinity_is(tmp_path):
    trainer = build(tmp_path, (unless_first(OSError("cannot see")), unless_first(math.inf)), on_nonfinite="skip")
    with pytest.raises(RewardError, match="raised OSError: cannot see .*reward_failure='mask'"):
        trainer.train()


# ---- Latents ----


def test_a_sample_without_latents_counts_for_nothing(tmp_path):
    """With `beta=0` an image without rewards has no gradient, so the run is the one in which it has none."""
    shown = []

    def counted(images, **kwargs):
        shown.append(len(images))
        return bright(images)

    masked = build(tmp_path / "a", (counted, blue), on_nonfinite="skip")
    Fault(masked, 2, 1, training=False)
    masked.train()
    assert shown == [3, 4]  # rewards never see it

    def without_second(reward):
        calls = []

        def partly(images, **kwargs):
            calls.append(None)
            return [None if len(calls) == 1 and i == 1 else value for i, value in enumerate(reward(images))]

        return partly

    none = build(tmp_path / "b", (without_second(bright), without_second(blue)))
    none.train()
    assert relative_error(masked.kept[0], none.kept[0]) < 1e-5 and none.kept[0].norm() > 0
    assert logged(masked, "nonfinite/latents") == [1] and not logged(none, "nonfinite/latents")
    assert logged(masked, "rewards/counted/valid") == [7 / 8]
    for metric in ("loss", "drift/latent_rms", "drift/velocity_rms", "drift/diversity"):
        assert math.isfinite(logged(masked, metric)[0]), metric
    assert_finite(masked)


def test_a_run_resumed_inside_a_generation_batch_leaves_the_same_samples_out(tmp_path):
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "on_nonfinite": "skip"}
    settings |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3, "beta": 0.1}
    trainer = build(tmp_path / "a", **settings)
    Fault(trainer, 1, None, training=False)  # four of eight samples
    trainer.train()
    assert_saved_finite(tmp_path / "a" / "checkpoint-1")
    resumed = build(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert weights_of(resumed).equal(weights_of(trainer)) and resumed.kept[0].norm() > 0


def test_a_batch_without_any_latents_always_stops(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip")
    Fault(trainer, None, training=False, factor=math.inf)
    with pytest.raises(
        FloatingPointError, match="latents of all 8 sampled images are not finite: nothing is left to train on"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert trainer.together.failed  # several processes would have saved a step that was trained before


def test_an_evaluation_without_any_latents_always_stops(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip", num_generations_eval=1)
    Fault(trainer, None, training=False, factor=math.inf)
    with pytest.raises(FloatingPointError, match="latents of all 6 images of the evaluation are not finite.*Usual"):
        trainer.evaluate(trainer.train_dataset)
    assert trainer.together.failed


def test_evaluation_counts_samples_without_latents(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip", per_device_eval_batch_size=4, num_generations_eval=2)
    Fault(trainer, 1, 0, training=False)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_nonfinite/latents"] == 1 and metrics["eval_rewards/bright/valid"] == pytest.approx(11 / 12)
    assert math.isfinite(metrics["eval_drift/diversity"]) and math.isfinite(metrics["eval_drift/velocity_norm"])


# ---- Losses of samples ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"balance_on": "loss", "old_policy_preset": 2},
        {"balance_fraction": 0.5},
        {"multi_objective_aggregation": "sum_then_normalize"},
        {"policy_loss": "awm", "awm_ema_beta": 0.5},
        {"policy_loss": "grpo", "timestep_fraction": 0.99, "num_inference_steps": 3},
    ],
    ids=["advantage", "loss", "streaming", "one loss", "awm", "grpo"],
)
def test_a_step_with_a_sample_that_overflows_is_skipped_and_counted(tmp_path, settings):
    trainer = build(tmp_path / "a", on_nonfinite="skip", max_steps=3, **settings)
    calls_of_a_step = 4
    Fault(trainer, calls_of_a_step + 3, 3, training=True)  # in the second step
    weights = []

    class KeepWeights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(weights_of(trainer))

    trainer.add_callback(KeepWeights())
    trainer.train()
    assert trainer.kept[0] is not None and trainer.kept[1] is None and trainer.kept[2] is not None
    assert weights[0].equal(weights[1]) and not weights[1].equal(weights[2])
    assert logged(trainer, "nonfinite/skipped_steps") == [0, 1, 0]
    assert_finite(trainer)


def test_a_run_without_faults_is_the_same_with_skip(tmp_path):
    skips, usual = build(tmp_path / "a", on_nonfinite="skip", beta=0.1), build(tmp_path / "b", beta=0.1)
    skips.train()
    usual.train()
    assert skips.kept[0].equal(usual.kept[0])
    counted = {key: value for key, value in skips.state.log_history[0].items() if key.startswith("nonfinite/")}
    assert counted == {"nonfinite/latents": 0, "nonfinite/skipped_steps": 0}
    assert not any(key.startswith("nonfinite/") for key in usual.state.log_history[0])


@pytest.mark.parametrize("training", [False, True], ids=["latents", "update"])
def test_raise_names_it_saves_what_was_trained_and_the_run_can_be_resumed(tmp_path, training):
    settings = {"max_steps": 3, "learning_rate": 1e-3, "beta": 0.1}
    trainer = build(tmp_path / "a", **settings)

    class FaultInSecondStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            Fault(trainer, 2 if training else 1, 1, training=training)

    trainer.add_callback(FaultInSecondStep())
    where = (
        r"Step 2: .* not finite; 1 losses .* of sample \d \(prompt '.+'\) at t = \d\.\d+ on process 0.*learning_rate"
        if training
        else r"latents of 1 of \d images that were sampled together are not finite, first for the prompt '.+'"
    )
    with pytest.raises(FloatingPointError, match=where + ".*on_nonfinite='skip'"):
        trainer.train()
    assert_finite(trainer)
    folder = tmp_path / "a"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert_saved_finite(folder / "checkpoint-1")
    resumed = build(tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=True)
    uninterrupted = build(tmp_path / "b", **settings)
    uninterrupted.train()
    assert weights_of(resumed).equal(weights_of(uninterrupted))


def test_poisoned_weights_stop_a_run_that_skips_and_are_not_saved(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip", max_steps=3)

    class Poison(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.weights.parameters[0].data.fill_(torch.nan)

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match="nothing is left"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- Gradients ----


def break_reward(trainer, row):
    finish = trainer.update.gradient.finish

    def broken():
        trainer.update.gradient._rows.gradients[row, 5] = torch.inf
        finish()

    trainer.update.gradient.finish = broken


def test_a_step_with_a_reward_without_a_gradient_is_skipped(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip")
    break_reward(trainer, 1)
    before = weights_of(trainer)
    trainer.train()
    assert trainer.kept == [None] and weights_of(trainer).equal(before)
    assert logged(trainer, "nonfinite/skipped_steps") == [1]
    assert all(math.isnan(value) for value in logged(trainer, "balance/grad_norm/blue"))
    assert trainer.schedule.alpha.isnan().all()  # nothing was learned from it
    assert_finite(trainer)


def test_raise_names_the_reward(tmp_path):
    trainer = build(tmp_path)
    break_reward(trainer, 1)
    with pytest.raises(FloatingPointError, match="Step 1: the gradient of the rewards `blue` is not finite"):
        trainer.train()


def overflow(trainer, first_step=1):
    trainer.weights.parameters[3].register_hook(
        lambda grad: grad * math.inf if trainer.state.global_step >= first_step else grad
    )


ONE_LOSS = {"multi_objective_aggregation": "sum_then_normalize", "learning_rate": 1e-3, "weight_decay": 0.1}


def test_a_step_without_a_direction_is_skipped(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip", max_steps=2, save_strategy="steps", save_steps=1, **ONE_LOSS)
    overflow(trainer)
    trainer.train()
    first, second = (load_file(tmp_path / f"checkpoint-{n}" / "marble_state.safetensors") for n in (1, 2))
    for name, value in first.items():
        if name.startswith("current/"):
            assert value.equal(second[name]), name
    steps = [load_tree(tmp_path / f"checkpoint-{n}" / "optimizer.safetensors")["state"] for n in (1, 2)]
    for i, moments in steps[0].items():
        assert all(value.equal(steps[1][i][name]) for name, value in moments.items())
    assert trainer.kept[1] is None
    assert logged(trainer, "nonfinite/skipped_steps") == [0, 1]
    assert_finite(trainer)


def test_raise_stops_at_a_step_without_a_direction(tmp_path):
    trainer = build(tmp_path, max_steps=2, **ONE_LOSS)
    overflow(trainer)
    with pytest.raises(FloatingPointError, match="Step 2: the norm of the update's direction is not finite"):
        trainer.train()
    assert_saved_finite(tmp_path / "checkpoint-1")


def test_ten_consecutive_skipped_steps_stop_training(tmp_path):
    trainer = build(tmp_path, on_nonfinite="skip", max_steps=20, num_inference_steps=1, **ONE_LOSS)
    overflow(trainer, first_step=0)
    with pytest.raises(FloatingPointError, match="Step 10: .* the 10th consecutive step"):
        trainer.train()


# ---- On disk ----


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert len(files) == 6
    name, value = next(iter(trainer.weights.averaged.state_dict().items()))
    value[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="`" + name.replace(".", r"\.") + "` of the averaged weights"):
        trainer.save_model()
    trainer.state.global_step = 2
    with pytest.raises(FloatingPointError, match="of the average weights"):
        trainer._save_checkpoint(trainer.model, None)
    value[0, 0] = 0.0
    moments = next(iter(trainer.optimizer.state.values()))
    moments["exp_avg_sq"][0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="`exp_avg_sq` of the optimizer"):
        trainer._save_checkpoint(trainer.model, None)
    assert {file: file.read_bytes() for file in Path(tmp_path).rglob("*.safetensors")} == files
    assert not (tmp_path / "checkpoint-2").exists()
