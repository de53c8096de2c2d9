# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import copy
import inspect
import warnings

import pytest
import tiny
import tiny_edits
import tiny_families
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from trl_marble.pipelines import (
    Conditioning,
    FlowPipeline,
    Policy,
    add_trainable_adapter,
    check_flow_matching,
    lora_config,
)


MAKE = {"sd3": tiny.tiny_sd3, "flux": tiny.tiny_flux}
SETTINGS = {
    "sd3": {"max_sequence_length": 24},
    "flux": {"max_sequence_length": 24, "height": 16, "width": 16, "guidance_scale": 3.5},
}
PROMPTS = ["a red cat", "two dogs", "three blue birds"]
SEEDS = [11, 12, 13]

both_families = pytest.mark.parametrize("name", ["sd3", "flux"])


def make_flow(name: str, **settings) -> FlowPipeline:
    return FlowPipeline(MAKE[name](), **{**SETTINGS[name], **settings})


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def initial_noise(flow: FlowPipeline, seeds) -> torch.Tensor:
    """What the pipeline starts from: one generator per sample, packed by the pipeline itself for Flux."""
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators(seeds)])
    return flow.pipeline._pack_latents(noise, len(seeds), 4, 8, 8) if "Flux" in type(flow.pipeline).__name__ else noise


def plain_call(flow: FlowPipeline, prompts, seeds, steps, output_type, **settings):
    """The pipeline as a user calls it, from text and without FlowPipeline."""
    flow.pipeline.set_progress_bar_config(disable=True)
    settings = {**SETTINGS["flux" if "Flux" in type(flow.pipeline).__name__ else "sd3"], **settings}
    settings.setdefault("guidance_scale", 1.0)
    return flow.pipeline(
        prompt=prompts, generator=generators(seeds), num_inference_steps=steps, output_type=output_type, **settings
    ).images


def hand_written_velocity(flow: FlowPipeline, x_t, t, conditioning) -> torch.Tensor:
    """The transformer called directly, following each model's documentation."""
    embeddings = conditioning.kwargs["prompt_embeds"]
    pooled = conditioning.kwargs["pooled_prompt_embeds"]
    if isinstance(flow.transformer, SD3Transformer2DModel):
        return flow.transformer(
            hidden_states=x_t,
            timestep=t * 1000,
            encoder_hidden_states=embeddings,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    positions = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1).to(x_t.dtype)
    return flow.transformer(
        hidden_states=x_t,
        timestep=(t * 1000).to(x_t.dtype) / 1000,
        guidance=torch.full([len(x_t)], 3.5),
        pooled_projections=pooled,
        encoder_hidden_states=embeddings,
        txt_ids=torch.zeros(embeddings.shape[1], 3, dtype=x_t.dtype),
        img_ids=positions,
        return_dict=False,
    )[0]


def seen_times(flow: FlowPipeline, call) -> list[float]:
    """The times at which a call runs the transformer, from the transformer's own input."""
    scale = 1000 if isinstance(flow.transformer, SD3Transformer2DModel) else 1
    times = []
    hook = flow.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(kwargs["timestep"][0].item() / scale), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return times


def flow_solver(kind):
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


# --- velocity --------------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_is_the_hand_written_transformer_call(name, dtype):
    flow = make_flow(name)
    flow.pipeline.to(dtype=dtype)
    conditioning = flow.encode(PROMPTS)
    x_t = initial_noise(flow, SEEDS).to(dtype)
    t = torch.tensor([0.013, 0.5123, 0.98765])

    velocity = flow.velocity(x_t, t, conditioning)

    assert velocity.dtype == dtype and velocity.shape == x_t.shape
    assert flow.dtype == dtype
    assert torch.equal(velocity, hand_written_velocity(flow, x_t, t, conditioning))
    # Every sample has its own time: another time for one of them changes that one alone.
    other = flow.velocity(x_t, torch.tensor([0.013, 0.9, 0.98765]), conditioning)
    changed = (other != velocity).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False]


