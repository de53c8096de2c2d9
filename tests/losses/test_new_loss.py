# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Whoever adds a loss writes one class in one file, and one line where losses are named."""

from dataclasses import dataclass

import pytest
import torch
from trainer_helpers import small_trainer

from trl_marble.losses import LOSSES, OnNoisedSamples, Penalties
from trl_marble.losses.forward_process import divide_by_counts


@dataclass(frozen=True)
class ToyLoss(OnNoisedSamples):
    """Reward-weighted flow matching: minus the matching error of what was good, plus that of what was bad."""

    advantage_clip: float
    needs = frozenset()
    penalties = Penalties()
    samples_with_old = False

    def terms(self, velocity, drawn, frozen):
        return ((velocity - (drawn.noise - drawn.x0)).square().flatten(1).mean(dim=1),)

    def coefficients(self, terms, advantages, counts):
        values, share = divide_by_counts(advantages, counts)
        return (share * values / self.advantage_clip,)


@pytest.mark.parametrize("balance_fraction", [1.0, 0.5])
def test_a_toy_loss_trains_under_exact_balancing(tmp_path, monkeypatch, balance_fraction):
    monkeypatch.setitem(LOSSES, "toy", ToyLoss)
    settings = {"beta": 0.1, "balance_every": 1, "balance_fraction": balance_fraction, "learning_rate": 0.05}
    trainer = small_trainer(tmp_path / "run", policy_loss="toy", **settings)
    before = {name: weight.detach().clone() for name, weight in trainer.weights.trained.items()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.weights.trained.items())
    first = next(row for row in trainer.state.log_history if "balance/cos_min" in row)
    assert first["balance/cos_min"] >= -1e-6
    with pytest.raises(ValueError, match=r"`nft_beta=0.3` has no effect with `policy_loss='toy'`"):
        small_trainer(tmp_path / "other", policy_loss="toy", nft_beta=0.3)
