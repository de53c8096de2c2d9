# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Training with the losses that compare the samples of a prompt: resumed, skipped, sampled apart, and guided."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import small_trainer
from transformers import TrainerCallback

from trl_marble.balance import old_policy_decay
from trl_marble.balance.ema import OLD_POLICY_PRESETS


# Two optimizer steps a generation batch, each with a half of every group.
SETTINGS = {
    "num_generations": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "learning_rate": 1e-2,
    "balance_every": 1,
    "beta": 0.1,
}
LOSSES = {
    "crd": {
        "policy_loss": "crd",
        "old_policy_preset": 4,
        "sampling_policy_preset": 3,
        "reference_guidance_scale": 4.0,
    },
    "dgpo": {"policy_loss": "dgpo", "old_policy_preset": 3, "dgpo_clip_range": 1.0},
}


def weights_of(trainer):
    return {
        f"{kind} {name}": weight.clone()
        for kind, weights in trainer.weights.state_dict().items()
        for name, weight in weights.items()
    }


@pytest.mark.parametrize("name", LOSSES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    settings = SETTINGS | LOSSES[name] | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = small_trainer(tmp_path / "whole", **settings)
    whole.train()
    row = next(row for row in whole.state.log_history if "balance/cos_min" in row)
    assert row["balance/cos_min"] >= -1e-6
    assert ("sampler" in whole.weights.state_dict()) == (name == "crd")
    for step in (1, 2):  # in a generation batch, and between two
        resumed = small_trainer(tmp_path / str(step), **settings)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        found, expected = weights_of(resumed), weights_of(whole)
        assert found.keys() == expected.keys()
        assert [key for key, value in expected.items() if not found[key].equal(value)] == []


def test_a_run_goes_on_with_a_policy_apart_that_samples(tmp_path):
    """Its weights begin as the trained ones, as at the start of a run."""
    settings = SETTINGS | {"policy_loss": "crd", "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = small_trainer(tmp_path / "run", **settings)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-2"
    assert not any(key.startswith("sampler") for key in load_file(Path(checkpoint) / "marble_state.safetensors"))
    other = small_trainer(tmp_path / "other", **settings | {"sampling_policy_preset": 2})
    other.run_state.load(Path(checkpoint))
    for name, weight in trainer.weights.trained.items():
        assert other.weights.sampler.state_dict()[name].equal(weight)


def test_the_policy_that_samples_has_a_schedule_of_its_own(tmp_path):
    settings = SETTINGS | LOSSES["crd"] | {"max_steps": 6}
    trainer = small_trainer(tmp_path / "run", **settings)
    weights, shadows, sampled = trainer.weights, {}, []
    name = next(iter(weights.trained))
    for kind, preset in (("old", 4), ("sampler", 3)):
        shadows[kind] = OLD_POLICY_PRESETS[preset], weights.trained[name].detach().clone()
    sample = trainer.rollouts.sample

    def sample_and_look(*args):
        sampled.append(weights.trained[name].data_ptr() == weights.sampler.state_dict()[name].data_ptr())
        return sample(*args)

    trainer.rollouts.sample = sample_and_look

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 0:
                for kind, (preset, value) in shadows.items():
                    decay = old_policy_decay(state.global_step, *preset)
                    value.lerp_(weights.trained[name].detach(), 1 - decay)
                    torch.testing.assert_close(getattr(weights, kind).state_dict()[name], value)

    trainer.add_callback(Follow())
    trainer.train()
    assert sampled == [True] * 3
    old, sampler = (getattr(weights, kind).state_dict()[name] for kind in ("old", "sampler"))
    assert not old.equal(sampler)


def test_the_schedule_of_crd_begins_at_a_quarter():
    decays = [old_policy_decay(step, *OLD_POLICY_PRESETS[4]) for step in (0, 1, 10, 1000)]
    assert decays == pytest.approx([0.25, 0.255, 0.3, 0.999])


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_with_a_sample_that_overflows_is_skipped_and_counted(tmp_path, name):
    trainer = small_trainer(tmp_path, on_nonfinite="skip", **SETTINGS | LOSSES[name] | {"max_steps": 3})
    before, rows = [], []

    class Overflow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.append(weights_of(trainer))
            if state.global_step == 1:
                self.hook = trainer.flow.transformer.register_forward_hook(self.overflow)

        def overflow(self, module, inputs, output):
            """The first sample that is looked at before the step, once."""
            self.hook.remove()
            factor = torch.ones(len(output[0]), 1, 1, 1)
            factor[0] = torch.nan
            return (output[0] * factor, *output[1:])

        def on_log(self, args, state, control, logs=None, **kwargs):
            rows.append(logs)

    trainer.add_callback(Overflow())
    trainer.train()
    counted = [row["nonfinite/skipped_steps"] for row in rows if "nonfinite/skipped_steps" in row]
    assert counted == [0, 1, 0]
    now = weights_of(trainer)
    assert all(value.isfinite().all() for value in now.values())
    current = [key for key in now if key.startswith("current")]
    assert all(before[2][key].equal(before[1][key]) for key in current)
    assert not all(now[key].equal(before[2][key]) for key in current)


def test_what_is_not_finite_is_named(tmp_path):
    trainer = small_trainer(tmp_path, **SETTINGS | LOSSES["crd"])
    name = next(iter(trainer.weights.trained))

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.weights.old.state_dict()[name].fill_(torch.nan)

    trainer.add_callback(Break())
    with pytest.raises(
        FloatingPointError, match=r"Step 2: .* losses \(of a sample at a timestep\) are not finite, first"
    ):
        trainer.train()


def flat(images, **kwargs):
    return [0.0] * len(images)


def test_the_kl_to_the_guided_base_model_teaches_guidance(tmp_path):
    """With a reward that says nothing, the unguided policy goes where guidance would take the base model."""
    settings = SETTINGS | {"max_steps": 8, "steps_per_generation": 2, "beta": 1.0, "timestep_fraction": 1.0}
    guided = {"policy_loss": "crd", "reference_guidance_scale": 4.0, "per_device_train_batch_size": 4}
    trainer = small_trainer(tmp_path / "run", reward_funcs=[flat], **settings | guided)
    seen = {}

    def look(kind):
        conditioning = trainer.flow.encode(["a red dog", "tree"])
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        t = torch.tensor([0.5, 0.9])
        scale, trainer.flow.reference_guidance_scale = trainer.flow.reference_guidance_scale, None
        base = trainer.weights.base_velocity(noise, t, conditioning)
        trainer.flow.reference_guidance_scale = scale
        seen[kind] = trainer.weights.detached_velocity(noise, t, conditioning) - base
        return trainer.weights.base_velocity(noise, t, conditioning) - base

    guidance = look("before")
    trainer.train()
    look("after")
    assert seen["before"].norm() == 0 and guidance.norm() > 0
    cosine = torch.cosine_similarity(seen["after"].flatten(), guidance.flatten(), dim=0)
    assert cosine > 0.4 and (seen["after"] - guidance).norm() < 0.9 * guidance.norm()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["guided_kl"] < 0.8 * rows[0]["guided_kl"] and not any("kl" in row for row in rows)
