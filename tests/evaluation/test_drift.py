# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The KL to the base model of an evaluation, against a direct computation."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from evaluation_helpers import bright, prompt_set, random_adapter, small_evaluation
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from trainer_helpers import small_trainer

from trl_marble.evaluation import EvaluationResults, evaluate_pipeline
from trl_marble.evaluation.evaluator import EvaluationPlan
from trl_marble.pipelines import FlowPipeline, add_trainable_adapter
from trl_marble.seeding import Draw, derive_seed


@pytest.fixture
def pipeline(tiny_sd3):
    return tiny_sd3(t5=False, num_layers=1)


def evaluate(pipeline, folder, **settings) -> EvaluationResults:
    return evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(folder, **settings))


def test_it_is_the_distance_of_velocities_with_and_without_the_adapter(pipeline, tmp_path, tiny_sd3):
    adapter = random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path / "adapter")
    results = evaluate(pipeline, tmp_path / "out", adapter=str(adapter.parent), num_inference_steps=4)
    assert results.table["kl"].min() > 0
    assert EvaluationResults.load(results.folder).table.equals(results.table)

    pipeline.load_lora_weights(adapter)
    flow = FlowPipeline(pipeline, max_sequence_length=16)
    times, plan = flow.training_times(4), EvaluationPlan(prompt_set(), False, 3, 0, 5)
    for row in results.table.iloc[[0, 4, 11]].itertuples():
        conditioning = flow.encode([row.prompt])
        x0 = flow.rollout(conditioning, [row.seed], 4).latents
        generator = torch.Generator().manual_seed(derive_seed(row.seed, Draw.EVALUATION_NOISE))
        noise = torch.randn(x0.shape[1:], generator=generator)[None]
        t = times[int(plan.time_place(row.index) * 4)][None]
        velocities = []
        for switch in (pipeline.enable_lora, pipeline.disable_lora):
            switch()
            with torch.no_grad():
                velocities.append(flow.velocity((1 - t) * x0 + t * noise, t, conditioning))
        pipeline.enable_lora()
        assert row.kl == pytest.approx((velocities[0] - velocities[1]).square().mean().item(), rel=1e-3)
    rows = results.table.groupby("prompt_index")["kl"].mean()
    mean, error = results.kl_to_base()
    assert (mean, error) == (pytest.approx(rows.mean()), pytest.approx(rows.std() / 2))


def test_it_costs_two_passes_for_each_image(pipeline, tmp_path, tiny_sd3):
    adapter = str(random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path / "adapter").parent)
    sizes: list[int] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    evaluate(pipeline, tmp_path / "base")
    assert sum(sizes) == 12 * 2  # solver steps
    sizes.clear()
    evaluate(pipeline, tmp_path / "ours", adapter=adapter)
    assert sum(sizes) == 12 * (2 + 2)


def test_times_are_spread_over_the_grid_within_a_prompt_and_over_prompts():
    plan = EvaluationPlan(Dataset.from_dict({"prompt": ["a"] * 60}), False, 4, 0, 8)
    places = np.array([plan.time_place(index) for index in range(240)]).reshape(60, 4)
    assert ((places * 4).astype(int) == np.arange(4)).all()
    counts = np.bincount((places.flatten() * 25).astype(int), minlength=25)
    assert counts.min() >= 8 and counts.max() <= 11 and len(counts) == 25


def test_an_adapter_that_was_not_trained_has_none(pipeline, tmp_path):
    add_trainable_adapter(pipeline, LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.transformer.train()
    results = evaluate(pipeline, tmp_path / "untrained")
    assert (results.table["kl"] == 0).all() and results.kl_to_base() == (0, 0)
    layers = [layer for layer in pipeline.transformer.modules() if isinstance(layer, BaseTunerLayer)]
    assert pipeline.transformer.training and layers and not any(layer.disable_adapters for layer in layers)


def test_nothing_is_said_of_a_pipeline_whose_base_is_not_known(pipeline, tmp_path, tiny_sd3):
    base = evaluate(pipeline, tmp_path / "base")
    assert base.kl_to_base() is None and "kl" not in base.table
    adapter = random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path / "adapter")
    pipeline.load_lora_weights(adapter)
    loaded = evaluate(pipeline, tmp_path / "loaded")
    assert loaded.kl_to_base() is not None
    assert loaded.settings["base_digest"] == base.settings["pipeline_digest"] != loaded.settings["pipeline_digest"]
    pipeline.fuse_lora()
    fused = evaluate(pipeline, tmp_path / "fused")
    assert fused.kl_to_base() is None and fused.settings["base_digest"] != base.settings["pipeline_digest"]
    pipeline.unload_lora_weights()
    assert evaluate(pipeline, tmp_path / "fused and unloaded").kl_to_base() is None
    np.testing.assert_allclose(fused.table["bright"], loaded.table["bright"], atol=1 / 255)


def test_an_adapter_of_a_text_encoder_has_no_base_in_the_transformer(pipeline, tmp_path):
    config = LoraConfig(r=2, target_modules=["to_q"])
    add_trainable_adapter(pipeline, config)
    # `add_adapter` of transformers does the same; version 5.24 wants a peft that is not released yet.
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), pipeline.text_encoder)
    assert evaluate(pipeline, tmp_path).kl_to_base() is None


def test_it_is_continued_with_the_very_same_numbers(pipeline, tmp_path, tiny_sd3):
    adapter = str(random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path / "adapter").parent)
    whole = evaluate(pipeline, tmp_path / "out", adapter=adapter)
    (tmp_path / "out" / "records" / "batch_00001.json").unlink()
    assert evaluate(pipeline, tmp_path / "out", adapter=adapter).table.equals(whole.table)


def test_velocities_that_are_not_finite_stop_an_evaluation_or_are_left_out(pipeline, tmp_path, tiny_sd3):
    adapter = str(random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path / "adapter").parent)
    calls = []

    def overflow(module, inputs, output):
        """Of the third image of the first batch, where the policy's velocity is asked for after two solver steps."""
        calls.append(None)
        if len(calls) == 3:
            output[0][2] = torch.inf

    handle = pipeline.transformer.register_forward_hook(overflow)
    try:
        with pytest.raises(FloatingPointError, match="velocities of 1 of 5 noised images are not finite"):
            evaluate(pipeline, tmp_path / "raise", adapter=adapter)
        calls.clear()
        masked = evaluate(pipeline, tmp_path / "mask", adapter=adapter, reward_failure="mask")
    finally:
        handle.remove()
    assert masked.table["kl"].isna().tolist() == [place == 2 for place in range(12)]
    assert masked.table["bright"].notna().all()


def test_the_trainer_logs_it_for_the_averaged_weights(tmp_path):
    trainer = small_trainer(
        tmp_path, bright, eval_dataset=prompt_set(), eval_strategy="steps", eval_steps=2, eval_on_start=True
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_kl" in row]
    assert rows[0]["eval_kl"] == 0 and rows[0]["eval_drift/velocity_norm"] == 1 and rows[-1]["eval_kl"] > 0
    assert trainer.evaluations[-1].kl.mean().item() == pytest.approx(rows[-1]["eval_kl"])
