# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The guided velocity of a base model, against what the pipeline itself hands to its scheduler with guidance."""

import inspect

import pytest
import tiny_families
import torch
from tiny_edits import edit_image, tiny_qwen_image_edit
from tiny_videos import tiny_wan

from trl_marble.pipelines import FlowPipeline
from trl_marble.pipelines.overrides import replace_latents
from trl_marble.pipelines.schedulers import OneStep


SCALE = 3.0
# Pipelines that guide by `negative + scale * (positive - negative)` and nothing more.
PLAIN = ["StableDiffusion3Pipeline", "SanaPipeline", "ChromaPipeline", "AuraFlowPipeline"]


def make_flow(name, **settings):
    if name == "WanPipeline":
        return FlowPipeline(tiny_wan(), 16, 32, max_sequence_length=16, num_frames=9, **settings)
    make, call = tiny_families.TINY[name]
    sizes = {key: call[key] for key in ("height", "width", "max_sequence_length") if key in call}
    return FlowPipeline(make(), **sizes, **settings)


def latents_of(flow, conditioning, seed=0):
    """Latents in the layout of the pipeline, as noise."""
    latents = flow.rollout(conditioning, [seed] * len(conditioning), 1).latents
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))


def guided_by_the_pipeline(flow, x_t, t, conditioning):
    """What the pipeline's `__call__` gives to its scheduler, for one sample and with guidance."""
    solver = OneStep(flow.pipeline.scheduler, t)
    driver = flow._calls.driver(solver, conditioning)
    driver.prepare_latents = replace_latents(driver.prepare_latents, x_t)
    arguments = flow.call_arguments(conditioning, guided=True)
    with torch.no_grad():
        inspect.unwrap(type(driver).__call__)(
            driver,
            **arguments,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=2,
            output_type="latent",
        )
    return solver.velocity


@pytest.mark.parametrize("name", [*PLAIN, "WanPipeline"])
@torch.no_grad()
def test_it_is_what_the_pipeline_itself_makes_of_both_predictions(name):
    flow = make_flow(name, reference_guidance_scale=SCALE)
    guided = make_flow(name, guidance_scale=SCALE)  # the same weights
    conditioning = flow.encode(["a red cat"])
    x_t, t = latents_of(flow, conditioning), torch.tensor([0.7])
    expected = guided_by_the_pipeline(guided, x_t, t, guided.encode(["a red cat"]))
    found = flow.reference_velocity(x_t, t, conditioning)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-3, atol=1e-5)
    plain = flow.velocity(x_t, t, conditioning)
    assert (found - plain).norm() > 1e-3 * plain.norm()
    torch.testing.assert_close(make_flow(name).reference_velocity(x_t, t, conditioning), plain)  # without a scale


@pytest.mark.parametrize("name", ["ZImagePipeline", "QwenImagePipeline", "Flux2KleinPipeline", "Krea2Pipeline"])
@torch.no_grad()
def test_it_is_the_formula_where_the_pipeline_does_more_or_encodes_in_two_calls(name):
    flow = make_flow(name, reference_guidance_scale=SCALE)
    conditioning, empty = flow.encode(["a red cat", "two dogs"]), flow.encode(["", ""])
    x_t, t = latents_of(flow, conditioning), torch.tensor([0.3, 0.9])
    positive, negative = (flow.velocity(x_t, t, each) for each in (conditioning, empty))
    found = flow.reference_velocity(x_t, t, conditioning)
    torch.testing.assert_close(found, negative + SCALE * (positive - negative), rtol=1e-3, atol=1e-4)
    assert (found - positive).norm() > 1e-3 * positive.norm()


@torch.no_grad()
def test_each_sample_has_its_own_time_and_prompt():
    flow = make_flow("StableDiffusion3Pipeline", reference_guidance_scale=SCALE)
    conditioning = flow.encode(["a red cat", "two dogs"])
    x_t, t = latents_of(flow, conditioning), torch.tensor([0.3, 0.9])
    together = flow.reference_velocity(x_t, t, conditioning)
    for i in range(2):
        alone = flow.reference_velocity(x_t[[i]], t[[i]], conditioning.select(torch.tensor([i])))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert torch.equal(flow.reference_velocity(x_t, t, conditioning), together)  # its calls are recorded by then


@torch.no_grad()
def test_a_guidance_distilled_transformer_takes_the_scale_as_input():
    flow = make_flow("FluxPipeline", guidance_scale=1.0, reference_guidance_scale=SCALE)
    conditioning = flow.encode(["a red cat", "two dogs"])
    x_t, t = latents_of(flow, conditioning), torch.tensor([0.3, 0.9])
    expected = make_flow("FluxPipeline", guidance_scale=SCALE).velocity(x_t, t, conditioning)
    calls = []
    flow.transformer.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):  # in turns with the plain one, whose recorded calls stay
        plain = flow.velocity(x_t, t, conditioning)
        torch.testing.assert_close(flow.reference_velocity(x_t, t, conditioning), expected)
    assert len(calls) == 4 and not torch.allclose(plain, expected) and flow.guidance_scale == 1.0


@torch.no_grad()
def test_a_pipeline_that_takes_text_gets_the_empty_prompt_with_the_same_image():
    flow = FlowPipeline(tiny_qwen_image_edit(), 16, 16, reference_guidance_scale=SCALE)
    image = edit_image("red white")
    conditioning, empty = flow.encode(["a cat"], [image]), flow.encode([flow.family.empty_prompt], [image])
    x_t, t = latents_of(flow, conditioning), torch.tensor([0.6])
    positive, negative = (flow.velocity(x_t, t, each) for each in (conditioning, empty))
    torch.testing.assert_close(
        flow.reference_velocity(x_t, t, conditioning), negative + SCALE * (positive - negative), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_rollouts_do_not_know_of_it():
    flow, plain = (
        make_flow("StableDiffusion3Pipeline", reference_guidance_scale=SCALE),
        make_flow("StableDiffusion3Pipeline"),
    )
    found, expected = (each.rollout(each.encode(["a red cat"]), [3], 2).latents for each in (flow, plain))
    assert torch.equal(found, expected) and not flow.is_guided


def test_a_scale_that_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match="guidance_scale=0.5 is below 1"):
        make_flow("StableDiffusion3Pipeline", reference_guidance_scale=0.5)
