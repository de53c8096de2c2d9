# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Other ways to balance, which are not settings of the package.

Each gives the `StepGradient` that replaces the trainer's own: `trainer.update.gradient = EXPERIMENTS[name](trainer)`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trl_marble import MarbleNFTTrainer
from trl_marble.balance import (
    GradientRows,
    Harmonization,
    ProgressWeights,
    aggregate_advantages,
    balance_diagnostics,
    gram_matrix,
    mgda_weights,
)
from trl_marble.losses import StepCounts
from trl_marble.rollout import BaseImageSettings, ProgressMeter
from trl_marble.update import BalanceSettings, StepGradient


# Lower limit for a signal's squared norm, as a share of the gradient's own: smaller estimates are noise.
LEAST_SIGNAL = 0.05


class _Experiment(StepGradient):
    """A trainer's `StepGradient`, to be changed."""

    balance: BalanceSettings

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        own = trainer.update.gradient
        if own.balance is None:
            raise ValueError('These experiments balance gradients: set `multi_objective_aggregation="marble"`.')
        if trainer.args.balance_fraction != 1:
            raise ValueError("These experiments solve from complete steps: set `balance_fraction=1`.")
        super().__init__(own.accelerator, own.parameters, own.linears, own.balance, own.seed, own.guard, own.metrics)
        self.trainer = trainer

    def _solves_at_every_step(self) -> None:
        if self.trainer.args.balance_every != 1:
            raise ValueError("This experiment solves at every step: set `balance_every=1`.")


class PublishedAmortization(_Experiment):
    """
    Between two solves the *advantages* are mixed by the smoothed alpha, as in the code published with MARBLE, and not
    the per-reward losses by the weights that a solve uses.

    The mixed advantage is clipped again, for alpha need not sum to 1, and counts for every sample that any reward
    scores.
    """

    def begin(self, step: int, counts: Tensor, active: Tensor, num_micro_steps: int, weighted_sum: Tensor) -> None:
        super().begin(step, counts, active, num_micro_steps, weighted_sum)
        if not self._solves:
            self._weights = torch.ones(1)  # of the one mixed advantage
            self._mixing = self._weights.to(self.accelerator.device)

    def backward(self, terms: Sequence[Tensor], coefficients: Sequence[Tensor], shared: Tensor | None) -> None:
        super().backward(terms, coefficients if self._solves else self._of_mixed_advantages(), shared)

    def _of_mixed_advantages(self) -> Sequence[Tensor]:
        trainer = self.trainer
        position = trainer.layout.locate(trainer._micro_step)
        advantages = trainer._batch.advantages[:, trainer.layout.samples_of(position.micro_batch)]
        alpha, clip = self.balance.schedule.alpha.nan_to_num().to(advantages), trainer.args.advantage_clip
        mixed = (alpha @ advantages.nan_to_num()).clamp(-clip, clip)
        mixed = mixed.masked_fill(advantages.isnan().all(dim=0), torch.nan)[None]
        scored = trainer._batch.scored[position.update] * trainer.update.grid.per_sample
        return trainer.policy_loss.coefficients((), mixed, StepCounts(scored[None], scored, int(scored)))


class RawGram(_Experiment):
    """Balance with the Gram matrix of the gradients as they are, not of unit length: the weights are alpha."""

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        super().__init__(trainer)
        self._solves_at_every_step()

    def _solve(self, gram: Tensor, active: Tensor, weighting: Callable[[Tensor], Tensor]) -> Harmonization:
        squared_norms = gram.diagonal()
        active = active.to(gram.device) & (squared_norms > 0)
        alpha = torch.zeros_like(squared_norms)
        if active.any():
            alpha[active] = weighting(gram[active][:, active]).to(gram)
        return Harmonization(alpha, alpha, squared_norms.sqrt(), gram, active)


class _OtherGram(_Experiment):
    """
    Another input of the weighting, and the same gradients. Works with one process, and with new weights at every step
    for the advantages. It has no held-out cosines: what the weighting gets in place of the Gram matrix is not known
    for half of a step.
    """

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        super().__init__(trainer)
        self._solves_at_every_step()
        if trainer.args.balance_on != "advantage":
            raise ValueError('These experiments balance the rewards\' signal: set `balance_on="advantage"`.')
        if trainer.args.generation_batch_size != trainer.args.per_device_train_batch_size:
            raise ValueError("These experiments have one micro-batch a step: all images that are sampled for it.")
        self.balance = dataclasses.replace(self.balance, weighting=self.weigh)
        self.has_halves = False

    def weigh(self, gram: Tensor) -> Tensor:
        """The weights of the normalized gradients of the rewards that apply; `gram` is their Gram matrix."""
        raise NotImplementedError

    def _taking_part(self, gradients: Tensor) -> Tensor:
        return self._active.to(gradients.device) & (gradients != 0).any(dim=1)


