# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The gradient of one optimizer step: what is balanced, what is mixed with known weights, what all rewards share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..balance import (
    BalanceSchedule,
    GradientRows,
    Harmonization,
    NFTLosses,
    Objective,
    SampleCoefficients,
    SeparateBackward,
    WeightedBackward,
    advantage_coefficients,
    anchor_coefficients,
    assign_gradients,
    balance_diagnostics,
    flatten_gradients,
    gram_matrix,
    harmonize,
    mix_coefficients,
    nft_coefficients,
    weighted_loss,
)
from .generation import GenerationBatch
from .marble_config import MarbleConfig
from .metrics import MetricBuffer
from .nonfinite import NonFiniteGuard, finite_mean, finite_sum
from .seeding import Draw, derive_seed


class LossShares(NamedTuple):
    """
    How much each sample of a micro-batch counts at each of its timesteps.

    Args:
        whole ([`~trl_marble.balance.SampleCoefficients`] of shape `(K, B)`):
            In the whole loss of each reward.
        balanced ([`~trl_marble.balance.SampleCoefficients`] of shape `(K, B)`):
            In what is balanced.
        mixed ([`~trl_marble.balance.SampleCoefficients`] of shape `(B,)`, *optional*):
            In the one loss that `balanced` becomes with the weights known beforehand, where they are known.
        anchor ([`~trl_marble.balance.SampleCoefficients`] of shape `(B,)`, *optional*):
            In the pull toward the old policy that all rewards share, where that is not part of `balanced`.
        penalty (`float`):
            In the penalty on the distance to the base model, `beta` left out.
        scored_rewards (`Tensor` of shape `()`):
            Number of rewards that apply to any sample of the step.
    """

    whole: SampleCoefficients
    balanced: SampleCoefficients
    mixed: SampleCoefficients | None
    anchor: SampleCoefficients | None
    penalty: float
    scored_rewards: Tensor

    def select(self, samples: Tensor) -> "LossShares":
        """
        The shares of some samples, as they are.

        Args:
            samples (`Tensor` of shape `[b]`, int64):
                Which of the micro-batch.
        """

        def chosen(shares: SampleCoefficients) -> SampleCoefficients:
            return SampleCoefficients(*(part[..., samples.to(part.device)] for part in shares))

        return self._replace(
            whole=chosen(self.whole),
            balanced=chosen(self.balanced),
            mixed=None if self.mixed is None else chosen(self.mixed),
            anchor=None if self.anchor is None else chosen(self.anchor),
        )


