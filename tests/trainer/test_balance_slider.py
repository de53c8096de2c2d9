# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Runs that train an adapter for every balance between their rewards."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_flux, tiny_sd3
from trainer_helpers import PROMPTS, bright, prompt_set, small_trainer

from trl_marble.balance import group_advantages
from trl_marble.hub import load_adapter, save_adapter
from trl_marble.hub.slider import split_adapter
from trl_marble.pipelines import FlowPipeline
from trl_marble.rollout import ShareDraws
from trl_marble.seeding import Draw, derive_seed


SLIDER = {"balance_slider": True, "multi_objective_aggregation": "normalize_then_sum"}
FILE = "pytorch_lora_weights.safetensors"


def dark(images, **kwargs):
    return [-value for value in bright(images)]


def flow_of(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return FlowPipeline(pipeline, max_sequence_length=16)


def load_parts(folder, names=("bright", "blue")):
    """On a fresh pipeline, as a user does."""
    flow = flow_of(tiny_sd3(num_layers=1))
    for name in names:
        flow.pipeline.load_lora_weights(
            str(folder), weight_name=f"adapters/{name}.safetensors", adapter_name=name, local_files_only=True
        )
    return flow


class OneByOne:
    """The parts of some weights of a trainer as adapters of their own, asked about one sample after the other."""

    def __init__(self, trainer, weights, folder):
        with weights.swapped_in():
            split_adapter(save_adapter(trainer.pipeline, folder), ["bright", "blue"])
        self.flow = load_parts(folder)

    def use(self, shares):
        self.flow.pipeline.set_adapters(["bright", "blue"], shares.tolist())

    @torch.no_grad()
    def velocity(self, x_t, t, conditioning, shares):
        parts = []
        for place, own in enumerate(shares):
            self.use(own)
            rows = torch.tensor([place])
            parts.append(self.flow.velocity(x_t[rows], t[rows], conditioning.select(rows)))
        return torch.cat(parts)


def trainer_with_weights(folder, **settings):
    """Whose policies, the trained and the old one, do something, each something else."""
    trainer = small_trainer(folder, **SLIDER | {"num_inference_steps": 4} | settings)
    weights = trainer.weights

    def fill(seed):
        generator = torch.Generator().manual_seed(seed)
        return {name: 0.2 * torch.randn(w.shape, generator=generator) for name, w in weights.trained.items()}

    state = weights.state_dict()
    weights.load_state_dict({kind: fill(1 if kind == "old" else 0) for kind in state})
    return trainer


def close(a, b, tolerance=1e-5):
    return (a - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize("resample", [0, 1])
def test_images_are_sampled_with_the_shares_of_their_prompt_which_weigh_its_advantages(tmp_path, resample):
    trainer = trainer_with_weights(
        tmp_path / "run", per_device_train_batch_size=6, reward_weights=[1.0, 3.0], resample_silent_prompts=resample
    )
    own = OneByOne(trainer, trainer.weights.old, tmp_path / "old")
    with trainer.weights.sampling(trainer.weights.old.swapped_in()):
        batch, record = trainer.rollouts.sample([0, 0, 1, 1, 4, 4], 3, trainer.state)
    places = batch.sample_ids.tolist()
    shares = ShareDraws(42, 2, 2).of(3, places)
    assert sorted(places) == list(range(6)) and len(shares.unique(dim=0)) == 3
    for row, place in enumerate(places):
        own.use(shares[row])
        conditioning = own.flow.encode([record.prompts[place]])
        seed = derive_seed(42, Draw.ROLLOUT, 3, place)
        assert close(batch.latents[row], own.flow.rollout(conditioning, [seed], 4).latents[0])
    each = group_advantages(record.all_rewards, torch.arange(6) // 2)[:, places]
    total = (torch.tensor([[1.0], [3.0]]) * shares.T * each).sum(dim=0, keepdim=True)
    assert batch.advantages.shape == (1, 6) and close(batch.advantages, total / total.std(correction=0), 1e-3)


@pytest.mark.parametrize("loss", ["nft", "crd", "grpo"])
def test_in_the_update_all_velocities_are_those_of_each_samples_own_mixture(tmp_path, loss):
    trainer = trainer_with_weights(tmp_path / "run", policy_loss=loss, max_steps=1, activation_checkpointing=True)
    weights = trainer.weights
    apart = {
        "velocity": OneByOne(trainer, weights.averaged, tmp_path / "now"),
        "detached_velocity": OneByOne(trainer, weights.averaged, tmp_path / "now"),
        "old_velocity": OneByOne(trainer, weights.old, tmp_path / "old"),
    }
    asked = []

    def noted(name, ask):
        def note(*arguments):
            velocity = ask(*arguments)
            asked.append((name, arguments, velocity.detach().clone()))
            return velocity

        return note

    for name in apart:
        setattr(weights, name, noted(name, getattr(weights, name)))
    trainer.train()
    shares = ShareDraws(42, 2, 2).of(0, trainer._batch.sample_ids.tolist())
    assert len(shares.unique(dim=0)) == 2
    assert {name for name, *_ in asked} == apart.keys() - (set() if loss == "crd" else {"detached_velocity"})
    for name, (x_t, t, conditioning), velocity in asked:
        assert close(velocity, apart[name].velocity(x_t, t, conditioning, shares)), name
        assert not close(velocity, apart[name].velocity(x_t, t, conditioning, shares.flip(1)), 1e-3), name


@pytest.mark.slow
def test_a_slider_between_opposites_moves_images_both_ways(tmp_path):
    settings = {"max_steps": 15, "learning_rate": 4e-3, "weight_ema_decay": 0.0, "per_device_train_batch_size": 32}
    settings |= {"num_generations": 8, "num_inference_steps": 2, "beta": 0.0, "timestep_fraction": 1.0}
    settings |= {"max_grad_norm": 0.0, "old_policy_preset": 0}
    trainer = small_trainer(tmp_path / "run", (bright, dark), **SLIDER | settings)
    trainer.train()
    trainer.save_model()
    flow = load_parts(tmp_path / "run", ("bright", "dark"))

    def brightness(shares):
        flow.pipeline.set_adapters(["bright", "dark"], shares)
        images = flow.rollout(flow.encode(PROMPTS * 2), range(12), 2).images
        return torch.tensor(bright(images))

    values = [brightness(shares) for shares in ([0.0, 1.0], [0.5, 0.5], [1.0, 0.0])]
    steps = [after - before for before, after in zip(values, values[1:], strict=False)]
    assert all(step.mean() > 0 for step in steps)
    whole = steps[0] + steps[1]  # of the same prompts and seeds
    assert whole.mean() > 3 * whole.std() / len(whole) ** 0.5


def test_it_resumes_bit_by_bit(tmp_path):
    settings = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 6, "save_strategy": "steps"}
    settings |= SLIDER | {"save_steps": 1, "learning_rate": 1e-2, "peft_config": LoraConfig(r=3, lora_alpha=7)}
    whole = small_trainer(tmp_path / "whole", **settings)
    whole.train()
    names = ["marble_state", "optimizer", "pytorch_lora_weights", "adapters/bright", "adapters/blue"]
    for step in (1, 4):  # inside a generation batch, and between two
        resumed = small_trainer(tmp_path / f"from-{step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name in names:
            one, other = (tmp_path / run / "checkpoint-6" / f"{name}.safetensors" for run in (f"from-{step}", "whole"))
            assert one.read_bytes() == other.read_bytes(), (step, name)
    # An adapter of the same shape without parts is another run.
    others = settings | {"balance_slider": False, "peft_config": LoraConfig(r=6, lora_alpha=7)}
    with pytest.raises(ValueError, match="balance_slider.*Resume with what the checkpoint"):
        small_trainer(tmp_path / "x", **others).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


def test_what_is_saved_is_the_equal_mixture_its_parts_and_how_to_mix_them(tmp_path):
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["to_q", "to_v"])
    trainer = small_trainer(
        tmp_path / "run", max_steps=3, learning_rate=1e-2, peft_config=config, eval_dataset=prompt_set(), **SLIDER
    )
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    shapes = {
        name: {min(weight.shape) for weight in load_file(folder / name).values()}
        for name in (FILE, "adapters/bright.safetensors", "adapters/blue.safetensors")
    }
    assert shapes == {FILE: {6}, "adapters/bright.safetensors": {3}, "adapters/blue.safetensors": {3}}

    whole, parts = flow_of(load_adapter(tiny_sd3(num_layers=1), folder)), load_parts(folder)
    parts.pipeline.set_adapters(["bright", "blue"], [0.5, 0.5])
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    inputs = x_t, torch.tensor([0.3, 0.8]), whole.encode(["a cat", "tree"])
    with torch.no_grad(), trainer.weights.sampling(trainer.weights.averaged.swapped_in()):
        expected = whole.velocity(*inputs)
        assert close(parts.velocity(*inputs), expected) and close(trainer.flow.velocity(*inputs), expected)
        parts.pipeline.set_adapters(["bright", "blue"], [1.0, 0.0])
        assert not close(parts.velocity(*inputs), expected, 1e-4)

    card = (folder / "README.md").read_text()
    load = (
        'pipeline.load_lora_weights("path/to/this/folder", weight_name="adapters/{0}.safetensors", adapter_name="{0}")'
    )
    assert load.format("bright") in card and load.format("blue") in card
    assert 'pipeline.set_adapters(["bright", "blue"], [0.5, 0.5])' in card and "Each prompt had shares" in card
    assert "| `lora_rank` | `3` |" in card and "| `balance_slider` | `True` |" in card
    assert json.loads((folder / "model_card.json").read_text())["parts"] == ["bright", "blue"]


REFUSED = {
    "aggregation": (
        {"multi_objective_aggregation": "marble", "balance_every": 1},
        "`multi_objective_aggregation='marble'` does something else; set `multi_objective_aggregation='normalize_then",
    ),
    "one reward": ({"reward_funcs": bright}, "`bright` is the only one. Pass two rewards or more"),
    "teachers": ({"teachers": {"all": "somewhere"}}, "the teacher 'all' has none; leave one of the two out"),
    "alone": ({"teachers": {"all": "somewhere"}, "reward_funcs": None}, "between rewards, and there are none"),
    "compiled": ({"torch_compile": True}, "`balance_slider=True` and `torch_compile=True` do not work together"),
    "sharded": ({"shard_base": True}, "`balance_slider=True` and `shard_base=True` do not work together"),
    "dora": ({"peft_config": LoraConfig(use_dora=True)}, "`balance_slider=True` trains plain LoRAs.*use_dora=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        small_trainer(tmp_path / "run", **SLIDER | settings)


def test_a_pipeline_that_is_called_sample_by_sample_needs_batches_of_one(tmp_path, monkeypatch):
    pipeline = tiny_sd3(num_layers=1)
    monkeypatch.setattr(FlowPipeline, "splits_batches", True)
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="is not called for a whole batch here.*Set both to 1"):
        small_trainer(tmp_path / "run", pipeline=pipeline, **SLIDER | settings)
    one = {"per_device_train_batch_size": 1, "rollout_batch_size": 1} | settings
    small_trainer(tmp_path / "run", pipeline=pipeline, max_steps=1, **SLIDER | one).train()


def test_another_family_trains_too(tmp_path):
    settings = {"pipeline": tiny_flux(), "height": 16, "width": 16, "guidance_scale": 3.5, "max_steps": 2}
    trainer = small_trainer(tmp_path / "run", **SLIDER | settings)
    trainer.train()
    assert any("loss" in row for row in trainer.state.log_history)
    assert not any(module._forward_hooks for module in trainer.flow.transformer.modules())
