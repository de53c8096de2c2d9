# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Balancing with two other Gram matrices, which are not settings of the package.

Both change only the input of the weighting, not the rewards' gradients. They work with one process, and with new
weights at every step for the advantages (`balance_every=1`, `balance_on="advantage"`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trl_marble import MarbleNFTTrainer
from trl_marble.balance import (
    SampleCoefficients,
    WeightedBackward,
    balance_diagnostics,
    gram_matrix,
    mgda_weights,
)
from trl_marble.rollout.batch import GenerationBatch
from trl_marble.update.step_gradient import LossShares, StepGradient


# Lower limit for a signal's squared norm, as a share of the gradient's own: smaller estimates are noise.
LEAST_SIGNAL = 0.05


class _ExperimentalStep(StepGradient):
    """A trainer's `StepGradient` with another weighting, which uses more than the Gram matrix."""

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        own = trainer.step_gradient
        if not trainer.args.balances_gradients or trainer.args.balance_on != "advantage":
            raise ValueError('These experiments balance the rewards\' signal: set `balance_on="advantage"`.')
        if trainer.args.balance_every != 1 or trainer.args.balance_fraction != 1:
            raise ValueError("These experiments solve at every step: set `balance_every=1` and `balance_fraction=1`.")
        if trainer.args.generation_batch_size != trainer.args.per_device_train_batch_size:
            raise ValueError("These experiments have one micro-batch a step: all images that are sampled for it.")
        assert own.linears is not None
        super().__init__(
            own.args,
            own.accelerator,
            own.parameters,
            own.linears,
            own.schedule,
            self.weigh,
            own.names,
            own.metrics,
            own.guard,
        )
        self.trainer = trainer

    def weigh(self, gram: Tensor) -> Tensor:
        """The weights of the normalized gradients of the rewards that apply; `gram` is their Gram matrix."""
        raise NotImplementedError

    def _taking_part(self, gradients: Tensor) -> Tensor:
        return self._active.to(gradients.device) & (gradients != 0).any(dim=1)


class CrossGram(_ExperimentalStep):
    """
    Balance with the cosines of the rewards' *signals*: inner products between the gradients of two halves of the step.

    A reward's gradient is its expected value plus noise from the sampled images, so squared norms are too large. Inner
    products between different halves of each prompt's images share no noise and are unbiased. (Nearly: the advantages
    of a prompt's images are centred together.)
    """

    def begin(self, step: int, batch: GenerationBatch, update: int, num_times: int, on_policy: bool) -> None:
        super().begin(step, batch, update, num_times, on_policy)
        assert self.linears is not None
        self._rows = WeightedBackward(2 * len(self.names) + 1, self.linears)

    def shares(self, advantages: Tensor) -> LossShares:
        shares = super().shares(advantages)
        first = self._batch.sample_ids.to(advantages.device) % 2 == 0  # images of a prompt are consecutive
        halves = [torch.cat([one * first, one * ~first]) for one in shares.balanced]  # [2K, B]
        return shares._replace(balanced=SampleCoefficients(*halves))

    def _set_direction(self) -> None:
        assert self._rows is not None
        first, second, shared = self._rows.gradients.split([len(self.names), len(self.names), 1])
        cross = 4 * first @ second.T  # the gradient of a half is half of the step's
        cross = ((cross + cross.T) / 2).double()
        gradients = first + second
        squared_norms = gradients.square().sum(dim=1).double()
        for name, signal, total in zip(self.names, cross.diagonal(), squared_norms, strict=True):
            self.metrics.record(f"experiment/signal/{name}", (signal / total).item())
        kept = self._taking_part(gradients)
        norms = cross.diagonal().maximum(LEAST_SIGNAL * squared_norms)[kept].sqrt()
        cosines = cross[kept][:, kept] / norms.outer(norms)
        self._cosines = cosines.fill_diagonal_(1)  # also where the signal is too small to be distinguished from noise
        self._rows.gradients = torch.cat([gradients, shared])
        super()._set_direction()

    def weigh(self, gram: Tensor) -> Tensor:
        return mgda_weights(nearest_positive(self._cosines)).to(gram)


class OptimizersMetric(_ExperimentalStep):
    """
    Balance AdamW's step: inner products `g_k . P g_l`, with `P = 1 / (sqrt(v) + eps)`.

    The shortest direction `d` of the convex hull goes against no gradient, `d . g_k >= 0`; but the step that AdamW
    takes is `P m`, and `P d . g_k` may be negative. In this metric it is not (without momentum). `v` is its value
    after the step with the direction that is the shortest without `P`.
    """

    def _set_direction(self) -> None:
        assert self._rows is not None
        gradients = self._rows.gradients[:-1]
        kept = gradients[self._taking_part(gradients)].double()
        norms = kept.norm(dim=1)
        units = kept / norms[:, None]
        plain = mgda_weights(gram_matrix(units))
        preconditioner = self._preconditioner(norms.mean() * plain @ units + self._rows.gradients[-1])
        metric_gram = gram_matrix(units * preconditioner.sqrt())
        lengths = metric_gram.diagonal().sqrt()
        alpha = mgda_weights(metric_gram / lengths.outer(lengths))
        # For gradients of length 1 without `P`, scaled so that the direction is as long as MGDA's.
        weights = alpha / lengths
        self._alpha = weights * (plain @ units).norm() / (weights @ units).norm()
        everything = torch.ones(len(kept), dtype=torch.bool)
        for name, chosen in (("plain", plain), ("taken", self._alpha)):
            for key, value in balance_diagnostics(metric_gram, chosen, everything).items():
                self.metrics.record(f"experiment/step_{name}/{key}", value)
        super()._set_direction()

    def _preconditioner(self, direction: Tensor) -> Tensor:
        """`P` of shape `[P]` with the second moment as it is after a step with this gradient."""
        optimizer = self.trainer.optimizer
        assert optimizer is not None
        group = optimizer.param_groups[0]
        decay = group["betas"][1]
        states = [optimizer.state.get(parameter, {}) for parameter in self.parameters]
        steps = int(states[0]["step"]) if states[0] else 0
        moments = torch.cat(
            [
                (state["exp_avg_sq"] if state else torch.zeros_like(parameter)).flatten().double()
                for state, parameter in zip(states, self.parameters, strict=True)
            ]
        )
        moments = decay * moments + (1 - decay) * direction.double().square()
        return 1 / ((moments / (1 - decay ** (steps + 1))).sqrt() + group["eps"])

    def weigh(self, gram: Tensor) -> Tensor:
        return self._alpha.to(gram)


def nearest_positive(matrix: Tensor) -> Tensor:
    """
    The nearest positive semidefinite matrix to a symmetric one: negative eigenvalues become 0. Estimated inner
    products may have such eigenvalues, which [`mgda_weights`] refuses.

    Args:
        matrix (`Tensor` of shape `[K, K]`):
            Symmetric.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).diag() @ vectors.T


EXPERIMENTS: Mapping[str, Callable[[MarbleNFTTrainer], StepGradient]] = {
    "cross_gram": CrossGram,
    "optimizers_metric": OptimizersMetric,
}
