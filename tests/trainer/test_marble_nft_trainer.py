# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run does and leaves behind, on a tiny Stable Diffusion 3."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from transformers import TrainerCallback

from trl_marble.evaluation import Evaluation
from trl_marble.evaluation.evaluator import image_seed
from trl_marble.pipelines import FlowPipeline


def copies(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("aggregation", ["marble", "equal", "sum_then_normalize", "normalize_then_sum"])
def test_the_adapter_changes_and_nothing_else(make_trainer, aggregation):
    balance = {"balance_every": 2} if aggregation in ("marble", "equal") else {}
    trainer = make_trainer(multi_objective_aggregation=aggregation, max_steps=3, **balance)
    parts = {name: part for name, part in trainer.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    before = {name: copies(part.named_parameters()) for name, part in parts.items()}
    trainer.train()
    changed = set()
    for name, part in parts.items():
        for parameter_name, parameter in part.named_parameters():
            if not torch.equal(parameter, before[name][parameter_name]):
                changed.add((name, parameter_name))
    assert changed and {part for part, _ in changed} == {"transformer"}
    assert {name for _, name in changed} <= set(trainer.weights.trained)
    assert all(".lora_" in name for name in trainer.weights.trained)
    # All but what the last block provably does not use.
    assert len(changed) > 0.75 * len(trainer.weights.trained)


def test_metrics_of_a_run(make_trainer):
    trainer = make_trainer(max_steps=4, balance_every=2)
    trainer.train()
    for name, valid in (("brightness", 1.0), ("redness", None), ("darkness", 1.0)):
        shares = logged(trainer, f"rewards/{name}/valid")
        assert len(shares) == 4 and all(0 <= share <= 1 for share in shares)
        assert valid is None or shares == [valid] * 4
        assert all(0 < mean < 1 for mean in logged(trainer, f"rewards/{name}/mean") if not math.isnan(mean))
        assert len(logged(trainer, f"rewards/{name}/std")) == 4
        assert len(logged(trainer, f"balance/alpha/{name}")) == 4
        # A reward without a valid sample has no gradient and takes no part, so it may ask for a solve later.
        assert len(logged(trainer, f"balance/grad_norm/{name}")) >= 2
    for key in ("cos_min", "cos_mean", "cos_var", "conflict"):
        assert len(logged(trainer, f"balance/{key}")) == len(logged(trainer, f"balance/weighted_sum/{key}")) >= 2
    assert all(cosine >= -1e-6 for cosine in logged(trainer, "balance/cos_min"))
    assert all(share == 0 for share in logged(trainer, "balance/conflict"))
    # The first step starts at the base model.
    divergence = logged(trainer, "kl")
    assert divergence[0] == 0 and all(value > 0 for value in divergence[1:])
    for key in ("drift/diversity", "drift/latent_rms", "drift/velocity_rms", "loss", "grad_norm"):
        assert all(math.isfinite(value) for value in logged(trainer, key)) and len(logged(trainer, key)) == 4


def test_equal_aggregation_weighs_equally_and_adding_up_balances_nothing(make_trainer):
    equal = make_trainer(multi_objective_aggregation="equal", max_steps=1)
    equal.train()
    active = [name for name in equal.scorer.names if logged(equal, f"balance/grad_norm/{name}")[0] > 0]
    for name in active:
        assert logged(equal, f"balance/alpha/{name}") == pytest.approx([1 / len(active)])
    summed = make_trainer(multi_objective_aggregation="sum_then_normalize", max_steps=1)
    summed.train()
    assert not [key for entry in summed.state.log_history for key in entry if key.startswith("balance/")]


@pytest.mark.parametrize(
    ("settings", "base"), [({"beta": 0.0}, 0), ({"beta": 0.1}, 1), ({"beta": 0.1, "regularizer_fraction": 1.0}, 4)]
)
def test_the_base_model_runs_only_for_the_penalty(make_trainer, settings, base):
    trainer = make_trainer(max_steps=1, num_inference_steps=4, timestep_fraction=1.0, **settings)
    calls = {True: 0, False: 0}

    def count(module, args, kwargs):
        rollout = kwargs["hidden_states"].shape[0] == trainer.args.num_generations
        calls[rollout] += 1

    trainer.flow.transformer.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert calls[True] == 2 * 4  # two groups, four solver steps
    assert calls[False] == 4 + base  # trained (still the old one) at four timesteps, and base where it counts


def test_prompts_are_encoded_once_each(make_trainer):
    trainer = make_trainer(max_steps=1)
    sizes = []
    trainer.pipeline.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(args[0].shape[0]), with_kwargs=True
    )
    trainer.train()
    assert sizes == [2]  # a generation batch of 8 images holds two prompts


def test_old_policy_follows_after_each_generation_batch(make_trainer):
    """Preset 0 samples with the weights just trained; preset 1 lags behind, by eta = 0.001 a step so far."""

    class Watch(TrainerCallback):
        def __init__(self):
            self.old = []

        def on_step_end(self, args, state, control, **kwargs):
            self.old.append(copies(trainer.weights.old.state_dict().items()))

    for preset, eta in ((0, 0.0), (1, 0.002)):
        watch = Watch()
        trainer = make_trainer(old_policy_preset=preset, steps_per_generation=2, max_steps=2, callbacks=[watch])
        start = copies(trainer.weights.trained.items())
        trainer.train()
        for name, parameter in trainer.weights.trained.items():
            assert torch.equal(watch.old[0][name], start[name])  # within a generation batch nothing moves
            expected = eta * start[name] + (1 - eta) * parameter.detach()
            torch.testing.assert_close(watch.old[1][name], expected)


def test_averaged_weights_are_what_is_evaluated_and_saved(make_trainer, tiny_sd3, prompts, tmp_path):
    trainer = make_trainer(max_steps=3, weight_ema_decay=0.9, eval_dataset=prompts, num_images_to_log=6)
    trainer.train()
    current = copies(trainer.weights.trained.items())
    trainer.evaluate()
    trainer.save_model()
    for name, parameter in trainer.weights.trained.items():
        assert torch.equal(parameter, current[name])
    assert any(not torch.equal(v, current[k]) for k, v in trainer.weights.averaged.state_dict().items())

    fresh = tiny_sd3()
    fresh.load_lora_weights(trainer.args.output_dir)
    fresh.set_progress_bar_config(disable=True)
    flow = FlowPipeline(fresh, max_sequence_length=16)
    seeds = [image_seed(trainer.args.seed, 0, i) for i in range(4)]
    again = flow.rollout(flow.encode(["a red dog"] * 4), seeds, trainer.args.num_inference_steps)
    kept = trainer.evaluations[-1].gallery["a red dog"]
    for image, expected in zip(again.images, kept, strict=True):
        difference = torch.tensor(list(image.tobytes())).int() - torch.tensor(list(expected.tobytes())).int()
        assert difference.abs().max() <= 1  # batches of another size round differently


def test_saved_adapter_is_small_and_not_pickled(make_trainer):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    files = {path.name for path in folder.iterdir()}
    assert files - {"balance.png"} == {
        "pytorch_lora_weights.safetensors",
        "checkpoint-1",
        "README.md",
        "model_card.json",
    }
    assert isinstance(StableDiffusion3Pipeline.lora_state_dict(folder), dict)


def test_evaluation_is_repeatable_and_complete(make_trainer, prompts):
    trainer = make_trainer(eval_dataset=prompts, num_generations_eval=3, per_device_eval_batch_size=4)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    assert isinstance(trainer.evaluations[0], Evaluation)
    assert torch.equal(trainer.evaluations[0].rewards.isnan(), trainer.evaluations[1].rewards.isnan())
    assert trainer.evaluations[0].rewards.shape == (3, 18)
    assert first["eval_rewards/redness/valid"] == pytest.approx(0.5)
    row = trainer.evaluations[0].rewards[0].double()
    assert first["eval_rewards/brightness/mean"] == pytest.approx(row.mean().item())
    over_prompts = row.view(6, 3).mean(dim=1).std() / 6**0.5
    assert first["eval_rewards/brightness/standard_error"] == pytest.approx(over_prompts.item())
    assert first["eval_drift/velocity_norm"] == pytest.approx(1.0)
    assert 0 < first["eval_drift/diversity"] < 1
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer("none").evaluate()


def test_bf16_base_keeps_fp32_adapters(make_trainer, tiny_sd3):
    trainer = make_trainer(pipeline=tiny_sd3().to(torch.bfloat16), max_steps=2)
    assert {parameter.dtype for parameter in trainer.weights.trained.values()} == {torch.float32}
    frozen = {p.dtype for n, p in trainer.flow.transformer.named_parameters() if n not in trainer.weights.trained}
    assert frozen == {torch.bfloat16}
    before = copies(trainer.weights.trained.items())
    trainer.train()
    assert any(not torch.equal(before[name], parameter) for name, parameter in trainer.weights.trained.items())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.weights.trained.values())


