# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the trainer's evaluations say of rewards, and which of their images are kept."""

import math

import pytest
from datasets import Dataset
from trainer_helpers import bright, small_trainer

from trl_marble.evaluation import evaluator
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
