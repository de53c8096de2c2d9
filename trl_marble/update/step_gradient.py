# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The gradient of one optimizer step: what is balanced, what is mixed with known weights, what all rewards share."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from ..balance import (
    BalanceSchedule,
    GradientRows,
    Harmonization,
    Objective,
    SeparateBackward,
    WeightedBackward,
    assign_gradients,
    balance_diagnostics,
    direction_cosines,
    flatten_gradients,
    gram_matrix,
    harmonize,
    heldout_cosines,
    signal_shares,
)
from ..balance.weightings import Weighting
from ..metrics import MetricBuffer
from ..seeding import Draw, derive_seed
from .nonfinite import NonFiniteGuard, drop_gradients
from .random_part import draw_fraction


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class BalanceSettings:
    """
    How per-reward gradients become a direction.

    Args:
        schedule ([`~trl_marble.balance.BalanceSchedule`]):
            Says which steps solve, and which weights are known.
        weighting (`Callable[[Tensor], Tensor]`):
            From a Gram matrix to coefficients. Copies of it are asked for the halves of a step (see
            [`StepGradient`]), so that an object with state of its own goes on as if they were not. They are made
            before it sees the step, all of whose samples its state would know then. Functions are not copied.
        fraction (`float`):
            Fraction of a step's micro-steps that a solution is taken from, in (0, 1].
        names (`list[str]`):
            Of the rewards, and of teachers, whose gradients are balanced as those of rewards are.
        priorities (`Tensor` of shape `[K]`, *optional*):
            Of the rewards, see [`~trl_marble.balance.harmonize`]. Defaults to equal ones.
    """

    schedule: BalanceSchedule
    weighting: Weighting
    fraction: float
    names: list[str]
    priorities: Tensor | None = None