@both_families
def test_velocity_keeps_the_dtype_of_its_input_on_a_bf16_base(name):
    flow = make_flow(name)
    flow.pipeline.to(dtype=torch.bfloat16)
    conditioning = flow.encode(PROMPTS)
    x_t, t = initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9])
    velocity = flow.velocity(x_t, t, conditioning)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity, flow.velocity(x_t.bfloat16(), t, conditioning).float())


@both_families
@pytest.mark.parametrize("steps", [1, 5])
def test_rollout_is_explicit_euler_along_the_velocity(name, steps):
    """Sign and time scale: dx/dt = v, from noise at t = 1 down to data at t = 0."""
    flow = make_flow(name)
    conditioning = flow.encode(PROMPTS)
    times = flow.training_times(steps).tolist() + [0.0]
    x = initial_noise(flow, SEEDS)
    with torch.no_grad():
        for now, following in zip(times, times[1:], strict=False):
            x = x + (following - now) * flow.velocity(x, torch.full([3], now), conditioning)
    torch.testing.assert_close(x, flow.rollout(conditioning, SEEDS, steps).latents, rtol=1e-5, atol=1e-5)


def test_velocity_never_uses_classifier_free_guidance():
    guided, plain = make_flow("sd3", guidance_scale=4.0), make_flow("sd3")
    x_t, t = initial_noise(plain, SEEDS), torch.tensor([0.1, 0.5, 0.9])
    conditioning = guided.encode(PROMPTS)
    assert "negative_prompt_embeds" in conditioning.kwargs
    batch_sizes = []
    guided.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    assert torch.equal(guided.velocity(x_t, t, conditioning), plain.velocity(x_t, t, plain.encode(PROMPTS)))
    assert batch_sizes == [3]


def test_velocity_calls_without_the_negative_prompt_and_works_for_subclasses():
    calls = []

    class Recording(StableDiffusion3Pipeline):
        def __call__(self, *args, **kwargs):
            calls.append(kwargs)
            return inspect.unwrap(StableDiffusion3Pipeline.__call__)(self, *args, **kwargs)

    flow = FlowPipeline(Recording(**tiny.tiny_sd3().components), guidance_scale=4.0)
    flow.velocity(initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), flow.encode(PROMPTS))
    (kwargs,) = calls
    assert kwargs["max_sequence_length"] == 256, "the pipeline's own default"
    assert "prompt_embeds" in kwargs and not any(name.startswith("negative") for name in kwargs)


def test_a_guidance_distilled_transformer_is_given_the_guidance_scale():
    low, high = make_flow("flux", guidance_scale=1.5), make_flow("flux", guidance_scale=3.5)
    x_t, t, conditioning = initial_noise(low, SEEDS), torch.tensor([0.1, 0.5, 0.9]), low.encode(PROMPTS)
    assert not torch.allclose(low.velocity(x_t, t, conditioning), high.velocity(x_t, t, conditioning), atol=1e-4)


def test_flux_without_guidance_embedding():
    flow = FlowPipeline(tiny.tiny_flux(guidance_embeds=False), **{**SETTINGS["flux"], "guidance_scale": 1.0})
    velocity = flow.velocity(initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), flow.encode(PROMPTS))
    assert velocity.isfinite().all()
    with pytest.raises(ValueError, match=r"guidance_scale=3.5 would be ignored.*Set guidance_scale=1.0"):
        FlowPipeline(tiny.tiny_flux(guidance_embeds=False), guidance_scale=3.5)


@both_families
def test_gradients_reach_every_lora_matrix_that_the_output_depends_on(name):
    flow = make_flow(name)
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=4))
    assert len(trainable) == 30
    torch.manual_seed(0)
    for parameter_name, parameter in trainable:
        if "lora_B" in parameter_name:  # at its initial value of zero no gradient would reach A
            torch.nn.init.normal_(parameter, std=0.1)
    flow.velocity(
        initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), flow.encode(PROMPTS)
    ).square().sum().backward()

    unreached = {n for n, parameter in trainable if parameter.grad is None or not parameter.grad.any()}
    # SD3's last block drops its text tokens, so what they would have asked for (their queries) has no effect.
    last_queries = {f"transformer_blocks.1.attn.add_q_proj.lora_{matrix}.default.weight" for matrix in "AB"}
    assert unreached == (last_queries if name == "sd3" else set())


