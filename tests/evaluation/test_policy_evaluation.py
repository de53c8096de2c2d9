# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the trainer's evaluations say of rewards, and which of their images are kept."""

import dataclasses
import math

import one_evaluator
import pytest
from datasets import Dataset
from one_evaluator import partly
from trainer_helpers import bright, small_trainer

from trl_marble.evaluation import EvaluationConfig, compare_evaluations, evaluate_pipeline, evaluator, run_gains
from trl_marble.evaluation.evaluator import EvaluationPlan


PROMPTS = ["a red dog", "a cat", "red hat", "a red dog"]  # two rows of one text


def trainer_of(folder, prompts):
    dataset = Dataset.from_dict({"prompt": prompts})
    return small_trainer(folder, bright, eval_dataset=dataset, num_generations_eval=3, per_device_eval_batch_size=12)


def test_one_prompt_has_a_mean_and_no_standard_error(tmp_path):
    metrics = trainer_of(tmp_path, ["a red dog"] * 2).evaluate()
    assert metrics["eval_rewards/bright/mean"] > 0
    assert math.isnan(metrics["eval_rewards/bright/standard_error"])


def test_images_are_kept_of_the_first_and_the_latest_evaluation(tmp_path):
    trainer = trainer_of(tmp_path, PROMPTS)
    for _ in range(4):
        trainer.evaluate()
    assert [bool(evaluation.gallery) for evaluation in trainer.evaluations] == [True, False, False, True]
    assert len({evaluation.rewards.shape for evaluation in trainer.evaluations}) == 1


@pytest.mark.parametrize("change", [("num_inference_steps", 3), ("guidance_scale", 2.0), ("max_sequence_length", 8)])
def test_gains_are_told_only_of_images_that_are_sampled_as_the_first_ones_were(tmp_path, change):
    trainer = trainer_of(tmp_path, PROMPTS[:2])
    trainer.evaluate()
    trainer.state.global_step = 1
    assert "eval_gain_worst" in trainer.evaluate()
    name, value = change
    sampler = trainer.evaluator.sampler
    setattr(sampler if name == "num_inference_steps" else sampler.flow, name, value)
    assert "eval_gain_worst" not in trainer.evaluate()


@pytest.mark.parametrize("num_images", [1, 4, 6, 9, 12, 14, 17])
def test_processes_that_call_the_transformer_together_sample_equally_many_images_at_a_time(monkeypatch, num_images):
    plan = EvaluationPlan(Dataset.from_dict({"prompt": ["a cat"] * num_images}), False, 1, 0, batch_size=4)
    monkeypatch.setattr(EvaluationPlan, "make_batch", lambda self, flow, number: self.batches[number])
    shares = [list(range(process, len(plan.batches), 3)) for process in range(3)]
    num_full = max(sum(len(plan.batches[n]) == len(plan.batches[0]) for n in share) for share in shares)
    monkeypatch.setattr(evaluator, "gather_object", lambda own: [*own, num_full])
    sampled, delivered = [], []

    class Sampler:
        flow, calls_together = None, True

        def sample_and_score(self, scorers, batches, rounds, num, state, deliver, max_waiting, measure):
            sampled.append([len(batch) for batch in batches])
            assert rounds == len(sampled[-1]) and num == sum(sampled[-1])
            for place in range(rounds):
                deliver(place)

    for share in shares:
        mine: list[int] = []
        evaluator.evaluate_batches(plan, Sampler(), [], share, None, lambda number, _, mine=mine: mine.append(number))
        delivered.append(mine)
    assert sampled[0] == sampled[1] == sampled[2]
    assert delivered == shares


def run(folder):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "num_generations_eval": 3}
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    return small_trainer(folder, [bright, partly], eval_dataset=dataset, learning_rate=0.05, **settings)


def test_joint_gains_are_since_the_evaluation_before_the_first_step(tmp_path):
    trainer = run(tmp_path)
    trainer.train()
    first, _, last = [row for row in trainer.state.log_history if "eval_kl" in row]
    assert first["eval_joint_gain"] == first["eval_joint_fall"] == 0
    found = trainer.evaluations[-1].gains_since(trainer.evaluations[0])
    assert (last["eval_joint_gain"], last["eval_joint_gain_standard_error"]) == found.joint_gain
    assert last["eval_joint_fall"] == found.joint_fall[0] and last["eval_joint_gain"] + last["eval_joint_fall"] > 0
    changes = trainer.evaluations[-1].change_since(trainer.evaluations[0])
    for row, (name, (change, error)) in zip(trainer.evaluations[0].rewards, changes.items(), strict=True):
        deviation = row[~row.isnan()].std(correction=0).item()
        assert last[f"eval_gain/{name}/mean"] == pytest.approx(change / deviation, rel=1e-5)
        assert last[f"eval_gain/{name}/standard_error"] == pytest.approx(error / deviation, rel=1e-5)
    other = trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:2]}))
    assert "eval_joint_gain" not in other and other["eval_kl"] > 0  # these prompts were not evaluated before


@pytest.mark.filterwarnings("ignore:Reward `partly` applied to none")
def test_a_runs_own_gains_are_those_of_a_comparison_of_files(tmp_path):
    trainer = run(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    results = {
        name: evaluate_pipeline(
            one_evaluator.make_pipeline(),
            [bright, partly],
            Dataset.from_dict({"prompt": PROMPTS}),
            EvaluationConfig(
                str(tmp_path / name),
                adapter=adapter,
                num_generations=3,
                seed=42,
                num_inference_steps=2,
                max_sequence_length=16,
                batch_size=trainer.args.per_device_eval_batch_size,
            ),
        )
        for name, adapter in (("base", None), ("ours", str(tmp_path / "run")))
    }
    ours, last = compare_evaluations(results).gains["ours"], run_gains(trainer.state.log_history)[-1]
    assert dataclasses.replace(ours, step=2) == last and last.kl[0] > 0
