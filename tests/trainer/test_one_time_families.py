# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Pipelines that hold one time a call: every different time of a micro-batch is a call of its own."""

import pytest
import torch
from tiny_families import TINY
from trainer_helpers import small_trainer

from trl_marble.balance import Objective, SeparateBackward
from trl_marble.update import step_gradient


def test_times_of_their_own_give_the_per_reward_gradients_of_single_samples(tmp_path, monkeypatch):
    make, call = TINY["AuraFlowPipeline"]
    trainer = small_trainer(
        tmp_path,
        pipeline=make(),
        height=call["height"],
        width=call["width"],
        max_sequence_length=call["max_sequence_length"],
        balance_every=1,
    )
    made = []

    class Watched(SeparateBackward):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(step_gradient, "SeparateBackward", Watched)
    trainer.train()
    assert made, "no recorder of whole micro-batches is used"

    flow, parameters = trainer.flow, trainer.weights.parameters
    conditioning = flow.encode(["a cat", "two dogs", "a bird"])
    x_t = torch.randn(3, *trainer._batch.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    times, coefficients = torch.tensor([0.9, 0.4, 0.9]), torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, -1.0]])

    def gradients(parts: list[list[int]]) -> torch.Tensor:
        rows = SeparateBackward(2, parameters)
        for part in parts:
            i = torch.tensor(part)
            losses = flow.velocity(x_t[i], times[i], conditioning.select(i)).square().flatten(1).mean(1)
            rows.backward([Objective(losses, coefficients[:, i])])
        return rows.gradients

    together, alone = gradients([[0, 1, 2]]), gradients([[0], [1], [2]])
    assert together.norm(dim=1).min() > 0
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_gives_wrong_gradients_is_refused(tmp_path):
    make, call = TINY["ChromaPipeline"]
    trainer = small_trainer(
        tmp_path,
        pipeline=make(),
        height=call["height"],
        width=call["width"],
        max_sequence_length=call["max_sequence_length"],
        activation_checkpointing=True,
    )
    with pytest.raises(ValueError, match="not to be trusted for ChromaPipeline: .*Set activation_checkpointing=False"):
        trainer.train()


def test_their_base_is_not_sharded(tmp_path):
    make, call = TINY["AuraFlowPipeline"]
    with pytest.raises(
        ValueError, match="`shard_base=True` needs processes that call .*AuraFlowPipeline is called once"
    ):
        small_trainer(tmp_path, pipeline=make(), height=call["height"], width=call["width"], shard_base=True)