def test_flux(make_trainer, tiny_flux):
    trainer = make_trainer(pipeline=tiny_flux(), height=16, width=16, guidance_scale=3.5, balance_on="advantage")
    trainer.train()
    assert all(cosine >= -1e-6 for cosine in logged(trainer, "balance/cos_min"))


def test_a_pipeline_from_a_folder_and_the_seed(make_trainer, tiny_sd3, tmp_path):
    tiny_sd3().save_pretrained(tmp_path / "base")
    first = make_trainer("one", pipeline=str(tmp_path / "base"), seed=3)
    second = make_trainer("two", seed=3)
    third = make_trainer("three", seed=4)
    for trainer in (first, second, third):
        trainer.train()
    for name, parameter in first.weights.trained.items():
        assert torch.equal(parameter, second.weights.trained[name])
    assert any(
        not torch.equal(parameter, third.weights.trained[name]) for name, parameter in first.weights.trained.items()
    )


def test_dataset_columns_and_state_reach_the_rewards(make_trainer):
    seen = []

    def check(images, prompts, source, trainer_state):
        seen.append((len(images), len(prompts), list(source), trainer_state.global_step))
        assert all(isinstance(image, Image.Image) for image in images)
        return [float(i) for i in range(len(images))]

    trainer = make_trainer(reward_funcs=check, max_steps=2)
    trainer.train()
    assert [entry[:2] for entry in seen] == [(4, 4)] * 4
    assert all(len(set(entry[2])) == 1 for entry in seen)  # one group has one row's values
    assert [entry[3] for entry in seen] == [0, 0, 1, 1]


def test_a_reward_that_never_applies_takes_no_part(make_trainer, rewards):
    def never(images, **kwargs):
        return [None] * len(images)

    with pytest.warns(UserWarning, match="`never` applied to none") as caught:
        trainer = make_trainer(reward_funcs=[*rewards[::2], never], max_steps=2)
        trainer.train()
    assert len([w for w in caught if "`never`" in str(w.message)]) == 1
    without = make_trainer("without", reward_funcs=rewards[::2], max_steps=2)
    without.train()
    for name, parameter in trainer.weights.trained.items():
        torch.testing.assert_close(parameter, without.weights.trained[name])
    assert logged(trainer, "balance/alpha/never") == [0.0, 0.0]


def test_the_callers_list_of_rewards_is_not_changed(make_trainer, rewards):
    given = list(rewards)
    make_trainer(reward_funcs=given)
    assert given == rewards
