# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Ways to limit how far a policy drifts from its base that are not settings of the package."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from trl_marble import MarbleNFTTrainer
from trl_marble.losses import FrozenVelocities, NFTLoss, Penalties, StepCounts
from trl_marble.losses.forward_process import add_shared
from trl_marble.pipelines.weight_shadow import WeightShadow


# GARDO's share of samples that the KL acts on.
GATE_SHARE = 0.1


class _OtherPenalty(NFTLoss):
    """DiffusionNFT's loss with another penalty in the place of the KL."""

    needs = frozenset({"old", "reference"})
    penalties = Penalties()

    def penalty(self, velocity: Tensor, reference: Tensor, counts: StepCounts) -> Tensor:
        """Of each sample, `(B,)`."""
        raise NotImplementedError

    def shared(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        frozen: FrozenVelocities,
        scored: Tensor,
        counts: StepCounts,
    ) -> Tensor | None:
        assert frozen.reference is not None
        without = super().shared(velocity, terms, frozen, scored, counts)
        return add_shared(without, self.penalty(velocity, frozen.reference, counts))


def limit_norms(trainer: MarbleNFTTrainer, strength: float) -> None:
    """A hinge on the velocity's norm above the base's, in place of the KL (NormGuard)."""
    loss = trainer.policy_loss
    trainer.policy_loss = trainer.update.loss = _NormLimited(**{**vars(loss), "beta": strength})


class _NormLimited(_OtherPenalty):
    def penalty(self, velocity: Tensor, reference: Tensor, counts: StepCounts) -> Tensor:
        size = velocity.float().square().flatten(1).mean(dim=1)
        base = reference.float().square().flatten(1).mean(dim=1)
        return self.beta / counts.total * torch.relu(size - base)


def gate_by_disagreement(trainer: MarbleNFTTrainer, strength: float) -> None:
    """
    The KL only for the samples on which the rewards disagree most in rank (GARDO's gate), as a mean over these.
    """
    sample = trainer.rollouts.sample
    ranks: dict[int, float] = {}

    def sample_and_rank(*args: Any, **kwargs: Any) -> Any:
        batch, record = sample(*args, **kwargs)
        ranks.clear()
        ranks.update(enumerate(rank_disagreement(record.all_rewards).tolist()))
        threshold = sorted(ranks.values())[int((1 - GATE_SHARE) * len(ranks))]
        loss.gated = {number for number, value in ranks.items() if value >= threshold}
        return batch, record

    loss = _Gated(**{**vars(trainer.policy_loss), "beta": strength})
    object.__setattr__(loss, "trainer", trainer)
    trainer.rollouts.sample = sample_and_rank  # type: ignore[method-assign]
    trainer.policy_loss = trainer.update.loss = loss


class _Gated(_OtherPenalty):
    trainer: MarbleNFTTrainer
    gated: set[int]

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def penalty(self, velocity: Tensor, reference: Tensor, counts: StepCounts) -> Tensor:
        trainer = self.trainer
        part = trainer.layout.samples_of(trainer.layout.locate(trainer._micro_step).micro_batch)
        inside = torch.tensor([int(i) in self.gated for i in trainer._batch.sample_ids[part]]).to(velocity)
        distance = (velocity.float() - reference.float()).square().flatten(1).mean(dim=1)
        share = len(self.gated) / len(trainer._batch.sample_ids)
        return self.beta / (counts.total * share) * inside * distance


def rank_disagreement(rewards: Tensor) -> Tensor:
    """
    How much the rewards disagree on each sample: the standard deviation, over the rewards that apply, of its rank
    among the samples that the reward applies to, in [0, 1].

    Args:
        rewards (`Tensor` of shape `[K, B]`):
            NaN where a reward does not apply.

    Returns:
        `Tensor` of shape `[B]`.
    """
    ranks = torch.full_like(rewards, torch.nan, dtype=torch.float64)
    for row, own in zip(ranks, rewards, strict=True):
        valid = ~own.isnan()
        row[valid] = own[valid].argsort().argsort().double() / max(int(valid.sum()) - 1, 1)
    mean = ranks.nanmean(dim=0)
    return (ranks - mean).square().nanmean(dim=0).sqrt().nan_to_num()


def move_reference(trainer: MarbleNFTTrainer, threshold: float) -> None:
    """The reference of the KL becomes the trained policy whenever the KL to it passes a threshold (GARDO)."""
    weights = trainer.weights
    reference = WeightShadow(weights.trained.items())
    for tensor in reference.state_dict().values():
        tensor.zero_()  # the base

    @torch.no_grad()
    def reference_velocity(x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        with weights.sampling(reference.swapped_in()):
            return weights.policy(x_t, t, conditioning)

    weights.base_velocity = reference_velocity  # type: ignore[method-assign]
    trainer.add_callback(_MoveReference(reference, threshold))


class _MoveReference(TrainerCallback):
    def __init__(self, reference: WeightShadow, threshold: float) -> None:
        self.reference, self.threshold = reference, threshold

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and logs.get("kl", 0.0) > self.threshold:
            self.reference.lerp_(0.0)
            logs["reference_moved"] = 1.0


DRIFT_CONTROLS: Mapping[str, Callable[[MarbleNFTTrainer, float], None]] = {
    "norm": limit_norms,
    "gate": gate_by_disagreement,
    "move": move_reference,
}
