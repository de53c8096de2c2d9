# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Training on a mix of prompt sets: every generation batch has its share of each, also after a resume."""

from pathlib import Path

import pytest
from datasets import Dataset

from trl_marble.data import mix_prompts


@pytest.fixture
def mixed():
    def prompts(name, number):
        return Dataset.from_dict({"prompt": [f"{name} {i}" for i in range(number)]})

    return mix_prompts({"a": prompts("a", 4), "b": prompts("b", 3), "c": prompts("c", 2)}, {"a": 2, "b": 1, "c": 1})


def train(make_trainer, mixed, folder, resume=None, **settings):
    """Trains with four prompts a step, and returns the trainer and the prompts of each generation batch."""
    batches = []

    def note(images, prompts, source, **kwargs):
        assert [prompt[0] for prompt in prompts] == source
        batches.append(list(prompts))
        return [float(len(batches) + i) for i in range(len(images))]

    settings = {"num_generations": 2, "rollout_batch_size": 8, "max_steps": 6, "save_strategy": "steps"} | settings
    trainer = make_trainer(folder, reward_funcs=[note], train_dataset=mixed, save_steps=3, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, batches


def test_each_batch_has_its_share_of_every_source(make_trainer, mixed):
    trainer, batches = train(make_trainer, mixed, "whole")
    assert len(batches) == 6
    for batch in batches:
        different = set(batch)
        assert len(different) == 4 and all(batch.count(prompt) == 2 for prompt in different)
        assert sorted(prompt[0] for prompt in different) == ["a", "a", "b", "c"]
    folder = Path(trainer.args.output_dir) / "checkpoint-3"
    _, rest = train(make_trainer, mixed, "resumed", resume=str(folder))
    assert rest == batches[3:]


def test_a_mix_with_other_weights_is_not_resumed(make_trainer, mixed):
    trainer, _ = train(make_trainer, mixed, "whole", max_steps=3)
    other = mixed.filter(lambda row: row["source"] != "c")
    with pytest.raises(ValueError, match="source_weights"):
        train(make_trainer, other, "other", resume=str(Path(trainer.args.output_dir) / "checkpoint-3"))