@both_families
def test_gradient_checkpointing_gives_the_same_gradients(name):
    flow = make_flow(name)
    policy = Policy(flow)
    trainable = add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=4))
    x_t, t, conditioning = initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), flow.encode(PROMPTS)

    def gradients():
        policy.zero_grad()
        policy(x_t, t, conditioning).square().sum().backward()
        return {n: parameter.grad.clone() for n, parameter in trainable if parameter.grad is not None}

    plain = gradients()
    policy.activation_checkpointing_enable()
    block_runs = []
    flow.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: block_runs.append(1))
    checkpointed = gradients()
    assert len(block_runs) == 2, "the block is run again in the backward pass"
    assert plain.keys() == checkpointed.keys()
    for parameter_name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[parameter_name], rtol=0, atol=0)
    policy.activation_checkpointing_disable()
    gradients()
    assert len(block_runs) == 3


@both_families
def test_velocity_follows_grad_mode_and_autocast(name):
    flow = make_flow(name)
    add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=4))
    x_t, t, conditioning = initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), flow.encode(PROMPTS)
    with_gradients = flow.velocity(x_t, t, conditioning)
    assert with_gradients.requires_grad
    with torch.no_grad():
        without = flow.velocity(x_t, t, conditioning)
    assert not without.requires_grad and torch.equal(without, with_gradients)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = flow.velocity(x_t, t, conditioning)
        expected = hand_written_velocity(flow, x_t, t, conditioning)
    assert expected.dtype == torch.bfloat16 and torch.equal(mixed, expected.float())


def test_velocity_refuses_times_and_conditioning_of_another_batch():
    flow = make_flow("sd3")
    x_t, conditioning = initial_noise(flow, SEEDS), flow.encode(PROMPTS)
    with pytest.raises(ValueError, match=r"x_t has 3 samples, but t has shape \(\)"):
        flow.velocity(x_t, torch.tensor(0.5), conditioning)
    with pytest.raises(ValueError, match=r"the conditioning 2 rows"):
        flow.velocity(x_t, torch.full([3], 0.5), conditioning.select(torch.tensor([0, 1])))


# --- rollout ---------------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_rollout_is_the_plain_pipeline_call(name, guidance_scale):
    flow = make_flow(name, guidance_scale=guidance_scale)
    conditioning = flow.encode(PROMPTS)
    settings = {"steps": 3, "guidance_scale": guidance_scale}

    rollout = flow.rollout(conditioning, SEEDS, 3, output_type="pt")
    assert torch.equal(rollout.latents, plain_call(flow, PROMPTS, SEEDS, output_type="latent", **settings))
    assert torch.equal(rollout.images, plain_call(flow, PROMPTS, SEEDS, output_type="pt", **settings))
    assert rollout.images.shape == (3, 3, 16, 16) and 0 <= rollout.images.min() and rollout.images.max() <= 1
    assert not rollout.latents.requires_grad

    pictures = flow.rollout(conditioning, SEEDS, 3).images
    expected = plain_call(flow, PROMPTS, SEEDS, output_type="pil", **settings)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in expected]


def test_guidance_matters_to_the_test_above():
    plain, guided = make_flow("sd3"), make_flow("sd3", guidance_scale=4.0)
    rollouts = [flow.rollout(flow.encode(PROMPTS), SEEDS, 3).latents for flow in (plain, guided)]
    assert not torch.allclose(*rollouts, atol=1e-3)


