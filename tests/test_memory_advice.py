# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run that does not fit into memory says which settings to change, for the part that did not fit."""

import pytest
import torch
from trainer_helpers import bright, prompt_set, small_trainer

from trl_marble import MarbleNFTTrainer
from trl_marble.rewards import RewardError


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


def run_out(trainer: MarbleNFTTrainer, in_update: bool, after: int = 0) -> None:
    """Let the transformer's passes of one part of the run end as they do on a device that is full."""
    passes = 0

    def fail(module, args):
        nonlocal passes
        passes += torch.is_grad_enabled() == in_update
        if passes > after and torch.is_grad_enabled() == in_update:
            raise torch.OutOfMemoryError(FULL)

    trainer.flow.transformer.register_forward_pre_hook(fail)


def note_of(error: BaseException) -> str:
    (note,) = (note for note in error.__notes__ if "it is saved in" not in note)
    return note


def test_in_a_rollout(tmp_path) -> None:
    trainer = small_trainer(tmp_path, rollout_batch_size=3)
    run_out(trainer, in_update=False)
    with pytest.raises(torch.OutOfMemoryError, match=FULL) as caught:
        trainer.train()
    assert "set a smaller `rollout_batch_size` (it is 3;" in note_of(caught.value)


def test_in_an_update_and_the_step_before_is_kept(tmp_path) -> None:
    trainer = small_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    run_out(trainer, in_update=True, after=2 * trainer.update.grid.per_sample)
    with pytest.raises(torch.OutOfMemoryError, match=FULL) as caught:
        trainer.train()
    note = note_of(caught.value)
    for part in (
        "`activation_checkpointing=True`",
        "`per_device_train_batch_size` (it is 2)",
        "`gradient_accumulation_steps` (they are 2)",
    ):
        assert part in note
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]


def test_where_the_gradients_of_a_step_are_put_together(tmp_path, monkeypatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError(FULL)

    trainer = small_trainer(tmp_path)
    monkeypatch.setattr(trainer.update, "finish", fail)
    with pytest.raises(torch.OutOfMemoryError, match=FULL) as caught:
        trainer.train()
    assert "`per_device_train_batch_size` (it is 4)" in note_of(caught.value)


def test_in_a_reward(tmp_path) -> None:
    def large(images, **kwargs):
        raise torch.OutOfMemoryError(FULL)

    with pytest.raises(RewardError, match="`large` raised OutOfMemoryError: CUDA out of memory") as caught:
        small_trainer(tmp_path, [bright, large]).train()
    note = note_of(caught.value)
    assert "Scoring images ran out" in note and "`offload=True`" in note and "reward server" in note


def test_in_an_evaluation(tmp_path) -> None:
    trainer = small_trainer(tmp_path, eval_dataset=prompt_set(), per_device_eval_batch_size=5)
    run_out(trainer, in_update=False)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.evaluate()
    assert "set a smaller `per_device_eval_batch_size` (it is 5;" in note_of(caught.value)


def test_other_errors_are_left_as_they_are(tmp_path) -> None:
    trainer = small_trainer(tmp_path)

    def fail(module, args):
        raise RuntimeError("shapes do not match")

    trainer.flow.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes") as caught:
        trainer.train()
    assert not getattr(caught.value, "__notes__", None)