class CrossGram(_OtherGram):
    """
    Balance with the cosines of the rewards' *signals*: inner products between the gradients of two halves of the step.

    A reward's gradient is its expected value plus noise from the sampled images, so squared norms are too large. Inner
    products between different halves of each prompt's images share no noise and are unbiased. (Nearly: the advantages
    of a prompt's images are centred together.)
    """

    def _new_rows(self, number: int) -> GradientRows:
        return super()._new_rows(2 * len(self.balance.names) + 1)

    def backward(self, terms: Sequence[Tensor], coefficients: Sequence[Tensor], shared: Tensor | None) -> None:
        first = self.trainer._batch.sample_ids % 2 == 0  # images of a prompt are consecutive
        halves = [
            torch.cat([own * first.to(own.device), own * ~first.to(own.device)]) for own in coefficients
        ]  # [2K, B]
        super().backward(terms, halves, shared)

    def _finish_measured(self, measured: GradientRows) -> None:
        names = self.balance.names
        first, second, shared = measured.gradients.split([len(names), len(names), 1])
        cross = 4 * first @ second.T  # the gradient of a half is half of the step's
        cross = ((cross + cross.T) / 2).double()
        gradients = first + second
        squared_norms = gradients.square().sum(dim=1).double()
        for name, signal, total in zip(names, cross.diagonal(), squared_norms, strict=True):
            self.metrics.record(f"experiment/signal/{name}", (signal / total).item())
        kept = self._taking_part(gradients)
        norms = cross.diagonal().maximum(LEAST_SIGNAL * squared_norms)[kept].sqrt()
        cosines = cross[kept][:, kept] / norms.outer(norms)
        self._cosines = cosines.fill_diagonal_(1)  # also where the signal is too small to be distinguished from noise
        measured.gradients = torch.cat([gradients, shared])
        super()._finish_measured(measured)

    def weigh(self, gram: Tensor) -> Tensor:
        return mgda_weights(nearest_positive(self._cosines)).to(gram)


class OptimizersMetric(_OtherGram):
    """
    Balance AdamW's step: inner products `g_k . P g_l`, with `P = 1 / (sqrt(v) + eps)`.

    The shortest direction `d` of the convex hull goes against no gradient, `d . g_k >= 0`; but the step that AdamW
    takes is `P m`, and `P d . g_k` may be negative. In this metric it is not (without momentum). `v` is its value
    after the step with the direction that is the shortest without `P`.
    """

    def _finish_measured(self, measured: GradientRows) -> None:
        gradients = measured.gradients[:-1]
        kept = gradients[self._taking_part(gradients)].double()
        norms = kept.norm(dim=1)
        units = kept / norms[:, None]
        plain = mgda_weights(gram_matrix(units))
        preconditioner = self._preconditioner(norms.mean() * plain @ units + measured.gradients[-1])
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
        super()._finish_measured(measured)

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


class ProgressTimesMarble(_Experiment):
    """MARBLE's alpha times the weights by progress: a direction between all gradients that leans to what lags."""

    def __init__(self, trainer: MarbleNFTTrainer) -> None:
        super().__init__(trainer)
        self._solves_at_every_step()
        args = trainer.args
        self.progress = ProgressWeights(self.balance.names)
        trainer.rollouts.progress_meter = ProgressMeter(
            self.progress,
            trainer.sampler,
            trainer.scorer,
            trainer.train_dataset,
            BaseImageSettings(args.seed, args.progress_base_images, args.rollout_batch_size, trainer.edits),
            trainer.accelerator,
            trainer.metrics,
        )
        trainer.run_state.components["progress"] = self.progress

    def _solve(self, gram: Tensor, active: Tensor, weighting: Callable[[Tensor], Tensor]) -> Harmonization:
        solution = super()._solve(gram, active, weighting)
        factors = self.progress.weights.to(solution.alpha)
        total = (solution.alpha * factors).sum()
        if total == 0:  # all that MARBLE weighs has reached its target
            return solution
        return solution._replace(alpha=solution.alpha * factors / total, weights=solution.weights * factors / total)


def sum_rewards_by_progress(trainer: MarbleNFTTrainer) -> StepGradient:
    """Weights by progress in one sum of the rewards, which is then normalized as a weighted sum is."""
    meter, clip = trainer.rollouts.progress_meter, trainer.args.advantage_clip
    if meter is None:
        raise ValueError('This experiment weighs by progress: set `multi_objective_aggregation="progress"`.')

    def compute_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
        scaled = meter.weights.in_units_of_scales(rewards)
        centred = scaled - scaled.nanmean(dim=1, keepdim=True)  # some rewards apply to a part of the prompts
        return aggregate_advantages(centred, groups, meter.weights.weights, "sum_then_normalize", "batch", clip)

    trainer.rollouts.compute_advantages = compute_advantages
    return trainer.update.gradient


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
    "published_amortization": PublishedAmortization,
    "raw_gram": RawGram,
    "cross_gram": CrossGram,
    "optimizers_metric": OptimizersMetric,
    "progress_times_marble": ProgressTimesMarble,
    "progress_of_sums": sum_rewards_by_progress,
}
