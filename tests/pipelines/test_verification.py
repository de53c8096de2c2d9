# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Pipelines that are not in the table: the families of the table without their rows, and some that never had one."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPAGPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft import LoraConfig
from tiny import tiny_sd3
from tiny_families import TINY as TINY_IMAGES
from tiny_videos import TINY_VIDEOS
from trainer_helpers import small_trainer

from trl_marble.pipelines import FlowPipeline, families, verify_velocities


TINY = TINY_IMAGES | {"Kandinsky5T2VPipeline": TINY_VIDEOS["Kandinsky5T2VPipeline"]}
EMBEDDED_GUIDANCE = {"FluxPipeline", "Flux2Pipeline"}
OFF_AT_ZERO = {"ZImagePipeline", "Krea2Pipeline"}
ONE_TIME = {"AuraFlowPipeline", "ErnieImagePipeline"}
ONE_SAMPLE = {"Kandinsky5T2IPipeline", "Kandinsky5T2VPipeline"}
# Those that need fixed arguments, one whose steps use another time than the scheduler's, and one that is refused.
NEED_A_ROW = {"SanaPipeline", "Ideogram4Pipeline", "CogView4Pipeline", "HiDreamImagePipeline"}
NAMES = [name for name in TINY if name not in NEED_A_ROW]
PROMPTS = ["a red cat", "six blue birds"]


@pytest.fixture
def no_rows(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", ())


def flow_of(name: str, **settings) -> FlowPipeline:
    make, call = TINY[name]
    own = {key: call[key] for key in ("height", "width", "num_frames", "max_sequence_length") if key in call}
    if name in EMBEDDED_GUIDANCE:
        own["guidance_scale"] = call["guidance_scale"]
    return FlowPipeline(make(), **(own | settings))


@pytest.mark.parametrize("name", NAMES)
def test_limits_of_a_call_and_the_value_that_turns_guidance_off_are_found(name, no_rows):
    flow = flow_of(name)
    verify_velocities(flow)
    assert not flow.is_listed
    assert flow.family.one_time == (name in ONE_TIME)
    assert flow.family.one_sample == (name in ONE_SAMPLE)
    assert flow.family.unguided == (0 if name in OFF_AT_ZERO else 1)
    assert (flow.family.guidance == "embedded") == (name in EMBEDDED_GUIDANCE)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_SAMPLE])
@torch.no_grad()
def test_velocities_and_rollouts_are_those_of_the_row(name, monkeypatch):
    listed = flow_of(name)
    monkeypatch.setattr(families, "FAMILIES", ())
    unlisted = flow_of(name)
    verify_velocities(unlisted)
    rollouts = [flow.rollout(flow.encode(PROMPTS), [1, 2], 2, output_type="pt") for flow in (listed, unlisted)]
    assert torch.equal(rollouts[0].images, rollouts[1].images)
    noise = torch.randn(rollouts[0].latents.shape, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.8, 0.3])
    velocities = [flow.velocity(noise, times, flow.encode(PROMPTS)) for flow in (listed, unlisted)]
    torch.testing.assert_close(velocities[1], velocities[0], rtol=0, atol=2e-5)


def test_checking_leaves_the_pipeline_and_torchs_random_numbers_as_they_were(no_rows):
    flow = flow_of("ChromaPipeline")
    scheduler, random = copy.deepcopy(flow.pipeline.scheduler.__dict__), torch.get_rng_state()
    verify_velocities(flow)
    assert flow.pipeline.scheduler.__dict__.keys() == scheduler.keys()
    assert torch.equal(flow.pipeline.scheduler.timesteps, scheduler["timesteps"])
    assert torch.equal(torch.get_rng_state(), random)
    assert not flow.transformer._forward_hooks


def test_a_class_of_the_table_is_not_checked():
    flow = flow_of("ChromaPipeline")
    flow.pipeline.encode_prompt = None  # nothing could be sampled
    verify_velocities(flow)
    assert flow.is_listed


# --- refused ---------------------------------------------------------------------------------------------------------


def refusal(flow: FlowPipeline) -> str:
    with pytest.raises(ValueError) as error:
        verify_velocities(flow)
    assert "add a row for this one to `FAMILIES`" in str(error.value)
    return str(error.value)


def test_refused_where_its_steps_use_another_time():
    assert "differs from the one in its own denoising step" in refusal(flow_of("CogView4Pipeline"))


