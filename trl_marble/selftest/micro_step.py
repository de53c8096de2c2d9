# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One micro-step of a run, whose per-reward gradients can be computed in several ways."""

import torch
from torch import Tensor

from ..balance import Objective, WeightedBackward
from ..balance.flat_gradients import flatten_gradients
from ..losses import FrozenVelocities, Sampled, StepCounts
from ..pipelines import Conditioning, measured_linears
from ..trainer import MarbleNFTTrainer
from .verdicts import Skipped


def scatter(trainer: MarbleNFTTrainer, seed: int = 0) -> None:
    """Give the adapter random weights, so that the policy is neither the base model nor the old policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.weights.parameters:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class MicroStep:
    """
    Images of a trainer's old policy, noised, with their advantages. Then the adapter gets random weights.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        self.trainer, args = trainer, trainer.args
        size = args.per_device_train_batch_size
        batch = trainer._sample([number // args.num_generations for number in range(size)], 0)
        self.latents, self.advantages = batch.latents, batch.advantages
        self.conditioning = batch.conditioning.select(batch.prompt_index)
        generators = [torch.Generator().manual_seed(number) for number in range(size)]
        sampled = Sampled(batch.latents.float(), batch.transitions)
        draws = trainer.policy_loss.draw(sampled, trainer.update.grid.times, 1, generators)
        self.drawn = next(iter(draws))
        valid = ~self.advantages.isnan()
        self.counts = StepCounts(valid.sum(dim=1), valid.any(dim=0).sum(), size)
        scatter(trainer)

    def convert(self, dtype: torch.dtype) -> None:
        """Give the embeddings another dtype, that of the base weights."""
        rows = {
            name: row.to(dtype) if isinstance(row, Tensor) and row.is_floating_point() else row
            for name, row in self.conditioning.kwargs.items()
        }
        self.conditioning = Conditioning(rows)

    def weighted(self) -> Tensor:
        """
        The gradients of all rewards, `[K, P]`, as a training step takes them: one weighted backward pass for each term
        of the loss.

        Raises:
            [`Skipped`]: If a training step of this pipeline takes them by autograd.
        """
        weights = self.trainer.weights
        linears = measured_linears(weights.flow, weights.trained, False, len(self.drawn.t))
        if linears is None:
            raise Skipped("this pipeline takes one backward pass per reward; there is nothing to compare")
        rows = WeightedBackward(len(self.advantages), linears)
        with rows.recording(len(self.drawn.t)):
            rows.backward([Objective(*pair) for pair in self._terms()])
        return rows.gradients.float()

    def autograd(self) -> Tensor:
        """The same by autograd: one call for each reward."""
        parameters, pairs = self.trainer.weights.parameters, self._terms()
        rows = []
        for k in range(len(self.advantages)):
            loss = torch.stack([(coefficients[k] * term).sum() for term, coefficients in pairs]).sum()
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            rows.append(flatten_gradients(found, parameters).float())
        return torch.stack(rows)

    def _terms(self) -> list[tuple[Tensor, Tensor]]:
        """What the rewards act through, and how much of it is in each reward's loss."""
        weights, loss = self.trainer.weights, self.trainer.policy_loss
        where = self.drawn.x_t, self.drawn.t, self.conditioning
        frozen = FrozenVelocities(weights.old_velocity(*where))
        terms = loss.terms(weights.velocity(*where), self.drawn, frozen)
        coefficients = loss.coefficients(terms, self.advantages, self.counts)
        return list(zip(terms, coefficients, strict=False))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row; infinite if any number is not finite or an expected row is 0."""
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    sizes = expected.flatten(1).norm(dim=1)
    errors = (found - expected).flatten(1).norm(dim=1) / sizes
    return errors.max().item() if bool((sizes > 0).all()) else float("inf")
