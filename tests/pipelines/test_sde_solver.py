# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rollouts with noise in some steps, in every family: the noise that was added is found again from what was kept."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_sd3
from tiny_edits import TINY_EDITS, edit_image, edit_instruction
from tiny_families import TINY as TINY_IMAGES
from tiny_videos import TINY_VIDEOS

from trl_marble.pipelines import FAMILIES, FlowPipeline
from trl_marble.pipelines.sde_solver import euler_of
from trl_marble.sde import SDESteps, SDEWindow, Transitions
from trl_marble.seeding import Draw, derive_seed


STEPS, SEEDS = 4, (1, 2)
PROMPTS = ("a cat", "two red dogs")
WAN_5B = "WanPipeline, expand_timesteps"
TINY = TINY_IMAGES | TINY_VIDEOS
NAMES = [family.pipeline_class.__name__ for family in FAMILIES] + [WAN_5B]
# The families that transitions are promised for; the others are slow for a test together.
PROMISED = ("StableDiffusion3", "Flux", "QwenImage", "ZImage", "Sana", "Wan")
# Every token has a time of its own.
NO_SDE = {"LTXConditionPipeline"}
EMBEDDED_GUIDANCE = {"FluxPipeline", "FluxKontextPipeline", "Flux2Pipeline", "HunyuanVideoPipeline"}
VIDEOS = {family.pipeline_class.__name__ for family in FAMILIES if family.output == "video"} | {WAN_5B}


def cases():
    names = [(name, False) for name in TINY if name in NAMES] + [(name, True) for name in TINY_EDITS if name in NAMES]
    for name, edits in names:
        fast = name in [f"{promised}Pipeline" for promised in PROMISED] and not edits
        yield pytest.param(name, edits, marks=[] if fast else pytest.mark.slow, id=f"{name}{'-edits' * edits}")


def make_flow(name, edits=False):
    make, call = (TINY_EDITS if edits else TINY)[name]
    own = {key: call[key] for key in ("height", "width", "max_sequence_length") if key in call}
    if name in EMBEDDED_GUIDANCE:
        own["guidance_scale"] = call["guidance_scale"]
    if name in VIDEOS:
        own["num_frames"] = call["frames" if name == "SanaVideoPipeline" else "num_frames"]
    return FlowPipeline(make(), **own)


def noise_of(transitions: Transitions, kind, noise_level, flow, conditioning):
    """The noise of each step, from the points that it goes from and to."""
    steps = SDESteps.of_grid(kind, noise_level, transitions.times)
    for j in range(transitions.points.shape[1] - 1):
        x, x_next = transitions.points[:, j], transitions.points[:, j + 1]
        step = steps.at(transitions.begin + j).expand(x)
        velocity = flow.velocity(x, step.t, conditioning)
        yield (x_next - step.mean(x, velocity)) / step.deviation.view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize(("name", "edits"), cases())