def test_refused_where_its_path_leads_from_data_to_noise(no_rows):
    flow = flow_of("ChromaPipeline")
    flow.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert "not from 1 (noise) down to 0 (data)" in refusal(flow)


def test_refused_where_it_does_not_start_from_noise(no_rows):
    flow = flow_of("ChromaPipeline")
    prepare = flow.pipeline.prepare_latents

    def prepare_small(*args, **kwargs):
        latents, ids = prepare(*args, **kwargs)
        return latents / 10, ids

    flow.pipeline.prepare_latents = prepare_small
    assert "latents with standard deviation 0.1" in refusal(flow)


def test_refused_where_guidance_cannot_be_turned_off(no_rows):
    flow = flow_of("StableDiffusion3Pipeline")

    class AlwaysGuided(type(flow.pipeline)):
        do_classifier_free_guidance = True

    flow.pipeline.__class__ = AlwaysGuided
    assert "its guidance is off neither with guidance_scale=1 nor with 0" in refusal(flow)


def test_refused_where_the_pipeline_itself_raises(no_rows):
    """Its images are resized to sizes that it was trained on, unless an argument turns that off."""
    assert "called with nothing but text it raises ValueError: Invalid sample size" in refusal(flow_of("SanaPipeline"))


def test_refused_where_it_needs_more_than_text():
    flow = FlowPipeline(StableDiffusion3Img2ImgPipeline(**tiny_sd3().components), 16, 16, max_sequence_length=16)
    assert "StableDiffusion3Img2ImgPipeline is not in the table" in refusal(flow)


def test_refused_with_guidance(no_rows):
    assert "nobody has checked what guidance_scale=2.0 means" in refusal(flow_of("ChromaPipeline", guidance_scale=2.0))


def test_refused_where_adapters_cannot_be_saved():
    sana, _ = TINY["SanaPipeline"]
    pipeline = SanaPAGPipeline(**sana().components)
    with pytest.raises(ValueError, match="SanaPAGPipeline has no `save_lora_weights`"):
        FlowPipeline(pipeline)


def test_refused_where_the_check_would_not_find_the_fault():
    with pytest.raises(ValueError, match="HiDreamImagePipeline cannot be trained: its routed experts"):
        flow_of("HiDreamImagePipeline")


# --- training --------------------------------------------------------------------------------------------------------


def trainer_of(pipeline: DiffusionPipeline, tmp_path, **settings):
    _, call = TINY[type(pipeline).__name__]
    return small_trainer(
        tmp_path,
        pipeline=pipeline,
        height=call["height"],
        width=call["width"],
        max_sequence_length=call["max_sequence_length"],
        learning_rate=1e-2,
        balance_every=1,
        **settings,
    )


@pytest.mark.parametrize("name", ["Kandinsky5T2IPipeline", "QwenImagePipeline"])
def test_training_moves_the_adapter_and_a_fresh_pipeline_can_load_it(name, no_rows, tmp_path):
    make, _ = TINY[name]
    targets = ["to_query", "to_key", "to_value"] if name == "Kandinsky5T2IPipeline" else ["to_q", "to_k", "to_v"]
    trainer = trainer_of(make(), tmp_path, peft_config=LoraConfig(r=2, target_modules=targets))
    before = {key: value.clone() for key, value in trainer.trainable.items()}
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    off = "true_cfg_scale=1.0" if name == "QwenImagePipeline" else "guidance_scale=1.0"
    assert f"num_inference_steps=2, {off}, " in (tmp_path / "README.md").read_text()
    assert all(not torch.equal(before[key], value) for key, value in trainer.trainable.items())
    fresh = make()
    fresh.load_lora_weights(tmp_path)
    assert fresh.get_active_adapters()


def test_a_pipeline_that_fails_the_check_is_refused_before_training(tmp_path):
    make, _ = TINY["CogView4Pipeline"]
    with pytest.raises(ValueError, match="CogView4Pipeline is not in the table"):
        trainer_of(make(), tmp_path)


def test_layers_that_the_default_adapter_does_not_find_are_named(tmp_path):
    make, _ = TINY["Kandinsky5T2IPipeline"]
    with pytest.raises(ValueError, match="endings of its linear layers' names: .*to_key, to_query, to_value"):
        trainer_of(make(), tmp_path)


def test_gradient_checkpointing_is_refused(tmp_path, no_rows):
    make, _ = TINY["ChromaPipeline"]
    trainer = trainer_of(make(), tmp_path, activation_checkpointing=True)
    with pytest.raises(ValueError, match="compared for the classes in the table only"):
        trainer.train()
