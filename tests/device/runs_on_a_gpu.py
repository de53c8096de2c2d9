# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Whole runs on a pretended GPU: what is where, waited for, copied and rounded. Run by test_without_a_gpu.py."""

import collections
import re

import pytest
import torch
from datasets import Dataset
from pretended_gpu import listening
from safetensors.torch import load_file
from tiny import tiny_sd3
from tiny_edits import TINY_EDITS, edit_image, edit_instruction
from tiny_families import TINY
from tiny_scorers import five_rewards
from tiny_videos import TINY_VIDEOS
from trainer_helpers import small_trainer

from trl_marble.hub import save_adapter
from trl_marble.pipelines import FAMILIES, FlowPipeline, add_trainable_adapter, lora_config
from trl_marble.pipelines.offloading import offload_components


def test_what_a_gpu_refuses_is_refused():
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
    for mixed in (lambda: here @ there, lambda: there + here, lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="convert cuda"):
        there.numpy()


def test_what_is_noted():
    a, b = torch.ones(2, 2, device="cuda"), torch.ones(2, 2, dtype=torch.bfloat16, device="cuda")
    with listening() as log:
        b @ b
        a.sum().item()
        a.to("cpu")
        torch.ones(3).to("cuda")
        torch.ones(3).to("cuda", non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16):
            a @ a
    noted = [(each.kind, each.operation, each.detail) for each in log]
    assert noted == [
        ("product", "aten::mm", "BFloat16"),
        ("wait", "aten::_local_scalar_dense", ""),
        ("wait", "aten::copy_", ""),
        ("to_device", "aten::copy_", ""),
        ("to_device", "aten::copy_", "non_blocking"),
        ("product", "aten::mm", "BFloat16"),
    ]


# ---- A run in bf16, with everything in it ----

# Sums over samples of per-reward gradients, their inner products, and the direction: small, and meant to be exact.
EXACT = {
    ("Float", "balance/per_reward_gradients.py"),
    ("Double", "balance/flat_gradients.py"),
    ("Float", "update/step_gradient.py"),
}


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory):
    """Two steps with five models as rewards, an evaluation and a checkpoint; and a third step that goes on from it."""
    folder = tmp_path_factory.mktemp("bf16")
    rewards = five_rewards(folder / "models")
    prompts = Dataset.from_dict(
        {
            "prompt": ["a red dog", "a cat", "red hat", 'a sign "7"'],
            "tag": ["single_object", None, None, None],
            "include": [[{"class": "dog", "count": 1}], None, None, None],
            "text": [None, None, None, "7"],
        }
    )

    def make(**settings):
        return small_trainer(
            folder / "run",
            rewards,
            tiny_sd3(num_layers=1).to(torch.bfloat16),
            prompts,
            use_cpu=False,
            bf16=True,
            gradient_accumulation_steps=2,
            activation_checkpointing=True,
            offload_components=True,
            **settings,
        )

    saved = {"save_strategy": "steps", "save_steps": 2, "log_images": True}
    trainer = make(eval_dataset=prompts, num_generations_eval=2, eval_strategy="steps", eval_steps=2, **saved)
    with listening() as log:
        trainer.train()
    resumed = make(max_steps=3)
    with listening() as second_log:
        resumed.train(resume_from_checkpoint="latest")
    return trainer, log, resumed, second_log


def test_it_trains_evaluates_and_goes_on(bf16_run):
    trainer, _, resumed, _ = bf16_run
    assert trainer.state.global_step == 2 and resumed.state.global_step == 3
    assert trainer.args.device.type == resumed.args.device.type == "cuda"
    assert len(trainer.evaluations) == 1
    for tensor in (*trainer.weights.trained.values(), *trainer.weights.old.state_dict().values()):
        assert tensor.device.type == "cuda" and tensor.isfinite().all()


def test_no_product_is_in_fp32_where_bf16_is_meant(bf16_run):
    for log in bf16_run[1::2]:
        products = log.of("product")
        assert len(products) > 500
        others = {(each.detail, each.place.split(":")[0]) for each in products if each.detail != "BFloat16"}
        assert others <= EXACT


def test_each_reward_has_a_stream_of_its_own(bf16_run):
    for log in bf16_run[1::2]:
        streams = collections.defaultdict(set)
        for each in log:
            streams[each.thread].add(each.stream)
        rewards = {thread: own for thread, own in streams.items() if thread.startswith("reward-")}
        assert len(rewards) == 5 and all(len(own) == 1 for own in rewards.values())
        assert len(set.union(*rewards.values()) | {0}) == 6
        assert streams["MainThread"] == {0}
        # Its results are there when another thread is given them.
        waits = [each for each in log.of("wait") if each.operation == "Stream.synchronize"]
        assert {each.thread for each in waits} == set(rewards)


def test_weights_are_not_copied_back_to_the_cpu(bf16_run):
    for log in bf16_run[1::2]:
        assert not [each for each in log.of("wait") if "offloading" in each.place]


# ---- What is waited for ----