@torch.no_grad()
def test_the_noise_of_every_step_is_that_of_the_sample_s_generator(name, edits):
    """So the points, times and velocities of training are those of the rollout, sample by sample."""
    flow = make_flow(name, edits)
    texts = [edit_instruction(prompt) for prompt in PROMPTS] if name == "BriaFiboEditPipeline" else PROMPTS
    images = [edit_image("red green white"), edit_image("blue yellow")] if edits else None
    conditioning = flow.encode(texts, images)
    window = SDEWindow("flow_sde", 0.7, 1, 2)
    if name in NO_SDE:
        with pytest.raises(ValueError, match="every token a time of its own"):
            flow.rollout(conditioning, SEEDS, STEPS, "pt", sde=window)
        return
    rollout = flow.rollout(conditioning, SEEDS, STEPS, "pt", sde=window)
    kept = rollout.transitions
    assert kept.points.shape == (2, 3, *rollout.latents.shape[1:]) and kept.points.dtype == torch.float32
    assert kept.begin == 1 and len(kept.times) == STEPS + 1 and kept.times[-1] == 0
    torch.testing.assert_close(
        kept.times[:-1], flow.training_times(STEPS, euler_of(flow.pipeline.scheduler)), rtol=0, atol=1e-6
    )
    generators = [torch.Generator().manual_seed(derive_seed(seed, Draw.SOLVER)) for seed in SEEDS]
    for found in noise_of(kept, "flow_sde", 0.7, flow, conditioning):
        drawn = torch.stack([torch.randn(found.shape[1:], generator=generator) for generator in generators])
        torch.testing.assert_close(found, drawn, rtol=0, atol=2e-4)
    # Without noise it is the pipeline's own denoising.
    still = flow.rollout(conditioning, SEEDS, STEPS, "pt", sde=SDEWindow("flow_sde", 0.0, 1, 2))
    plain = flow.rollout(conditioning, SEEDS, STEPS, "pt", scheduler=euler_of(flow.pipeline.scheduler))
    torch.testing.assert_close(still.latents, plain.latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(still.images, plain.images, rtol=0, atol=1e-6)
    assert not torch.allclose(rollout.latents, plain.latents, atol=1e-2)


@pytest.fixture(scope="module")
def sd3():
    return FlowPipeline(tiny_sd3(num_layers=1), max_sequence_length=16)


def roll(flow, window, seeds=SEEDS, steps=STEPS):
    return flow.rollout(flow.encode(PROMPTS[: len(seeds)]), seeds, steps, "pt", sde=window)


@torch.no_grad()
def test_without_noise_every_point_is_that_of_diffusers_step(sd3):
    points, euler = [], euler_of(sd3.pipeline.scheduler)
    step = type(euler).step

    class Watched(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            points.append(sample.clone())
            return step(self, model_output, timestep, sample, **kwargs)

    sd3.rollout(sd3.encode(PROMPTS), SEEDS, STEPS, "pt", scheduler=Watched.from_config(euler.config))
    for kind in ("flow_sde", "cps"):
        kept = roll(sd3, SDEWindow(kind, 0.0, 0, STEPS - 1)).transitions.points
        assert len(points) == STEPS
        for j, point in enumerate(points):
            assert torch.equal(kept[:, j], point)


@torch.no_grad()
def test_cps_from_the_first_step_on(sd3):
    kept = roll(sd3, SDEWindow("cps", 0.7, 0, 2)).transitions
    generators = [torch.Generator().manual_seed(derive_seed(seed, Draw.SOLVER)) for seed in SEEDS]
    for found in noise_of(kept, "cps", 0.7, sd3, sd3.encode(PROMPTS)):
        drawn = torch.stack([torch.randn(found.shape[1:], generator=generator) for generator in generators])
        torch.testing.assert_close(found, drawn, rtol=0, atol=2e-4)


@torch.no_grad()
def test_a_sample_depends_neither_on_its_batch_nor_on_torch_s_generator(sd3):
    window = SDEWindow("flow_sde", 0.7, 0, 3)
    both = roll(sd3, window)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone = sd3.rollout(sd3.encode(PROMPTS[1:]), SEEDS[1:], STEPS, "pt", sde=window)
    assert torch.get_rng_state().equal(before)
    torch.testing.assert_close(alone.transitions.points, both.transitions.points[1:], rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_half_precision_the_points_are_those_that_the_pipeline_goes_on_from():
    flow = FlowPipeline(tiny_sd3(num_layers=1).to(torch.bfloat16), max_sequence_length=16)
    seen = []
    flow.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].float()), with_kwargs=True
    )
    kept = roll(flow, SDEWindow("flow_sde", 0.7, 0, 2)).transitions
    assert kept.points.dtype == torch.float32
    for j in range(3):
        assert torch.equal(kept.points[:, j], seen[j])


@torch.no_grad()
def test_what_would_give_wrong_probabilities_is_refused(sd3):
    with pytest.raises(ValueError, match="Step 4 of 4 is to add noise, and the last one must not"):
        roll(sd3, SDEWindow("flow_sde", 0.7, 2, 2))
    with pytest.raises(ValueError, match="Step 3 of 4 ends at t = 0.00893, where cps adds noise of deviation 0.008"):
        roll(sd3, SDEWindow("cps", 0.7, 0, 3))
    noisy = FlowPipeline(tiny_sd3(num_layers=1), max_sequence_length=16)
    noisy.pipeline.scheduler.register_to_config(stochastic_sampling=True)
    with pytest.raises(ValueError, match="has stochastic_sampling=True"):
        roll(noisy, SDEWindow("flow_sde", 0.7, 0, 2))


@torch.no_grad()
def test_latents_that_the_pipeline_changes_between_steps_are_refused():
    class Shifts(FlowMatchEulerDiscreteScheduler):
        """Stands for a pipeline that writes into the latents after each step."""

        def scale_model_input(self, sample):
            return sample

        @property
        def step(self):
            return self._own_step

        @step.setter
        def step(self, value):
            def shifted(*args, **kwargs):
                output = value(*args, **kwargs)
                output[0].add_(1.0)
                return output

            self._own_step = shifted

    flow = FlowPipeline(tiny_sd3(num_layers=1), max_sequence_length=16)
    scheduler = Shifts.from_config(flow.pipeline.scheduler.config)
    scheduler._own_step = FlowMatchEulerDiscreteScheduler.step.__get__(scheduler)
    flow.pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match="changes the latents between two steps"):
        roll(flow, SDEWindow("flow_sde", 0.7, 0, 2))