class StepGradient:
    """
    Accumulates the gradient of an optimizer step and leaves the update's direction in `.grad`.

    A step is one of three. It *solves*: every micro-step (one timestep of one micro-batch) is measured, that is,
    leaves a gradient for each reward, and the weights come from these gradients. It *streams*: the weights are known
    from earlier steps, and only some micro-steps are measured, for the weights of later ones. Or it *mixes*: the
    weights are known and nothing is measured.

    Where a micro-step is measured with weighted backward passes, each reward has one row for each half of the step's
    prompts, in the same passes. The direction is made of their sums. The direction that one half alone would give is
    compared with the gradients of the other half: what holds there holds for the reward and not only for the sample
    (see [`~trl_marble.balance.heldout_cosines`]). Without `linears` each row would be a backward pass of its own, so
    halves are not measured; nor are they with a weighting that cannot be copied.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Adds up gradients over processes, once per step.
        parameters (`Sequence[nn.Parameter]`):
            What is trained.
        linears (`Sequence[nn.Linear]` or `None`):
            The linear layers whose weights `parameters` are, in the same order: then per-reward gradients take one
            backward pass per term of the loss. With `None` they take one per reward.
        balance ([`BalanceSettings`], *optional*):
            How rewards are balanced; `None` where there is one advantage, and nothing to balance.
        seed (`int`):
            Seed of the run, for which micro-steps are measured.
        guard ([`NonFiniteGuard`]):
            Raises or skips where gradients are not finite.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parameters: Sequence[nn.Parameter],
        linears: Sequence[nn.Linear] | None,
        balance: BalanceSettings | None,
        seed: int,
        guard: NonFiniteGuard,
        metrics: MetricBuffer,
    ) -> None:
        self.accelerator, self.parameters, self.linears = accelerator, parameters, linears
        self.balance, self.seed, self.guard, self.metrics = balance, seed, guard, metrics
        self.has_halves = linears is not None and (balance is None or self._can_copy(balance.weighting))
        self._rows: GradientRows | None = None  # while a step is measured
        self._recorder: GradientRows | None = None  # the same, while a micro-step of it is
        self._solution: Harmonization | None = None  # of this step, until the optimizer has taken it

    def _can_copy(self, weighting: Weighting) -> bool:
        try:
            copy.deepcopy(weighting)
        except Exception as error:  # of any kind: it is the user's object
            if self.accelerator.is_main_process:
                logger.warning(
                    f"Held-out cosines are not measured: they need copies of the weighting {weighting!r}, and copying "
                    f"it raised {type(error).__name__}: {error}. Give it a `__deepcopy__` to have them."
                )
            return False
        return True

    # ---- What kind of step this is ----

    def begin(self, step: int, counts: Tensor, active: Tensor, num_micro_steps: int, weighted_sum: Tensor) -> None:
        """
        Start an optimizer step.

        Args:
            step (`int`):
                Optimizer steps taken so far.
            counts (`Tensor` of shape `[2, K]`):
                Valid samples of each reward in both halves of this step.
            active (`Tensor` of shape `[2, K]`, bool):
                The rewards that tell samples apart in both halves of this step.
            num_micro_steps (`int`):
                Micro-steps of this step on each process.
            weighted_sum (`Tensor` of shape `[K]`):
                How the weighted sum that is not taken would mix the gradients, for comparison.
        """
        self._counts, self._active_in_halves, self._weighted_sum = counts, active, weighted_sum
        self._active = active = active.any(dim=0)
        self._solution, self._rows, self._measured = None, None, frozenset[int]()
        self._solves = False
        device = self.accelerator.device
        if self.balance is None:
            self._weights: Tensor | None = torch.ones(1)
            self._mixing: Tensor | None = self._weights.to(device)  # the same, where the losses are
            return
        schedule = self.balance.schedule
        due = schedule.is_due(step, active)
        self._solves = due and (self.balance.fraction == 1 or not schedule.knows(active))
        self._weights = None if self._solves else schedule.weights(active).float()
        self._mixing = None if self._weights is None else self._weights.to(device)
        if due:
            self._measured = self._draw_measured(step, num_micro_steps)
            number = len(self.balance.names) * (2 if self.has_halves else 1)
            self._rows = self._new_rows(number + 1)  # the last one is for what all rewards share

    def _new_rows(self, number: int) -> GradientRows:
        if self.linears is None:
            return SeparateBackward(number, self.parameters)
        return WeightedBackward(number, self.linears)

    def _draw_measured(self, step: int, total: int) -> frozenset[int]:
        """
        The micro-steps that are measured, by their place in the step.

        A streaming step measures a random few, the same ones on all processes: these go through a step in time.
        """
        assert self.balance is not None
        if self._solves:
            return frozenset(range(total))
        return draw_fraction(self.balance.fraction, total, derive_seed(self.seed, Draw.MEASURED, step))

    # ---- Micro-steps ----

    @contextmanager
    def recording(self, place: int, first_half: Tensor) -> Iterator[None]:
        """
        The trained policy's forward pass and [`~StepGradient.backward`] belong inside this context.

        Args:
            place (`int`):
                Which micro-step of this process's step it is.
            first_half (`Tensor` of shape `(B,)`, bool):
                Which of its samples are in the first half of the step.
        """
        self._recorder = self._rows if place in self._measured else None
        self._first_half = first_half
        try:
            with nullcontext() if self._recorder is None else self._recorder.recording(len(first_half)):
                yield
        finally:
            self._recorder = None

    def backward(self, terms: Sequence[Tensor], coefficients: Sequence[Tensor], shared: Tensor | None) -> None:
        """
        Run the backward passes of one micro-step.

        Args:
            terms (`Sequence[Tensor]` of shape `(B,)`):
                What the rewards act through, see [`~trl_marble.losses.PolicyLoss.terms`].
            coefficients (`Sequence[Tensor]` of shape `(K, B)`):
                One for each of these terms.
            shared (`Tensor` of shape `(B,)`, *optional*):
                What enters the direction with weight 1.
        """
        if shared is not None and not shared.requires_grad:
            shared = None
        if self._recorder is not None:
            if self.has_halves:
                coefficients = [_in_halves(own, self._first_half) for own in coefficients]
            objectives = [Objective(term, _with_shared(own, 0)) for term, own in zip(terms, coefficients, strict=True)]
            if shared is not None:
                nothing = shared.new_zeros(len(self._recorder.gradients) - 1, len(shared))
                objectives.append(Objective(shared, _with_shared(nothing, 1)))
            self._recorder.backward(objectives)
            return
        assert self._mixing is not None  # only a step that solves has none, and it measures every micro-step
        # With the weights known, sum_k w_k L_k is one loss with mixed coefficients: exact, and one backward pass.
        mixed = [self._mixing.to(own) @ own * term for term, own in zip(terms, coefficients, strict=True)]
        parts = [torch.stack(mixed).sum(dim=0).sum()] if mixed else []
        if shared is not None:
            parts.append(shared.sum())
        torch.stack(parts).sum().backward()

    # ---- The direction ----

    def finish(self) -> None:
        """
        Add up the gradients of all processes, and leave the update's direction in `.grad`: none if it is not finite.

        Raises:
            `FloatingPointError`: See [`NonFiniteGuard`].
        """
        if self._rows is None:
            self._finish_mixed()
        else:
            self._finish_measured(self._rows)
        self._rows = None

    def _finish_mixed(self) -> None:
        if self.accelerator.num_processes > 1:
            total = flatten_gradients([p.grad for p in self.parameters], self.parameters)
            assign_gradients(self.accelerator.reduce(total, reduction="sum"), self.parameters)
        self.guard.check_direction(self.parameters)
        if self.balance is not None:
            self._record_alpha(self.balance.schedule.alpha)

    def _finish_measured(self, measured: GradientRows) -> None:
        assert self.balance is not None
        rows = measured.gradients
        if not self._solves:  # micro-steps that were not measured
            rows[-1] += flatten_gradients([p.grad for p in self.parameters], self.parameters)
        rows = self.accelerator.reduce(rows, reduction="sum")
        gradients, shared = rows[:-1], rows[-1]
        halves = None
        if self.has_halves:
            halves = gram_matrix(gradients)
            # Before it sees the gradients of both: what it remembers of them would be known to each half.
            weightings = [copy.deepcopy(self.balance.weighting) for _ in range(2 if self._solves else 0)]
            gradients, second = gradients.chunk(2)
            gradients += second  # in place: rows are large
        gram = gram_matrix(gradients).cpu()  # small, and every look at it on a device would be waited for
        if not self.guard.check_rewards(self.balance.names, gram.diagonal()):
            drop_gradients(self.parameters)
            self._record_balance(None)
            return
        solution = self._solve(gram, self._active, self.balance.weighting)
        weights = solution.weights if self._weights is None else self._weights
        assign_gradients(shared + weights.to(gradients) @ gradients, self.parameters)
        if self.guard.check_direction(self.parameters):
            self._solution = solution
        self._record_balance(solution)
        if halves is not None:
            self._record_halves(halves.cpu(), weightings)

    def _solve(self, gram: Tensor, active: Tensor, weighting: Weighting) -> Harmonization:
        assert self.balance is not None
        return harmonize(gram, weighting, active, self.balance.priorities)

    def _record_balance(self, solution: Harmonization | None) -> None:
        """Record a measured step; NaN where it was not finite, as every step records the same metrics."""
        assert self.balance is not None
        names = self.balance.names
        alpha = self.balance.schedule.alpha
        self._record_alpha(alpha if solution is None or not self._solves else solution.alpha)
        norms = [torch.nan] * len(names) if solution is None else solution.norms.tolist()
        for name, norm in zip(names, norms, strict=True):
            self.metrics.record(f"balance/grad_norm/{name}", norm)
        if solution is None:
            return
        weights = solution.weights if self._weights is None else self._weights
        cosines = direction_cosines(solution.gram, weights).masked_fill(~solution.active.cpu(), torch.nan)
        for name, cosine in zip(names, cosines.tolist(), strict=True):
            self.metrics.record(f"balance/cos/{name}", cosine)
        for prefix, taken in (("balance", weights), ("balance/weighted_sum", self._weighted_sum)):
            for key, value in balance_diagnostics(solution.gram, taken, solution.active).items():
                self.metrics.record(f"{prefix}/{key}", value)

    def _record_halves(self, gram: Tensor, weightings: Sequence[Weighting]) -> None:
        """
        Record what the halves of a step say of each other.

        Args:
            gram (`Tensor` of shape `[2K, 2K]`):
                Inner products of the gradients of the first half, and then of the second half; on the CPU.
            weightings (`Sequence[Weighting]`):
                One for each half, in a step that solves.
        """
        assert self.balance is not None
        names, size = self.balance.names, len(self.balance.names)
        grams = [gram[:size, :size], gram[size:, size:]]
        active = self._active_in_halves.cpu() & (torch.stack([own.diagonal() for own in grams]) > 0)
        in_both = active.all(dim=0)
        if self._weights is None:
            # After the step's own direction was found, which these calls must not change.
            with torch.random.fork_rng(devices=[]):
                halves = zip(grams, active, weightings, strict=True)
                first, second = (self._weigh_half(*half) for half in halves)
        else:
            first = second = self._weights
        for prefix, weights in (
            ("balance", (first, second)),
            ("balance/weighted_sum", (self._weighted_sum, self._weighted_sum)),
        ):
            cosines = heldout_cosines(gram, *weights, in_both)
            for name, cosine in zip(names, cosines.tolist(), strict=True):
                self.metrics.record(f"{prefix}/heldout_cos/{name}", cosine)
            known = cosines[~cosines.isnan()]
            self.metrics.record(f"{prefix}/heldout_cos_min", known.min().item() if len(known) else torch.nan)
        shares = signal_shares(gram, (self._counts[0] / self._counts.sum(dim=0)).cpu(), in_both)
        for name, share in zip(names, shares.tolist(), strict=True):
            self.metrics.record(f"balance/signal/{name}", share)

    def _weigh_half(self, gram: Tensor, active: Tensor, weighting: Weighting) -> Tensor:
        """
        Weights of a half's own direction; NaN where the weighting has none for the rewards of the half, as one that is
        made for a given number of rewards.
        """
        try:
            return self._solve(gram, active, weighting).weights
        except Exception:  # of any kind, from the user's weighting, which has answered for the step itself
            return torch.full_like(gram.diagonal(), torch.nan)

    def _record_alpha(self, alpha: Tensor) -> None:
        assert self.balance is not None
        # NaN stands for a reward that has not taken part yet: it weighs nothing.
        for name, value in zip(self.balance.names, alpha.nan_to_num().tolist(), strict=True):
            self.metrics.record(f"balance/alpha/{name}", value)

    def commit(self) -> None:
        """Let the schedule take in this step's solution: only now, so that a step that fails leaves no trace."""
        if self._solution is not None and self.balance is not None:
            self.balance.schedule.update(self._solution)
            self._solution = None


def _with_shared(coefficients: Tensor, shared: float) -> Tensor:
    """Coefficients `(K, B)` of the rewards, and `shared` as those of the last row."""
    return torch.cat([coefficients, torch.full_like(coefficients[:1], shared)])


def _in_halves(coefficients: Tensor, first_half: Tensor) -> Tensor:
    """Coefficients `(K, B)` as `(2K, B)`: those of the first half's samples, and then of the second half's."""
    return torch.cat([coefficients * first_half, coefficients * ~first_half])
