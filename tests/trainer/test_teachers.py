# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Runs that learn from teachers: alone, of sources and of all prompts, and beside rewards."""

import json
import math
from pathlib import Path

import pytest
import torch
from adapter_helpers import add_trained_adapter
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import tiny_flux, tiny_sd3
from trainer_helpers import PROMPTS, blue, bright, small_trainer
from transformers import TrainerCallback

from trl_marble.hub import save_adapter
from trl_marble.pipelines import FlowPipeline, loaded_adapter


# Plain distillation: the mean distance to the teacher, and nothing else.
PLAIN = {"reward_funcs": None, "multi_objective_aggregation": "sum_then_normalize", "beta": 0.0}
SOURCES = ["animals", "animals", "things", "things", "things", "nature"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the tiny base model, of different ranks, as folders; and one of another model."""
    folder = tmp_path_factory.mktemp("adapters")
    for place, name in enumerate(("first", "second")):
        pipeline = tiny_sd3(num_layers=1)
        add_trained_adapter(pipeline, seed=place, r=3 + place)
        save_adapter(pipeline, folder / name)
    pipeline = tiny_sd3(num_layers=1)
    add_trained_adapter(pipeline, seed=2, std=0.2, target_modules=["to_v", "to_out.0"])  # soon learned
    save_adapter(pipeline, folder / "mild")
    flux = tiny_flux()
    flux.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    save_adapter(flux, folder / "flux")
    return folder


@pytest.fixture
def prompts():
    return Dataset.from_dict({"prompt": PROMPTS, "source": SOURCES})


def velocities(transformer_owner, adapter=None):
    """At fixed noisy inputs, of a pipeline as it is or with an adapter of a file."""
    flow = FlowPipeline(transformer_owner, max_sequence_length=16)
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    conditioning = flow.encode(["a cat", "tree", "sky"])
    with torch.no_grad(), loaded_adapter(flow.pipeline, adapter):
        flow.transformer.eval()
        return flow.velocity(x_t, torch.tensor([0.3, 0.6, 0.9]), conditioning)


@pytest.mark.parametrize("states", ["noised", "trajectory"])
def test_a_student_of_one_teacher_comes_nearer_to_it(tmp_path, adapters, states):
    settings = {"max_steps": 14, "learning_rate": 5e-3, "weight_ema_decay": 0.0, "num_inference_steps": 4}
    settings |= {"timestep_fraction": 1.0, "per_device_train_batch_size": 6, "teacher_states": states}
    trainer = small_trainer(tmp_path / "run", teachers={"all": adapters / "mild"}, **PLAIN, **settings)
    trainer.train()
    losses = [row["teachers/all/loss"] for row in trainer.state.log_history if "teachers/all/loss" in row]
    assert losses == pytest.approx([row["loss"] for row in trainer.state.log_history if "loss" in row], rel=1e-4)
    assert sum(losses[-3:]) < 0.4 * sum(losses[:3])
    trainer.save_model()
    student = velocities(tiny_sd3(num_layers=1), tmp_path / "run" / "pytorch_lora_weights.safetensors")
    teacher = velocities(tiny_sd3(num_layers=1), adapters / "mild" / "pytorch_lora_weights.safetensors")
    base = velocities(tiny_sd3(num_layers=1))
    assert (student - teacher).norm() < 0.6 * (base - teacher).norm()


def test_along_the_trajectory_the_inputs_are_what_the_solver_went_through(tmp_path, adapters):
    settings = {"num_inference_steps": 3, "timestep_fraction": 0.7, "max_steps": 1, "per_device_train_batch_size": 4}
    trainer = small_trainer(
        tmp_path / "run", teachers={"all": adapters / "mild"}, teacher_states="trajectory", **PLAIN, **settings
    )
    asked, velocity = [], trainer.weights.velocity

    def note(x_t, t, conditioning):
        asked.append((x_t, t))
        return velocity(x_t, t, conditioning)

    trainer.weights.velocity = note
    trainer.train()
    batch = trainer._batch
    points, times = batch.transitions.points, batch.transitions.times
    assert len(asked) == 2 and points.shape[:2] == (4, 3)  # two of three states of each sample
    assert points[:, 0].std() == pytest.approx(1.0, abs=0.2)  # noise
    for x_t, t in asked:
        for sample in range(4):
            place = times.tolist().index(t[sample].item())
            assert x_t[sample].equal(points[sample, place])
    assert not asked[0][1].eq(asked[1][1]).any()  # without replacement


class Passes(TrainerCallback):
    """Counts samples that pass through the transformer in updates, and the backward passes."""

    def __init__(self):
        self.forwards, self.backwards = 0, 0

    def attach(self, trainer):
        transformer, sample = trainer.flow.transformer, trainer._sample

        def count(module, inputs, output):
            self.forwards += len(output[0])
            if output[0].requires_grad:
                output[0].register_hook(self._backward)

        def sample_uncounted(*arguments):
            before = self.forwards
            batch = sample(*arguments)
            self.forwards = before
            return batch

        transformer.register_forward_hook(count)
        trainer._sample = sample_uncounted
        return self

    def _backward(self, gradient):
        self.backwards += 1


# Aggregation, teachers, whether there are rewards -> velocities of teachers a sample, backward passes a micro-step.
COSTS = {
    "sources": ({"animals": "first", "things": "second"}, False, 5 / 6, 1),
    "sources and all": ({"animals": "first", "things": "second", "all:style": "first"}, False, 11 / 6, 2),
    "two of all": ({"all:a": "first", "all:b": "second"}, False, 2, 2),
    "rewards too": ({"animals": "first", "things": "second", "all:style": "first"}, True, 11 / 6, 3),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_teacher_is_asked_about_its_own_samples_and_lessons_are_backward_passes(tmp_path, adapters, prompts, name):
    teachers, has_rewards, asked, backwards = COSTS[name]
    trainer = small_trainer(
        tmp_path / "run",
        (bright, blue) if has_rewards else None,
        teachers={key: adapters / folder for key, folder in teachers.items()},
        train_dataset=prompts,
        per_device_train_batch_size=12,  # every prompt twice
        max_steps=1,
        beta=0.0,
        balance_every=1,
        timestep_fraction=0.5,
    )
    passes = Passes().attach(trainer)
    trainer.train()
    assert passes.forwards == 12 * (1 + asked) and passes.backwards == backwards
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    rows = [*(["bright", "blue"] if has_rewards else []), *(f"teacher_{key.split(':')[-1]}" for key in teachers)]
    assert [key.removeprefix("balance/cos/") for key in row if key.startswith("balance/cos/")] == rows
    assert row["balance/cos_min"] >= -1e-6 and math.isfinite(row["balance/heldout_cos_min"])
    assert sum(row[f"balance/alpha/{each}"] for each in rows) == pytest.approx(1.0)
    assert all(row[f"teachers/{key.split(':')[-1]}/loss"] > 0 for key in teachers)


def flat_gradient(trainer):
    return torch.cat([parameter.grad.flatten() for parameter in trainer.weights.parameters])


class KeepGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradient = flat_gradient(self.trainer)


def gradient_of_step(folder, prompts, reward_funcs=None, **settings):
    keep = KeepGradient()
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 12, "beta": 0.0} | settings
    trainer = small_trainer(folder, reward_funcs, train_dataset=prompts, callbacks=[keep], **settings)
    keep.trainer = trainer
    trainer.train()
    return keep.gradient, trainer


def test_where_rewards_are_summed_the_mean_distance_is_added_with_its_weight(tmp_path, adapters, prompts):
    teachers = {"animals": adapters / "first", "things": adapters / "second"}
    of_sum = {"multi_objective_aggregation": "normalize_then_sum", "old_policy_preset": 0}
    # The same images and the same noise: the first step's images are those of the base model.
    rewards, _ = gradient_of_step(tmp_path / "rewards", prompts, [bright, blue], **of_sum)
    alone, trainer = gradient_of_step(
        tmp_path / "alone", prompts, teachers=teachers, multi_objective_aggregation="normalize_then_sum"
    )
    both, _ = gradient_of_step(
        tmp_path / "both", prompts, [bright, blue], teachers=teachers, teacher_weight=3.0, **of_sum
    )
    assert alone.norm() > 0 and rewards.norm() > 0
    assert (both - rewards - 3 * alone).norm() < 1e-5 * both.norm()
    # The mean over all samples, of which one prompt's have no teacher.
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    mean = (2 * row["teachers/animals/loss"] + 3 * row["teachers/things/loss"]) / 6
    assert row["loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "crd", "dpo"])
def test_teachers_stand_beside_rewards_of_every_kind_of_loss(tmp_path, adapters, prompts, loss):
    settings = {"num_inference_steps": 4, "grpo_window_size": 1} if loss == "grpo" else {"timestep_fraction": 0.5}
    teachers = {"animals": adapters / "first", "all:style": adapters / "second"}
    trainer = small_trainer(
        tmp_path / "run",
        teachers=teachers,
        train_dataset=prompts,
        policy_loss=loss,
        per_device_train_batch_size=12,
        max_steps=2,
        balance_every=1,
        learning_rate=1e-2,
        **settings,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    for row in rows:
        assert row["teachers/animals/loss"] > 0 and row["teachers/style/loss"] > 0 and row["balance/cos_min"] >= -1e-6
        assert row["balance/alpha/bright"] + row["balance/alpha/teacher_style"] > 0


def test_a_run_with_rewards_and_teachers_resumes_bit_by_bit(tmp_path, adapters, prompts):
    settings = {
        "teachers": {"animals": adapters / "first", "all:style": adapters / "second"},
        "train_dataset": prompts,
        "steps_per_generation": 2,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
        "kl_target": 0.01,
        "balance_every": 2,
    }
    whole = small_trainer(tmp_path / "whole", **settings)
    whole.train()
    for step in (2, 3):  # between two generation batches, and inside one
        resumed = small_trainer(tmp_path / f"from-{step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name in ("marble_state", "optimizer", "pytorch_lora_weights"):
            one, other = (tmp_path / run / "checkpoint-5" / f"{name}.safetensors" for run in (f"from-{step}", "whole"))
            assert one.read_bytes() == other.read_bytes(), (step, name)
    others = settings | {"teachers": {"animals": adapters / "second", "all:style": adapters / "second"}}
    with pytest.raises(ValueError, match="was written with teachers = .*Resume with what the checkpoint"):
        small_trainer(tmp_path / "x", **others).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_what_is_saved_is_the_student_alone_and_its_card_names_the_teachers(tmp_path, adapters, prompts):
    config = LoraConfig(r=2, target_modules=["attn.to_q"])
    settings = {"teachers": {"animals": adapters / "first"}, "train_dataset": prompts, "peft_config": config}
    evaluated = {"eval_dataset": prompts.select(range(2)), "eval_strategy": "steps", "eval_steps": 1}
    trainer = small_trainer(tmp_path / "run", **PLAIN, **settings, **evaluated, eval_reward_funcs=bright)
    trainer.train()
    trainer.save_model()
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"to_q"}
    card = (tmp_path / "run" / "README.md").read_text()
    assert "distilled from one teacher" in card and "| `animals` | `first` |" in card and str(adapters) not in card
    assert json.loads((tmp_path / "run" / "model_card.json").read_text())["teachers"] == {"animals": "first"}
    assert any("eval_rewards/bright/mean" in row for row in trainer.state.log_history)
    assert all("gain_worst" not in key for row in trainer.state.log_history for key in row)


def test_without_any_reward_evaluations_measure_the_drift(tmp_path, adapters, prompts):
    evaluated = {"eval_dataset": prompts.select(range(2)), "eval_strategy": "steps", "eval_steps": 1}
    evaluated |= {"eval_on_start": True, "num_generations_eval": 2, "log_images": True}
    teachers = {"all": adapters / "first"}
    trainer = small_trainer(tmp_path / "run", teachers=teachers, train_dataset=prompts, **PLAIN, **evaluated)
    trainer.train()
    trainer.save_model()
    rows = [row for row in trainer.state.log_history if "eval_kl" in row]
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["eval_kl"] == 0 and rows[-1]["eval_kl"] > 0


def test_frozen_teachers_keep_the_precision_of_their_file(tmp_path, adapters, prompts):
    trainer = small_trainer(
        tmp_path / "run",
        pipeline=tiny_sd3(num_layers=1).to(torch.bfloat16),
        teachers={"all": adapters / "first"},
        train_dataset=prompts,
        **PLAIN,
    )
    own = {n: p for n, p in trainer.flow.transformer.named_parameters() if ".teacher_0." in n}
    assert own and all(p.dtype == torch.float32 and not p.requires_grad for p in own.values())
    saved = load_file(adapters / "first" / "pytorch_lora_weights.safetensors")
    assert all(p.equal(saved[f"transformer.{n.replace('.teacher_0', '')}"]) for n, p in own.items())
    assert all(".default." in n for n, p in trainer.flow.transformer.named_parameters() if p.requires_grad)


REFUSED = {
    "unknown source": (
        {"teachers": {"animal": "first"}},
        r"has 'animal', and `train_dataset` has the sources animals",
    ),
    "no column": ({"teachers": {"x": "first"}, "plain": True}, r"has no column `source`.*write 'all:x'"),
    "no mapping": ({"teachers": ["first"]}, "pass a mapping from sources of prompts to adapters"),
    "missing": ({"teachers": {"animals": "nowhere.safetensors"}}, "The teacher 'animals' cannot be loaded.*not exist"),
    "other model": (
        {"teachers": {"animals": "flux"}},
        "The teacher 'animals' cannot be loaded.*made for another model",
    ),
    "nothing": ({"reward_funcs": None}, "nothing to train on: pass `reward_funcs`, `teachers` or both"),
    "two names": ({"teachers": {"animals": "first", "all:animals": "first"}}, "two of the name 'animals'"),
    "unused weight": ({"teacher_weight": 2.0}, "`teacher_weight=2.0` has no effect without `teachers`"),
    "states": ({"teachers": {"all": "first"}, "teacher_states": "trajectory"}, "is for runs without rewards"),
    "unused states": ({"teacher_states": "trajectory"}, "`teacher_states='trajectory'` has no effect without `teach"),
    "unknown states": ({"teachers": {"all": "first"}, "teacher_states": "x"}, "must be one of 'noised', 'trajectory'"),
    "of rewards": (
        {"teachers": {"all": "first"}, "reward_funcs": None, "nft_beta": 0.5},
        "`nft_beta=0.5` has no effect without rewards",
    ),
    "progress": (
        {"teachers": {"all": "first"}, "reward_funcs": None, "multi_objective_aggregation": "progress"},
        "weighs rewards by their progress, and there are none",
    ),
    "weight": ({"teachers": {"all": "first"}, "teacher_weight": 0.0}, "`teacher_weight` is 0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_from_is_refused(tmp_path, adapters, prompts, name):
    settings, message = REFUSED[name]
    settings = dict(settings)
    if settings.pop("plain", False):
        prompts = prompts.remove_columns("source")
    teachers = settings.get("teachers")
    if isinstance(teachers, dict):
        settings["teachers"] = {key: adapters / folder for key, folder in teachers.items()}
    with pytest.raises((ValueError, TypeError, OSError), match=f"(?s){message}"):
        small_trainer(tmp_path / "run", train_dataset=prompts, **settings)


def test_a_teacher_that_changes_more_than_the_transformer_is_refused(tmp_path, adapters, prompts):
    weights = load_file(adapters / "first" / "pytorch_lora_weights.safetensors")
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    weights |= {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    Path(tmp_path / "both").mkdir()
    save_file(weights, tmp_path / "both" / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="changes text_encoder beside the transformer"):
        small_trainer(tmp_path / "run", teachers={"all": tmp_path / "both"}, train_dataset=prompts)