@both_families
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(name):
    flow = make_flow(name)
    conditioning = flow.encode(PROMPTS)
    together = flow.rollout(conditioning, SEEDS, 3, output_type="pt")
    order = torch.tensor([2, 0])
    apart = flow.rollout(conditioning.select(order), [SEEDS[2], SEEDS[0]], 3, output_type="pt")
    torch.testing.assert_close(apart.latents, together.latents[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart.images, together.images[order], rtol=1e-5, atol=1e-5)


def test_rollout_draws_nothing_from_the_global_generator():
    flow = make_flow("sd3")
    conditioning = flow.encode(PROMPTS)
    before = torch.get_rng_state()
    flow.rollout(conditioning, SEEDS, 2)
    flow.training_times(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_rollout_samples_in_evaluation_mode_and_goes_back():
    flow = make_flow("sd3")
    config = lora_config(flow.pipeline, r=4)
    config.lora_dropout = 0.9
    for parameter_name, parameter in add_trainable_adapter(flow.pipeline, config):
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    conditioning = flow.encode(PROMPTS)
    flow.transformer.eval()
    expected = flow.rollout(conditioning, SEEDS, 2).latents
    flow.transformer.train()
    assert torch.equal(flow.rollout(conditioning, SEEDS, 2).latents, expected)
    assert flow.transformer.training


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_rollout_with_another_solver(kind):
    flow = make_flow("sd3")
    solver = flow_solver(kind)
    state = copy.deepcopy(solver.__dict__)
    latents = flow.rollout(flow.encode(PROMPTS), SEEDS, 4, scheduler=solver).latents
    assert_same_state(solver.__dict__, state)

    flow.pipeline.scheduler = flow_solver(kind)
    assert torch.equal(latents, plain_call(flow, PROMPTS, SEEDS, 4, "latent"))


def test_rollout_refuses_what_it_cannot_sample():
    flow = make_flow("sd3")
    conditioning = flow.encode(PROMPTS)
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        flow.rollout(conditioning, [1, 2], 2)
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        flow.rollout(conditioning, SEEDS, 0)
    with pytest.raises(ValueError, match="DDIMScheduler.*not flow matching"):
        flow.rollout(conditioning, SEEDS, 2, scheduler=DDIMScheduler())


# --- training times --------------------------------------------------------------------------------------------------


@both_families
@pytest.mark.parametrize("steps", [1, 4])
def test_training_times_are_those_at_which_a_rollout_runs_the_transformer(name, steps):
    flow = make_flow(name)
    times = flow.training_times(steps)
    seen = seen_times(flow, lambda: plain_call(flow, PROMPTS, SEEDS, steps, "latent"))
    assert times.shape == (steps,) and times.dtype == torch.float32
    torch.testing.assert_close(times, torch.tensor(seen), rtol=1e-6, atol=1e-7)
    assert times.max() <= 1 and times.min() > 0 and (times.diff() < 0).all()


def test_training_times_are_shifted_by_hand_computed_amounts():
    expected = [1.0, 3 * 0.75 / 2.5, 0.75, 0.5]  # 3s / (1 + 2s) at s = 1, 3/4, 1/2, 1/4
    scheduler = flow_solver(DPMSolverMultistepScheduler)
    times = make_flow("sd3").training_times(4, scheduler)
    torch.testing.assert_close(times, torch.tensor(expected), rtol=0, atol=2e-3)
    assert (times * 1000 != (times * 1000).round()).any(), "floats, not the solver's integer timesteps"


def test_flux_times_shift_with_the_resolution():
    small = FlowPipeline(tiny.tiny_flux(), height=16, width=16, max_sequence_length=24).training_times(4)
    large = FlowPipeline(tiny.tiny_flux(), height=64, width=64, max_sequence_length=24).training_times(4)
    assert (large[1:] > small[1:]).all()


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_training_times_of_a_multistep_solver_are_its_sigmas(kind):
    flow = make_flow("sd3")
    times = flow.training_times(5, scheduler=flow_solver(kind))
    flow.pipeline.scheduler = flow_solver(kind)
    seen = seen_times(flow, lambda: plain_call(flow, PROMPTS, SEEDS, 5, "latent"))
    sigmas = flow.pipeline.scheduler.sigmas
    assert torch.equal(times, sigmas[:5].float()) and len(sigmas) == 6
    # These solvers truncate the transformer's time to thousandths.
    torch.testing.assert_close(times, torch.tensor(seen), rtol=0, atol=1e-3)


def test_a_second_order_solver_counts_every_time_once():
    flow = make_flow("sd3")
    flow.pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    times = flow.training_times(3)
    seen = seen_times(flow, lambda: plain_call(flow, PROMPTS, SEEDS, 3, "latent"))
    torch.testing.assert_close(times, torch.tensor(sorted(set(seen), reverse=True)), rtol=1e-6, atol=1e-7)
    assert len(seen) == 5 and len(times) == 3


def test_training_times_refuse_no_steps():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        make_flow("sd3").training_times(0)


# --- the caller's pipeline stays as it was ---------------------------------------------------------------------------


def assert_same_state(state, before):
    assert state.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[key], value), key
        else:
            assert state[key] == value, key


@both_families
def test_the_pipeline_is_left_as_it_was(name, capfd):
    flow = make_flow(name)
    pipeline = flow.pipeline
    pipeline.set_progress_bar_config(desc="the caller's bar")
    scheduler = pipeline.scheduler
    attributes, solver_state = dict(pipeline.__dict__), copy.deepcopy(scheduler.__dict__)

    def use_everything():
        conditioning = flow.encode(PROMPTS)
        flow.rollout(conditioning, SEEDS, 2)
        flow.training_times(2)
        flow.velocity(initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), conditioning)

    def assert_unchanged():
        assert pipeline.scheduler is scheduler
        assert pipeline.__dict__ == attributes
        assert_same_state(scheduler.__dict__, solver_state)

    use_everything()
    assert_unchanged()
    assert "the caller's bar" not in capfd.readouterr().err

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = flow.transformer.register_forward_pre_hook(fail)
    conditioning = flow.encode(PROMPTS)
    for call in (
        lambda: flow.rollout(conditioning, SEEDS, 2),
        lambda: flow.velocity(initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9]), conditioning),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            call()
        assert_unchanged()
    hook.remove()

    pipeline("a cat", num_inference_steps=1, height=16, width=16, max_sequence_length=16)
    assert "the caller's bar" in capfd.readouterr().err


