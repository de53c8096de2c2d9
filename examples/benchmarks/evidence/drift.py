# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Ways to limit how far a policy drifts from its base, other than a fixed coefficient of the KL."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from trl_marble import MarbleNFTTrainer
from trl_marble.losses import FrozenVelocities, NFTLoss, StepCounts
from trl_marble.losses.forward_process import add_shared
from trl_marble.pipelines.weight_shadow import WeightShadow


# Strength of the KL with which an adaptive coefficient begins: one that begins low spends the drift on the noise of
# the first steps.
FIRST_BETA = 0.5
# GARDO's share of samples that the KL acts on.
GATE_SHARE = 0.1


def adapt_to_target(trainer: MarbleNFTTrainer, target: float, rising: float = 0.2, falling: float = 0.2) -> None:
    """
    Let `beta` follow the KL: `log beta += rate clip(log(KL / target), -1, 1)` at each step, KL as a running mean, with
    one rate where `beta` rises and one where it falls.
    """
    trainer.add_callback(_FollowTarget(trainer, target, rising, falling))


def adapt_slowly(trainer: MarbleNFTTrainer, target: float) -> None:
    """The same at half of the rate."""
    adapt_to_target(trainer, target, rising=0.1, falling=0.1)


def lower_slowly(trainer: MarbleNFTTrainer, target: float) -> None:
    """The same, with a `beta` that falls four times slower than it rises."""
    adapt_to_target(trainer, target, falling=0.05)


class _FollowTarget(TrainerCallback):
    def __init__(self, trainer: MarbleNFTTrainer, target: float, rising: float, falling: float) -> None:
        self.trainer, self.target, self.rising, self.falling = trainer, target, rising, falling

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._set(state.log_history)

    def on_log(self, args, state, control, **kwargs) -> None:
        self._set(state.log_history)

    def _set(self, history: Sequence[Mapping[str, Any]]) -> None:
        log_beta, mean = math.log(FIRST_BETA), None
        for row in history:  # from the log, so that a resumed run finds it again
            if "kl" in row:
                mean = row["kl"] if mean is None else 0.8 * mean + 0.2 * row["kl"]
                excess = min(max(math.log(max(mean, 1e-9) / self.target), -1), 1)
                log_beta += (self.rising if excess > 0 else self.falling) * excess
        loss = dataclasses.replace(self.trainer.policy_loss, beta=math.exp(log_beta))
        self.trainer.policy_loss = self.trainer.update.loss = loss


class _OtherPenalty(NFTLoss):
    """DiffusionNFT's loss with another penalty in the place of the KL."""

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
        without = super().shared(velocity, terms, frozen._replace(reference=None), scored, counts)
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
    "target": adapt_to_target,
    "hold": lower_slowly,
    "steer": adapt_slowly,
    "norm": limit_norms,
    "gate": gate_by_disagreement,
    "move": move_reference,
}
