# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One optimizer step: from a generation batch to a direction, micro-batch by micro-batch."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..losses import Drawn, FrozenVelocities, Lesson, Penalties, PolicyLoss, Sampled, StepCounts
from ..losses.forward_process import add_shared, mean_square_distance
from ..metrics import MetricBuffer, finite_mean, mean_rms
from ..pipelines import Conditioning, PolicyWeights
from ..pipelines.mixing import mixing
from ..progress import MakeBar
from ..rollout import BatchLayout, Position, RolloutBatch, ShareDraws
from ..seeding import Draw, derive_seed
from ..step_times import StepTimes
from .group_table import GroupTable
from .kl_control import KLControl
from .nonfinite import NonFiniteGuard
from .random_part import draw_fraction
from .step_gradient import StepGradient
from .teaching import Teaching


@dataclass(frozen=True)
class TimeGrid:
    """
    The times that samples are trained on.

    Args:
        times (`Tensor` of shape `[N]`):
            The rollout's own time grid.
        per_sample (`int`):
            How many of them each sample is trained on in one pass, at most N.
    """

    times: Tensor
    per_sample: int


class PolicyUpdate:
    """
    The current optimizer step.

    ```python
    update.begin(step, batch, position)        # at the step's first micro-batch
    update.join_groups()                       # and then, where processes may wait for each other
    loss = update.accumulate(batch, position)  # at each micro-batch
    update.finish()                            # after the last one: the direction is in `.grad`
    update.commit()                            # when the optimizer has taken it
    ```

    Args:
        loss ([`~trl_marble.losses.PolicyLoss`]):
            The loss.
        weights ([`~trl_marble.pipelines.PolicyWeights`]):
            The policy.
        gradient ([`StepGradient`]):
            Accumulates and balances gradients.
        guard ([`NonFiniteGuard`]):
            Notes losses that are not finite.
        layout ([`~trl_marble.rollout.BatchLayout`]):
            How a generation batch is cut into optimizer steps.
        grid ([`TimeGrid`]):
            The times to train on.
        regularizer_fraction (`float`):
            Fraction of each sample's timesteps at which the loss's penalties are taken, in (0, 1], see
            [`~trl_marble.losses.Penalties`].
        seed (`int`):
            Seed of the run.
        num_processes (`int`):
            Processes that share the work.
        num_generations (`int`):
            Samples of each prompt in a generation batch.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to record.
        make_bar (`Callable[[str, int], ProgressBar]`):
            Makes the progress bars.
        times ([`~trl_marble.step_times.StepTimes`]):
            What the passes and the balancing take is added to.
        kl_control ([`KLControl`], *optional*):
            Adapts the loss's `beta`. By default it stays as it is.
        teaching ([`Teaching`], *optional*):
            The teachers, to each of which one of the last rows of a batch's advantages belongs. By default there are
            none.
        shares ([`~trl_marble.rollout.ShareDraws`], *optional*):
            Draws the shares that the parts of the adapter have of each sample, see
            [`~trl_marble.pipelines.mixing.mixing`]. By default it has no parts.
    """

    def __init__(
        self,
        loss: PolicyLoss,
        weights: PolicyWeights,
        gradient: StepGradient,
        guard: NonFiniteGuard,
        layout: BatchLayout,
        grid: TimeGrid,
        regularizer_fraction: float,
        seed: int,
        num_processes: int,
        num_generations: int,
        metrics: MetricBuffer,
        make_bar: MakeBar,
        times: StepTimes,
        kl_control: KLControl | None = None,
        teaching: Teaching | None = None,
        shares: ShareDraws | None = None,
    ) -> None:
        self.loss, self.weights, self.gradient, self.guard = loss, weights, gradient, guard
        self.layout, self.grid, self.regularizer_fraction = layout, grid, regularizer_fraction
        self.seed, self.num_processes, self.num_generations = seed, num_processes, num_generations
        self.metrics, self.make_bar, self.times, self.kl_control = metrics, make_bar, times, kl_control
        self.teaching, self.shares = teaching, shares

    @property
    def compares_groups(self) -> bool:
        """Whether the loss compares the samples of a prompt with each other."""
        return "group" in self.loss.needs

    def begin(self, step: int, batch: RolloutBatch, position: Position) -> None:
        """
        Start an optimizer step: with a pass without gradients where samples are compared and policies differ.

        Args:
            step (`int`):
                Optimizer steps taken so far.
            batch ([`~trl_marble.rollout.RolloutBatch`]):
                The samples.
            position ([`~trl_marble.rollout.Position`]):
                Of its first micro-batch.
        """
        per_sample, update = self.grid.per_sample, position.update
        self._rewards = slice(len(batch.advantages) - (len(self.teaching) if self.teaching else 0))
        num_micro_steps = self.layout.micro_batches_per_update * per_sample
        samples = self.layout.micro_batch_size * self.num_processes  # of a micro-step
        valid = batch.counts[update].sum(dim=0) * per_sample
        self._taught = valid[self._rewards.stop :]  # samples of each teacher
        self._taught_by = (~batch.advantages[self._rewards.stop :].isnan()).cpu() if self.teaching else None
        self._counts = StepCounts(
            valid=valid[self._rewards],
            scored=batch.scored[update] * per_sample,
            total=samples * num_micro_steps,
        )
        if self.kl_control is not None:
            self.loss = dataclasses.replace(self.loss, beta=self.kl_control.beta)  # type: ignore[type-var]
            self.metrics.record("beta", self.kl_control.beta)
        self._kls: list[Tensor] = []  # of the step's samples on this process
        self._penalties = self.loss.penalties
        # Of each sample the same timesteps, so that the step does not depend on how it is cut into micro-batches. The
        # mean over them is, on average over the draws, that over all timesteps, whatever their number.
        seed = derive_seed(self.seed, Draw.REGULARIZED, step)
        self._regularized = draw_fraction(self.regularizer_fraction, per_sample, seed)
        self._num_regularized = samples * self.layout.micro_batches_per_update * len(self._regularized)
        reads_old = "old" in self.loss.needs or self._penalties.old > 0
        self._old_differs = reads_old and not self.weights.are_on_policy()
        self._groups: GroupTable | None = None
        self._reads = self.loss.needs  # of policies that are not trained, in every micro-step
        if self.compares_groups:
            self._look_ahead(batch, position)
        self.guard.begin(step)
        self.gradient.begin(step, batch.counts[update], batch.active[update], num_micro_steps, batch.weighted_sum)

    def _look_ahead(self, batch: RolloutBatch, position: Position) -> None:
        """Compute what samples are compared with, those of this process, with the noise that they will have."""
        first, number = position.micro_batch, self.layout.micro_batches_per_update
        parts = [self.layout.samples_of(place) for place in range(first, first + number)]
        own = slice(parts[0].start, parts[-1].stop)
        differs = self._old_differs or "reference" in self._reads or "old" not in self._reads
        found = [self._terms_of(batch, part, position) for part in parts] if differs else None
        if differs:
            self._reads = frozenset()  # they have been read
        terms = None if found is None else torch.cat(found, dim=2)
        self._own_group_rows = batch.sample_ids[own], batch.advantages[self._rewards, own], terms

    @torch.no_grad()
    def _terms_of(self, batch: RolloutBatch, part: slice, position: Position) -> Tensor:
        """The terms of a micro-batch at each of its draws, `[T, N, B]`."""
        conditioning = batch.conditioning.select(batch.prompt_index[part])
        terms = []
        mixed = self._mixing(position, batch.sample_ids[part])
        with self.make_bar("look ahead", self.grid.per_sample) as bar, mixed:
            for drawn in self._draws(batch, part, position):
                frozen = self._frozen_velocities(drawn.x_t, drawn.t, conditioning, Penalties())
                with self.times.measure("forward"):
                    velocity = self.weights.detached_velocity(drawn.x_t, drawn.t, conditioning)
                    terms.append(torch.stack(list(self.loss.terms(velocity, drawn, frozen))))
                bar.update()
        return torch.stack(terms)

    def join_groups(self) -> None:
        """Bring together what samples are compared with. All processes call it, after [`~PolicyUpdate.begin`]."""
        if self.compares_groups:
            accelerator = self.gradient.accelerator
            self._groups = GroupTable.gather(*self._own_group_rows, self.num_generations, accelerator)

    def _draws(self, batch: RolloutBatch, part: slice, position: Position) -> Iterator[Drawn]:
        """The noisy inputs of a micro-batch: those of its samples, or of their prompts where these are compared."""
        transitions = None if batch.transitions is None else batch.transitions.select(part)
        sampled = Sampled(batch.latents[part].float(), transitions)
        place_of_run = (position.generation, position.iteration)
        draw = Draw.GROUP_NOISE if self.compares_groups else Draw.TRAINING_NOISE
        numbers = batch.sample_ids[part] // (self.num_generations if self.compares_groups else 1)
        generators = [
            torch.Generator().manual_seed(derive_seed(self.seed, draw, *place_of_run, i)) for i in numbers.tolist()
        ]
        return self.loss.draw(sampled, self.grid.times, self.grid.per_sample, generators)

    def accumulate(self, batch: RolloutBatch, position: Position) -> Tensor:
        """
        Add the gradients of one micro-batch, over its timesteps.

        Args:
            batch ([`~trl_marble.rollout.RolloutBatch`]):
                The samples.
            position ([`~trl_marble.rollout.Position`]):
                Of the micro-batch.

        Returns:
            `Tensor` of shape `[]`: The micro-batch's share of the step's loss, detached.
        """
        part, num_times = self.layout.samples_of(position.micro_batch), self.grid.per_sample
        sample_ids = batch.sample_ids[part]
        conditioning = batch.conditioning.select(batch.prompt_index[part])
        prompts = batch.prompts_of(sample_ids)
        loss = torch.zeros((), device=batch.latents.device)
        first_place = position.micro_batch_of_update * num_times
        with self.make_bar("update", num_times) as bar, self._mixing(position, sample_ids):
            for place, drawn in enumerate(self._draws(batch, part, position), start=first_place):
                groups = None if self._groups is None else self._groups.at(place - first_place, sample_ids)
                penalties = self._penalties if place - first_place in self._regularized else Penalties()
                frozen = self._frozen_velocities(drawn.x_t, drawn.t, conditioning, penalties)
                lessons: list[Lesson] = []
                if self.teaching is not None and self._taught_by is not None:
                    lessons = self.teaching.lessons(drawn.x_t, drawn.t, conditioning, self._taught_by[:, part])
                with self.gradient.recording(place, batch.first_half[part]):
                    with self.times.measure("forward"):
                        velocity = self.weights.velocity(drawn.x_t, drawn.t, conditioning)
                        terms = self.loss.terms(velocity, drawn, frozen)
                    distances = [lesson.distance(velocity) for lesson in lessons]
                    compared = None if groups is None else groups.own()
                    looked_at = [*terms, *distances, *([] if compared is None else compared)]
                    self.guard.note(drawn.t, sample_ids, prompts, looked_at)
                    counts = self._counts._replace(groups=groups)
                    with self.times.measure("backward"):
                        own, taught = batch.advantages[self._rewards, part], list(zip(lessons, distances, strict=True))
                        loss += self._backward(velocity, terms, drawn, frozen, penalties, own, counts, taught)
                bar.update()
        return loss

    def _mixing(self, position: Position, sample_ids: Tensor) -> AbstractContextManager[None]:
        """The context of all passes of a micro-batch, backward ones too."""
        shares = None if self.shares is None else self.shares.of(position.generation, sample_ids.tolist())
        return mixing(self.weights.flow, shares)

    def _backward(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        drawn: Drawn,
        frozen: FrozenVelocities,
        penalties: Penalties,
        advantages: Tensor,
        counts: StepCounts,
        taught: Sequence[tuple[Lesson, Tensor]],
    ) -> Tensor:
        """The backward passes of one micro-step. Returns its share of the step's loss."""
        coefficients = self.loss.coefficients(terms, advantages, counts)
        acting = terms[: len(coefficients)]
        shared = self.loss.shared(velocity, terms, frozen, ~advantages.isnan().all(dim=0), counts)
        kl = None if frozen.reference is None else mean_square_distance(velocity, frozen.reference)
        if kl is not None and drawn.kl_weight is not None:
            kl = drawn.kl_weight * kl
        if penalties.old > 0 and frozen.old is not None:
            distance = mean_square_distance(velocity, frozen.old)
            shared = add_shared(shared, penalties.old * (1 / self._num_regularized) * distance)
        if penalties.reference > 0 and kl is not None:
            shared = add_shared(shared, penalties.reference * (1 / self._num_regularized) * kl)
        own_loss = _total(acting, coefficients) / (counts.valid > 0).sum().clamp(min=1)
        if self.teaching is not None:
            self.teaching.record(taught)
            if self.teaching.weight is not None:
                each = [lesson.applies.any(dim=0) * distance for lesson, distance in taught]
                shared = add_shared(shared, self.teaching.weight / counts.total * torch.stack(each).sum(dim=0))
            else:
                distances = [distance for _, distance in taught]
                of_teachers = [lesson.coefficients(self._taught) for lesson, _ in taught]
                own_loss = own_loss + _total(distances, of_teachers) / (self._taught > 0).sum().clamp(min=1)
                num_rewards, num_teachers = len(advantages), len(self.teaching)
                coefficients = [
                    *(pad(own, (0, 0, 0, num_teachers)) for own in coefficients),
                    *(pad(own, (0, 0, num_rewards, 0)) for own in of_teachers),
                ]
                acting = [*acting, *distances]
        self.gradient.backward(acting, coefficients, shared)
        with torch.no_grad():
            self.metrics.record("drift/velocity_rms", mean_rms(velocity))
            if kl is not None:
                if self.kl_control is not None:
                    self._kls.append(kl.detach())
                # Not under one name: what watches a run takes `kl` for how far the policy has drifted.
                name = "guided_kl" if self.weights.flow.guides_reference else "kl"
                self.metrics.record(name, finite_mean(kl))
            return own_loss if shared is None else own_loss + shared.sum()

    def _frozen_velocities(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, penalties: Penalties
    ) -> FrozenVelocities:
        """The velocities that a micro-step needs of policies that are not trained: before the trained policy's."""
        old = base = None
        if self._old_differs and ("old" in self._reads or penalties.old > 0):
            with self.times.measure("old"):
                old = self.weights.old_velocity(x_t, t, conditioning)
        if "reference" in self._reads or penalties.reference > 0:
            with self.times.measure("reference"):
                base = self.weights.base_velocity(x_t, t, conditioning)
        return FrozenVelocities(old, base)

    def finish(self) -> None:
        """
        Leave the update's direction in `.grad`: none if it is not finite.

        Raises:
            `FloatingPointError`: See [`NonFiniteGuard`].
        """
        with self.times.measure("balance"):
            self.gradient.finish()
        if self.kl_control is not None:
            accelerator = self.gradient.accelerator
            finite = torch.cat(self._kls).cpu().double()  # some devices have no float64
            finite = finite[finite.isfinite()]
            sums = torch.tensor([finite.sum().item(), len(finite)], dtype=torch.float32, device=accelerator.device)
            total, number = accelerator.reduce(sums, reduction="sum").tolist()
            self._kl = total / number if number else math.nan

    def commit(self) -> None:
        """Take in what the step has found out of the balance and the KL, once the optimizer has taken it."""
        self.gradient.commit()
        if self.kl_control is not None:
            self.kl_control.update(self._kl)


@torch.no_grad()
def _total(terms: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor | float:
    """The sum of all rows: of all samples of all terms, times their coefficients."""
    each = [(own * term).sum() for term, own in zip(terms, coefficients, strict=True)]
    return torch.stack(each).sum() if each else 0.0