def test_components_replaced_later_are_used():
    flow = make_flow("sd3")
    conditioning = flow.encode(PROMPTS)
    flow.pipeline.transformer = tiny.tiny_sd3(seed=1).transformer
    expected = FlowPipeline(tiny.tiny_sd3(seed=1), **SETTINGS["sd3"])
    x_t, t = initial_noise(flow, SEEDS), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(flow.velocity(x_t, t, conditioning), expected.velocity(x_t, t, conditioning))


# --- prompts ---------------------------------------------------------------------------------------------------------


@both_families
def test_encoding_selects_per_sample(name):
    flow = make_flow(name)
    conditioning = flow.encode(PROMPTS)
    assert len(conditioning) == 3 and not any(tensor.requires_grad for tensor in conditioning.kwargs.values())
    samples = conditioning.select(torch.tensor([2, 0, 2]))
    assert len(samples) == 3
    direct = flow.encode([PROMPTS[2], PROMPTS[0], PROMPTS[2]])
    assert samples.kwargs.keys() == direct.kwargs.keys()
    for key, tensor in direct.kwargs.items():
        torch.testing.assert_close(samples.kwargs[key], tensor, rtol=1e-5, atol=1e-5)
    assert samples.to("meta").kwargs["prompt_embeds"].device.type == "meta"


def test_conditioning_is_in_the_dtype_of_the_transformer():
    flow = make_flow("sd3")
    flow.transformer.to(dtype=torch.bfloat16)
    flow.pipeline.vae.to(dtype=torch.bfloat16)
    assert flow.pipeline.text_encoder.dtype == torch.float32
    conditioning = flow.encode(PROMPTS)
    assert {tensor.dtype for tensor in conditioning.kwargs.values()} == {torch.bfloat16}
    assert flow.rollout(conditioning, SEEDS, 2, output_type="pt").latents.dtype == torch.bfloat16