KINDS = {
    "balanced on the loss": {"balance_every": 1, "balance_on": "loss"},
    "balanced on the advantages": {"balance_every": 1, "balance_on": "advantage"},
    "streaming": {"balance_every": 1, "balance_fraction": 0.5},
    "in between": {"balance_every": 100},
    "one advantage": {"multi_objective_aggregation": "sum_then_normalize"},
    "progress": {"multi_objective_aggregation": "progress"},
    "AWM": {"policy_loss": "awm", "awm_off_policy": True, "beta": 0.01},
    "an adapted KL": {"kl_target": 0.01, "regularizer_fraction": 0.5},
}


def waits_of_a_step(tmp_path, **settings):
    """What the last of three steps waits for in its update, by file."""
    trainer = small_trainer(tmp_path, use_cpu=False, max_steps=3, gradient_checkpointing=False, **settings)
    with listening() as log:
        trainer.train()
        starts = [number for number, each in enumerate(log) if "_sample" in each.place and each.kind == "wait"]
    assert all(tensor.isfinite().all() for tensor in trainer.weights.trained.values())
    # From the last thing that the last rollout waits for.
    after = log[starts[-1] + 1 :]
    rooms = re.compile(r"^(update|balance|losses|pipelines/(weight|policy|conditioning|velocities|pipeline_calls))")
    waits = [each for each in after if each.kind == "wait" and rooms.match(each.place)]
    blocking = [each for each in after if each.kind == "to_device" and not each.detail and rooms.match(each.place)]
    return collections.Counter(each.place for each in waits), collections.Counter(each.place for each in blocking)


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_update_waits_as_often_whatever_the_number_of_micro_steps(tmp_path, kind):
    kind_settings = {"per_device_train_batch_size": 2} | KINDS[kind]
    sizes = {"gradient_accumulation_steps": 2, "num_inference_steps": 4}
    few = waits_of_a_step(tmp_path / "few", **sizes, **kind_settings)
    sizes = {"gradient_accumulation_steps": 4, "num_inference_steps": 6}
    many = waits_of_a_step(tmp_path / "many", **sizes, **kind_settings)
    assert few == many, (few, many)
    assert sum(few[0].values()) <= 8, few


def test_an_update_waits_as_often_whatever_the_number_of_layers(tmp_path):
    one, two = (
        waits_of_a_step(tmp_path / str(number), pipeline=tiny_sd3(num_layers=number), balance_every=1)
        for number in (1, 2)
    )
    assert one == two


def test_an_adapter_is_saved_with_one_wait(tmp_path):
    pipeline = tiny_sd3(num_layers=1)
    trainable = add_trainable_adapter(pipeline, lora_config(pipeline, r=2))
    pipeline.to("cuda")
    with listening() as log:
        file = save_adapter(pipeline, tmp_path)
    assert len(log.of("wait")) == 1, log.table("wait")
    assert len(load_file(file)) == len(trainable) > 1


def test_a_run_ends_with_the_weights_of_a_run_on_the_cpu(tmp_path):
    weights = []
    for number, use_cpu in enumerate((False, True)):
        trainer = small_trainer(tmp_path / str(number), use_cpu=use_cpu, max_steps=2, optim="adamw_torch")
        trainer.train()
        weights.append(torch.cat([each.detach().cpu().flatten() for each in trainer.weights.trained.values()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


# ---- All families ----


@pytest.mark.parametrize("offloads", [False, True], ids=["whole", "offloaded"])
@pytest.mark.parametrize("name", [family.pipeline_class.__name__ for family in FAMILIES])
def test_every_family_samples_and_has_gradients(name, offloads):
    make, options = (TINY_EDITS | TINY | TINY_VIDEOS)[name]
    results = []
    for device in ("cpu", "cuda"):
        pipeline = make()
        torch.manual_seed(0)  # with which the adapter begins
        trained = [parameter for _, parameter in add_trainable_adapter(pipeline, lora_config(pipeline))]
        if offloads:
            offload_components(pipeline, device)
        else:
            pipeline.to(device)
        frames = options.get("num_frames", options.get("frames"))
        flow = FlowPipeline(
            pipeline, options["height"], options["width"], 1.0, options.get("max_sequence_length"), frames
        )
        prompts, images = ["a red dog", "a cat"], None
        if flow.family.takes_image != "no":
            prompts = [edit_instruction(prompt) for prompt in prompts] if name == "BriaFiboEditPipeline" else prompts
            images = [edit_image("red green white"), edit_image("blue yellow")]
        conditioning = flow.encode(prompts, images)
        rollout = flow.rollout(conditioning, [0, 1], 2, output_type="pt")
        assert rollout.latents.device.type == device
        times = torch.tensor([0.5, 0.5], device=device)
        for _ in range(2):  # by the pipeline, and from what was recorded
            velocity = flow.velocity(rollout.latents, times, conditioning)
        velocity.square().sum().backward()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        results.append(
            [each.detach().cpu().float() for each in (rollout.latents, rollout.images, velocity, *gradients)]
        )
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
