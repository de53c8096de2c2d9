# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Real runs whose rewards follow a script: the adapter with the best worst reward is kept, also across a resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_helpers import prompt_set, small_trainer

from trl_marble.evaluation import WorstGain
from trl_marble.hub import CardInputs


WEIGHTS = "pytorch_lora_weights.safetensors"


def scripted(images, trainer_state, shifts):
    """0, 1, 2, ... for the images, and what the script adds at this step."""
    return [place + shifts[trainer_state.global_step] for place in range(len(images))]


def easy(images, trainer_state, **kwargs):
    return scripted(images, trainer_state, [0, 1, 2, 3, 4])


def hard(images, trainer_state, **kwargs):
    return scripted(images, trainer_state, [0, 0.5, 0.7, -1, -3])


def run(folder, max_steps=4, **overrides):
    return small_trainer(
        folder,
        (easy, hard),
        num_generations_eval=1,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=1,
        max_steps=max_steps,
        **{"eval_dataset": prompt_set().select(range(4))}
        | {"metric_for_best_model": "eval_gain_worst", "load_best_model_at_end": True}
        | overrides,
    )


def worst(trainer, metric="eval_gain_worst"):
    return {row["step"]: row[metric] for row in trainer.state.log_history if metric in row}


def test_the_adapter_with_the_best_worst_reward_is_kept_and_saved(tmp_path):
    trainer = run(tmp_path, save_total_limit=2)
    trainer.train()
    std = torch.arange(4.0).std(correction=0).item()
    assert worst(trainer) == pytest.approx({0: 0, 1: 0.5 / std, 2: 0.7 / std, 3: -1 / std, 4: -3 / std})
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    trainer.save_model()
    saved, best, last = (load_file(tmp_path / place / WEIGHTS) for place in (".", "checkpoint-2", "checkpoint-4"))
    assert all(torch.equal(saved[name], value) for name, value in best.items())
    assert not all(torch.equal(saved[name], value) for name, value in last.items())

    # The card is that of this adapter, and not of the last step's.
    inputs = CardInputs.load(tmp_path)
    assert inputs.adapter_step == 2 and inputs.best_evaluation == inputs.adapter_evaluation
    assert inputs.best_evaluation == WorstGain(2, "hard", worst(trainer)[2])
    assert [row.after - row.before for row in inputs.rewards] == pytest.approx([2, 0.7])
    assert len(inputs.gallery) == 4
    *_, best_evaluation, _, _ = trainer.evaluations
    assert trainer.summarize().gallery is best_evaluation.gallery and best_evaluation.step == 2
    assert "best evaluation" not in (tmp_path / "README.md").read_text()


def test_the_card_says_which_evaluation_was_better_than_the_last_one(tmp_path):
    trainer = run(tmp_path, max_steps=3, metric_for_best_model=None, load_best_model_at_end=False)
    trainer.train()
    trainer.save_model()
    inputs, gains = CardInputs.load(tmp_path), worst(trainer)
    assert inputs.best_evaluation == WorstGain(2, "hard", gains[2]) and inputs.adapter_step == 3
    assert inputs.adapter_evaluation == WorstGain(3, "hard", gains[3])
    card = (tmp_path / "README.md").read_text()
    assert "The best evaluation in training was that of step 2, where the least gain" in card
    assert f"was {gains[2]:+.2f} (hard)" in card
    assert f"the adapter is from step 3, whose latest evaluation, of step 3, had {gains[3]:+.2f} (hard)" in card


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_evaluation_before_the_first_step(tmp_path):
    sets = {"all": prompt_set().select(range(4)), "few": prompt_set().select(range(2))}
    settings = {"eval_dataset": sets, "metric_for_best_model": "few_gain_worst"}
    whole, begun = (run(tmp_path / name, steps, **settings) for name, steps in (("whole", 3), ("begun", 2)))
    whole.train()
    begun.train()
    resumed = run(tmp_path / "begun", 3, **settings)
    resumed.train(resume_from_checkpoint=True)
    for metric in {key for row in whole.state.log_history for key in row if key.startswith("eval_")}:
        assert worst(resumed, metric) == worst(whole, metric), metric
    of_few = worst(whole, "eval_few_gain_worst")
    assert of_few == pytest.approx({0: 0, 1: 1, 2: 1.4, 3: -2})
    assert 0 < worst(whole)[2] < of_few[2]  # of more images, which differ more
    assert resumed.state.best_global_step == whole.state.best_global_step == 2
    state = json.loads(Path(tmp_path, "begun", "checkpoint-3", "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "begun" / "checkpoint-2")

    other = run(tmp_path / "begun", 4, **settings | {"eval_dataset": {"few": prompt_set().select([4, 5])}})
    with pytest.raises(ValueError, match="'few_gain_worst', and the run that is resumed did not evaluate these"):
        other.train(resume_from_checkpoint=True)