def test_conditioning_refuses_tensors_of_different_lengths():
    with pytest.raises(ValueError, match="'a': 2, 'b': 3"):
        Conditioning({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="a row per prompt; got {}"):
        Conditioning({})


def test_conditioning_of_lists_selects_and_moves_their_rows():
    conditioning = Conditioning(
        {"embeds": [torch.full([n, 2], float(n)) for n in (1, 2, 3)], "prompt": ["a", "b", "c"]}
    )
    some = conditioning.select(torch.tensor([2, 0, 2]))
    assert len(some) == 3 and some.kwargs["prompt"] == ["c", "a", "c"]
    assert [len(row) for row in some.kwargs["embeds"]] == [3, 1, 3]
    moved = some.to("meta")
    assert {row.device.type for row in moved.kwargs["embeds"]} == {"meta"} and moved.kwargs["prompt"] == [
        "c",
        "a",
        "c",
    ]
    with pytest.raises(ValueError, match="'embeds': 1, 'prompt': 2"):
        Conditioning({"embeds": [torch.zeros(1)], "prompt": ["a", "b"]})


def test_text_is_encoded_once_for_a_selection_of_prompts():
    make, call = tiny_families.TINY["BriaFiboPipeline"]
    flow = FlowPipeline(make(), call["height"], call["width"], max_sequence_length=call["max_sequence_length"])
    conditioning = flow.encode(PROMPTS)
    assert conditioning.kwargs == {"prompt": PROMPTS}
    x = flow.rollout(conditioning, SEEDS, 2).latents
    runs = []
    flow.pipeline.text_encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    some = conditioning.select(torch.tensor([1]))
    with torch.no_grad():
        first = flow.velocity(x[1:2], torch.tensor([0.4]), some)
        once = len(runs)
        again = flow.velocity(x[1:2], torch.tensor([0.4]), some)
        flow.velocity(x[1:2], torch.tensor([0.9]), some)
    assert once > 0 and len(runs) == once and torch.equal(first, again)


def test_encode_refuses_one_string_and_no_prompts():
    flow = make_flow("sd3")
    with pytest.raises(TypeError, match=r"pass \['a cat'\]"):
        flow.encode("a cat")
    with pytest.raises(ValueError, match="empty"):
        flow.encode([])


@pytest.mark.parametrize(
    ("make", "settings", "limit", "fits", "length"),
    [
        # One token per letter; T5 adds a leading space, a space and an end, CLIP a start and an end.
        (tiny.tiny_sd3, {"max_sequence_length": 100}, 100, "a" * 98, 107),
        (tiny.tiny_flux, {"max_sequence_length": 100}, 100, "a" * 98, 107),
        (lambda: tiny.tiny_sd3(t5=False), {}, 77, "a" * 75, 83),
    ],
    ids=["sd3", "flux", "sd3 without t5"],
)
def test_a_prompt_beyond_the_limit_is_named_once(make, settings, limit, fits, length):
    flow = FlowPipeline(make(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.encode(["a cat", fits])
    too_long = "a cat" + "b" * limit
    with pytest.warns(UserWarning, match=f"'{too_long}' has {length} tokens.*only the first {limit};.*2 of these 3"):
        flow.encode(["a cat", too_long, too_long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.encode([too_long])


# --- what cannot be trained ------------------------------------------------------------------------------------------


def test_refuses_what_is_not_a_pipeline():
    with pytest.raises(TypeError, match="SD3Transformer2DModel.*load_pipeline"):
        FlowPipeline(tiny.tiny_sd3().transformer)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_refuses_a_pipeline_that_is_not_flow_matching(kind):
    pipeline = tiny.tiny_sd3()
    pipeline.scheduler = kind()
    with pytest.raises(ValueError, match=f"{kind.__name__} .prediction_type='epsilon'.*FlowMatchEuler"):
        FlowPipeline(pipeline)


def test_refuses_solvers_with_only_one_of_the_flow_matching_settings():
    with pytest.raises(ValueError, match="prediction_type='epsilon', use_flow_sigmas=True"):
        check_flow_matching(DPMSolverMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(ValueError, match="prediction_type='flow_prediction', use_flow_sigmas=False"):
        check_flow_matching(DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    check_flow_matching(flow_solver(DPMSolverMultistepScheduler))


def unet_pipeline(scheduler) -> StableDiffusionPipeline:
    sd3 = tiny.tiny_sd3()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=sd3.vae,
        text_encoder=sd3.text_encoder,
        tokenizer=sd3.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "ZImagePipeline"])
def test_refuses_guidance_below_1_whatever_the_pipelines_own_argument_means(name):
    with pytest.raises(ValueError, match="guidance_scale=0.0 is below 1.*Set guidance_scale=1.0 for no guidance"):
        FlowPipeline(tiny_families.TINY[name][0](), guidance_scale=0.0)


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "Krea2Pipeline"])
def test_refuses_guidance_that_a_distilled_pipeline_would_ignore(name):
    pipeline = tiny_families.TINY[name][0]()
    pipeline.register_to_config(is_distilled=True)
    assert FlowPipeline(pipeline).guidance_scale == 1.0
    with pytest.raises(ValueError, match=f"guidance_scale=3.0 would be ignored: this {name} is distilled"):
        FlowPipeline(pipeline, guidance_scale=3.0)


def test_refuses_a_length_that_the_pipeline_has_no_argument_for():
    with pytest.raises(ValueError, match="max_sequence_length=64 would be ignored: ErnieImagePipeline has no such"):
        FlowPipeline(tiny_families.TINY["ErnieImagePipeline"][0](), max_sequence_length=64)


@pytest.mark.parametrize(("given", "size"), [({"height": 16}, (1024, 16)), ({"width": 16}, (16, 1024))])
def test_of_height_and_width_what_is_left_out_is_the_pipelines_own(given, size):
    # Krea 2, as many pipelines, has a number as default and fails at `None`.
    make, call = tiny_families.TINY["Krea2Pipeline"]
    flow = FlowPipeline(make(), **given, max_sequence_length=call["max_sequence_length"])
    (image,) = flow.rollout(flow.encode(["a red cat"]), [0], 1).images
    assert image.size == size


@pytest.mark.parametrize("make", [tiny_edits.tiny_flux_kontext, tiny_edits.tiny_bria_fibo_edit])
def test_refuses_one_side_where_the_pipeline_would_change_it(make):
    with pytest.raises(ValueError, match="height=None, width=64: .* would not keep one .* Give both or neither"):
        FlowPipeline(make(), width=64)
    assert FlowPipeline(make()).height is None


def test_refuses_latents_of_another_size_where_the_pipeline_packs_its_own():
    make, call = tiny_families.TINY["Flux2KleinPipeline"]
    flow = FlowPipeline(make(), call["height"], call["width"], max_sequence_length=call["max_sequence_length"])
    conditioning = flow.encode(PROMPTS)
    latents = flow.rollout(conditioning, SEEDS, 2).latents
    with pytest.raises(ValueError, match="x_t is of shape .*the pipeline's own latents are .*`Rollout.latents`"):
        flow.velocity(latents[:, 1:], torch.full([3], 0.5), conditioning)


def test_training_times_refuse_a_schedule_that_is_not_finite():
    make, call = tiny_families.TINY["QwenImagePipeline"]
    pipeline = make()
    pipeline.scheduler.register_to_config(shift_terminal=0.02)
    flow = FlowPipeline(pipeline, call["height"], call["width"], max_sequence_length=call["max_sequence_length"])
    with pytest.raises(ValueError, match="no schedule of num_inference_steps=1: its times are .*Use more steps"):
        flow.training_times(1)
    assert len(flow.training_times(2)) == 2


def test_refuses_a_unet_pipeline():
    with pytest.raises(ValueError, match="DDIMScheduler.*not flow matching"):
        FlowPipeline(unet_pipeline(DDIMScheduler()))
    with pytest.raises(ValueError, match="has no .transformer. to train .*'unet'"):
        FlowPipeline(unet_pipeline(flow_solver(DPMSolverMultistepScheduler)))