class StepGradient:
    """
    Accumulates the gradient of an optimizer step and leaves the update's direction in `.grad`.

    A step is one of three. It *solves*: every micro-step (one timestep of one micro-batch) is measured, that is,
    leaves a gradient for each reward, and the weights come from these gradients. It *streams*: the weights are known
    from earlier steps, and only some micro-steps are measured, for the weights of later ones. Or it *mixes*: the
    weights are known and nothing is measured.

    Args:
        args ([`MarbleConfig`]):
            The settings.
        accelerator ([`~accelerate.Accelerator`]):
            Adds up gradients over processes, once a step.
        parameters (`Sequence[nn.Parameter]`):
            What is trained.
        linears (`Sequence[nn.Linear]` or `None`):
            The linear layers whose weights `parameters` are, in the same order: then per-reward gradients take one
            backward pass an objective. With `None` they take one a reward.
        schedule ([`~trl_marble.balance.BalanceSchedule`]):
            Says which steps solve, and which weights are known.
        weighting (`Callable[[Tensor], Tensor]`):
            From a Gram matrix to coefficients.
        names (`list[str]`):
            Of the rewards, for the metrics.
        metrics ([`MetricBuffer`]):
            Where to record them.
        guard ([`NonFiniteGuard`]):
            Says what gradients that are not finite mean.
    """

    def __init__(
        self,
        args: MarbleConfig,
        accelerator: Accelerator,
        parameters: Sequence[nn.Parameter],
        linears: Sequence[nn.Linear] | None,
        schedule: BalanceSchedule,
        weighting: Callable[[Tensor], Tensor],
        names: list[str],
        metrics: MetricBuffer,
        guard: NonFiniteGuard,
    ) -> None:
        self.args, self.accelerator, self.schedule, self.weighting = args, accelerator, schedule, weighting
        self.parameters, self.linears = parameters, linears
        self.names, self.metrics, self.guard = names, metrics, guard
        self._rows: GradientRows | None = None  # while a step is measured
        self._recorder: GradientRows | None = None  # the same, while a micro-step of it is
        self._solution: Harmonization | None = None  # of this step, until the step is whole

    # ---- What kind of step this is ----

    def begin(self, step: int, batch: GenerationBatch, update: int, num_times: int, on_policy: bool) -> None:
        """
        Start an optimizer step.

        Args:
            step (`int`):
                Optimizer steps taken so far.
            batch ([`GenerationBatch`]):
                The samples.
            update (`int`):
                Which optimizer step of the generation batch this is.
            num_times (`int`):
                Timesteps that each sample is trained on.
            on_policy (`bool`):
                Whether the old policy is the trained one: the pull toward it then has no gradient.
        """
        self._on_advantage = self.args.balances_gradients and self.args.balance_on == "advantage"
        self._anchors = self._on_advantage and not on_policy
        self._batch, self._update, self._num_times = batch, update, num_times
        self._active = batch.active[update]
        self._solution = None
        device = self.args.device
        due = self.args.balances_gradients and self.schedule.is_due(step, self._active)
        self._solves = due and (self.args.balance_fraction == 1 or not self.schedule.knows(self._active))
        self._measured = self._draw_measured(step) if due else frozenset()
        self._rows = None
        if due:
            rows = len(self.names) + 1  # the last one is for what all rewards share
            if self.linears is None:
                self._rows = SeparateBackward(rows, self.parameters)
            else:
                self._rows = WeightedBackward(rows, self.linears)
        if self._solves:
            self._weights = None
        elif self.args.balances_gradients:
            self._weights = self.schedule.weights(self._active).to(device, torch.float32)
        else:
            self._weights = torch.ones(1, device=device)

    def _draw_measured(self, step: int) -> frozenset[int]:
        """
        The micro-steps that are measured, by their place in the step.

        A streaming step measures a random few, the same ones on all processes: these go through a step in time.
        """
        total = self.args.gradient_accumulation_steps * self._num_times
        if self._solves:
            return frozenset(range(total))
        generator = torch.Generator().manual_seed(derive_seed(self.args.seed, Draw.MEASURED, step))
        drawn = torch.randperm(total, generator=generator)[: max(1, round(self.args.balance_fraction * total))]
        return frozenset(drawn.tolist())

    # ---- Micro-batches ----

    def shares(self, advantages: Tensor) -> LossShares:
        """
        What each sample of a micro-batch counts. It is the same for all timesteps.

        Args:
            advantages (`Tensor` of shape `(K, B)`):
                NaN where a reward does not apply.
        """
        args, batch = self.args, self._batch
        counts = batch.counts[self._update] * self._num_times
        scored_count = batch.scored[self._update] * self._num_times
        settings = (args.advantage_clip, args.nft_beta)
        scored = ~advantages.isnan().all(dim=0)
        whole = nft_coefficients(advantages, counts, *settings)
        balanced = advantage_coefficients(advantages, counts, *settings) if self._on_advantage else whole
        anchor = anchor_coefficients(scored, scored_count, *settings) if self._anchors else None
        mixed = None
        if self._weights is not None:
            if args.amortization == "reference" and args.balances_gradients:
                # One advantage of the smoothed alpha, which need not sum to 1: hence a second clip.
                alpha = self.schedule.alpha.nan_to_num().to(advantages)
                blend = (alpha @ advantages.nan_to_num()).clamp(-args.advantage_clip, args.advantage_clip)
                make = advantage_coefficients if self._on_advantage else nft_coefficients
                one = make(blend.masked_fill(~scored, torch.nan)[None], scored_count[None], *settings)
                mixed = SampleCoefficients(one.positive[0], one.negative[0])
            else:
                mixed = mix_coefficients(balanced, self._weights)
        total = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * self._num_times
        return LossShares(whole, balanced, mixed, anchor, 1 / total, (counts > 0).sum().clamp(min=1))

    @contextmanager
    def recording(self, place: int, batch_size: int) -> Iterator[None]:
        """
        The trained policy's forward pass and [`~StepGradient.backward`] belong inside this context.

        Args:
            place (`int`):
                Which micro-step of this process's step it is.
            batch_size (`int`):
                Its samples.
        """
        self._recorder = self._rows if place in self._measured else None
        try:
            with nullcontext() if self._recorder is None else self._recorder.recording(batch_size):
                yield
        finally:
            self._recorder = None

    def backward(self, losses: NFTLosses, divergence: Tensor | None, shares: LossShares) -> Tensor:
        """
        Run the backward passes of one micro-step.

        Args:
            losses ([`~trl_marble.balance.NFTLosses`] of shape `(B,)`):
                The two losses of every sample.
            divergence (`Tensor` of shape `(B,)` or `None`):
                Squared distance of every sample's velocity to the base model's, where it is penalized.
            shares ([`LossShares`]):
                See [`~StepGradient.shares`].

        Returns:
            `Tensor` of shape `()`: this micro-step's share of the step's loss, detached.
        """
        shared: list[Tensor] = []  # loss of every sample that enters the direction with weight 1
        if shares.anchor is not None:
            shared.append(shares.anchor.positive * losses.positive + shares.anchor.negative * losses.negative)
        if divergence is not None:
            shared.append(self.args.beta * shares.penalty * divergence)

        if self._recorder is not None:
            if self._on_advantage:  # its two coefficients are opposite, so one objective holds both losses
                objectives = [Objective(losses.positive - losses.negative, _with_shared(shares.balanced.positive, 0))]
            else:
                objectives = [
                    Objective(loss, _with_shared(coefficients, 0))
                    for loss, coefficients in zip(losses, shares.balanced, strict=True)
                ]
            if shared:
                nothing = torch.zeros_like(shares.balanced.positive)
                objectives.append(Objective(torch.stack(shared).sum(dim=0), _with_shared(nothing, 1)))
            self._recorder.backward(objectives)
        else:
            assert shares.mixed is not None  # only a step that solves has no weights, and it measures everything
            total = weighted_loss(losses, shares.mixed)
            for part in shared:
                total = total + part.sum()
            total.backward()

        with torch.no_grad():
            whole = shares.whole
            loss = finite_sum(whole.positive * losses.positive + whole.negative * losses.negative)
            loss = loss / shares.scored_rewards
            if divergence is not None:
                loss = loss + self.args.beta * shares.penalty * finite_sum(divergence)
                self.metrics.record("kl", finite_mean(divergence))
            return loss

    # ---- The direction ----

    def finish(self) -> None:
        """
        Add up the gradients of all processes, and leave the update's direction in `.grad`: none if it is not finite.

        Raises:
            `FloatingPointError`: See `MarbleConfig.on_nonfinite`.
        """
        self._set_direction()
        if not self.guard.settle_direction(self.parameters):
            self._solution = None

    def _set_direction(self) -> None:
        if self._rows is None:
            if self.accelerator.num_processes > 1:
                total = flatten_gradients([p.grad for p in self.parameters], self.parameters)
                assign_gradients(self.accelerator.reduce(total, reduction="sum"), self.parameters)
            if self.args.balances_gradients:
                self._log_alpha(self.schedule.alpha)
            return
        rows, self._rows = self._rows.gradients, None
        if not self._solves:  # micro-steps that were not measured
            rows[-1] += flatten_gradients([p.grad for p in self.parameters], self.parameters)
        rows = self.accelerator.reduce(rows, reduction="sum")
        gradients, shared = rows[:-1], rows[-1]
        gram = gram_matrix(gradients)
        norms = gram.diagonal().sqrt()
        gram = self.guard.settle_rewards(gradients, gram)
        solution = harmonize(gram, self.weighting, self.args.normalize_gradients, self._active)
        self._solution = solution
        weights = solution.weights if self._weights is None else self._weights
        assign_gradients(shared + weights.to(gradients) @ gradients, self.parameters)
        self._log_alpha(solution.alpha if self._solves else self.schedule.alpha)
        for name, norm in zip(self.names, norms.where(norms.isfinite(), torch.nan).tolist(), strict=True):
            self.metrics.record(f"balance/grad_norm/{name}", norm)
        for prefix, w in (("balance", weights), ("balance/weighted_sum", self._batch.weighted_sum)):
            for key, value in balance_diagnostics(solution.gram, w, solution.active).items():
                self.metrics.record(f"{prefix}/{key}", value)

    def _log_alpha(self, alpha: Tensor) -> None:
        # NaN stands for a reward that has not taken part yet: it weighs nothing.
        for name, value in zip(self.names, alpha.nan_to_num().tolist(), strict=True):
            self.metrics.record(f"balance/alpha/{name}", value)

    def commit(self) -> None:
        """Let the schedule take in this step's solution: only now, so that a step that fails leaves no trace."""
        if self._solution is not None:
            self.schedule.update(self._solution)
            self._solution = None


def _with_shared(coefficients: Tensor, shared: float) -> Tensor:
    """Coefficients `(K, B)` of the rewards, and `shared` as those of the last row."""
    return torch.cat([coefficients, torch.full_like(coefficients[:1], shared)])
