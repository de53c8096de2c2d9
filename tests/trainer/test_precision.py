# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`bf16=True` reaches every call of the transformer, and nothing else."""

import pytest
import tiny
import torch
from evaluation_helpers import small_evaluation

from trl_marble.evaluation import evaluate_pipeline
from trl_marble.pipelines import FlowPipeline, WeightShadow, add_trainable_adapter, lora_config
from trl_marble.pipelines.precision import autocast_calls


def lora_layer(transformer):
    return next(m for name, m in transformer.named_modules() if name.endswith("to_q.lora_A.default"))


def flow_with_adapter(**settings):
    """An fp32 pipeline whose adapter changes the velocity, and a random input of it."""
    flow = FlowPipeline(tiny.tiny_sd3(t5=False, num_layers=1), max_sequence_length=16, **settings)
    trainable = dict(add_trainable_adapter(flow.pipeline, lora_config(flow.pipeline, r=4)))
    fill(trainable, seed=0)
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.3, 0.9]), flow.encode(["a cat", "a dog"]))
    return flow, trainable, inputs


def fill(trainable, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("bf16", [True, False])
def test_rollouts_evaluations_and_updates_compute_in_one_dtype(make_trainer, tiny_sd3, prompts, bf16, base):
    trainer = make_trainer(
        pipeline=tiny_sd3().to(base), bf16=bf16, max_steps=2, beta=0.1, eval_dataset=prompts, num_generations_eval=2
    )
    seen: dict[str, set[torch.dtype]] = {}
    part = "update"
    layer = lora_layer(trainer.flow.transformer)
    layer.register_forward_hook(lambda module, args, output: seen.setdefault(part, set()).add(output.dtype))
    rollout = trainer.flow.rollout

    def noted_rollout(*args, **kwargs):
        nonlocal part
        outer, part = part, {"update": "rollout"}.get(part, part)
        try:
            return rollout(*args, **kwargs)
        finally:
            part = outer

    trainer.flow.rollout = noted_rollout
    trainer.train()
    part = "evaluation"
    trainer.evaluate()
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert seen == {name: {dtype} for name in ("rollout", "update", "evaluation")}
    assert {parameter.dtype for parameter in trainer.weights.trained.values()} == {torch.float32}


def test_the_policy_that_samples_is_the_old_policy_of_the_loss(make_trainer):
    """With one solver step the rollout is one velocity; the update must find the same one in the same precision."""
    trainer = make_trainer(bf16=True)
    flow = trainer.flow
    fill(trainer.weights.trained, seed=0)
    conditioning = flow.encode(["a cat"])
    times = flow.training_times(1)
    latents = flow.rollout(conditioning, [5], 1).latents
    noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(5))
    with torch.no_grad():
        velocity = trainer.model(noise, times, conditioning)
    assert torch.equal(latents, noise - times * velocity)
    assert velocity.dtype == torch.float32 and torch.equal(velocity, velocity.bfloat16().float())


def test_only_the_transformer_computes_under_autocast():
    flow, _, _ = flow_with_adapter(autocast_dtype=torch.bfloat16)
    dtypes = set()
    flow.pipeline.vae.decoder.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    rollout = flow.rollout(flow.encode(["a cat"]), [0], 2)
    assert dtypes == {torch.float32} and rollout.latents.dtype == torch.float32


def test_another_policy_put_in_place_is_seen_under_autocast():
    flow, trainable, inputs = flow_with_adapter(autocast_dtype=torch.bfloat16)
    other = WeightShadow(trainable.items())
    old = flow.velocity(*inputs).detach()
    fill(trainable, seed=2)
    new = flow.velocity(*inputs).detach()
    assert not torch.equal(old, new)
    with torch.autocast("cpu", torch.bfloat16):  # keeps converted weights until it ends, for all that is inside
        for _ in range(2):
            assert torch.equal(flow.velocity(*inputs), new)
            with other.swapped_in():
                assert torch.equal(flow.velocity(*inputs), old)


def test_gradients_under_checkpointing_are_those_without_it():
    flow, trainable, inputs = flow_with_adapter(autocast_dtype=torch.bfloat16)
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            flow.transformer.train().enable_gradient_checkpointing()
        flow.velocity(*inputs).square().mean().backward()
        gradients.append([parameter.grad for parameter in trainable.values()])
        for parameter in trainable.values():
            parameter.grad = None
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None and recomputed is None) or torch.equal(plain, recomputed)


def test_a_call_that_fails_leaves_no_autocast_behind():
    flow, _, _ = flow_with_adapter()

    def interrupt(*args):
        raise KeyboardInterrupt

    for failure, fail in ((KeyboardInterrupt, interrupt), (TypeError, lambda *args: None + 1)):
        handle = flow.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
        hooks = len(flow.transformer._forward_hooks)
        flow.autocast_dtype = torch.bfloat16
        with pytest.raises(failure):
            flow.rollout(flow.encode(["a cat"]), [0], 1)
        handle.remove()
        assert not torch.is_autocast_enabled("cpu") and len(flow.transformer._forward_hooks) == hooks


@pytest.mark.parametrize("kind", [tuple, list, "output"])
def test_what_a_module_returns_keeps_its_dtype(kind):
    class Model(torch.nn.Linear):
        dtype = torch.float32  # as a model of diffusers says

        def forward(self, x):
            number, values = torch.arange(2), super().forward(x)
            if kind == "output":
                from diffusers.models.modeling_outputs import Transformer2DModelOutput

                return Transformer2DModelOutput(sample=values)
            return kind([values, number])

    model = Model(3, 3)
    with autocast_calls([model], torch.bfloat16):
        output = model(torch.ones(1, 3))
    exact = model(torch.ones(1, 3))
    assert type(output) is type(exact)
    assert output[0].dtype == torch.float32 and not torch.equal(output[0], exact[0])  # computed in bf16
    if kind == "output":
        assert output.sample.dtype == torch.float32
    else:
        assert output[1].dtype == torch.int64


@pytest.mark.parametrize("bf16", [True, False])
def test_both_evaluations_agree(make_trainer, tiny_sd3, prompts, rewards, tmp_path, bf16):
    rewards = rewards[:2]
    trainer = make_trainer(
        bf16=bf16, max_steps=2, learning_rate=0.1, eval_dataset=prompts, num_generations_eval=2, reward_funcs=rewards
    )
    base = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate()
    args = small_evaluation(
        tmp_path / "eval",
        adapter=trainer.args.output_dir,
        bf16=bf16,
        num_generations=2,
        num_inference_steps=3,
        seed=42,
    )
    results = evaluate_pipeline(tiny_sd3(), rewards, prompts, args)
    for reward in rewards:
        key = f"eval_rewards/{reward.__name__}/mean"
        mean = results.table[reward.__name__].mean()
        assert mean == pytest.approx(metrics[key], abs=2e-4 if bf16 else 1e-5)
        assert abs(mean - base[key]) > 1e-3  # the adapter matters
