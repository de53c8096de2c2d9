# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a loss is: an object that turns velocities into a few numbers per sample, and says how the rewards use them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..sde import SDESteps, SDEWindow, Transitions
from .groups import Groups


class Sampled(NamedTuple):
    """
    What rollouts left of the samples of a micro-batch.

    Args:
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        transitions ([`~trl_marble.sde.Transitions`], *optional*):
            What the solver steps of [`~PolicyLoss.window`] went through. `None` where no steps were kept.
    """

    x0: Tensor
    transitions: Transitions | None = None


class Transition(NamedTuple):
    """
    A step with noise of a rollout, one for each sample of a micro-batch.

    Args:
        x_next (`torch.Tensor` of shape `(B, ...)`):
            Where it went.
        step ([`~trl_marble.sde.SDESteps`]):
            Its numbers, of shape `(B,)`.
        weight (`torch.Tensor` of shape `(B,)`):
            Its weight in the loss.
    """

    x_next: Tensor
    step: SDESteps
    weight: Tensor


class Drawn(NamedTuple):
    """
    The noisy inputs of one micro-step: one timestep of each sample of a micro-batch.

    Args:
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noised latents, `(1 - t) x0 + t noise`.
        t (`torch.Tensor` of shape `(B,)`):
            Times in `[0, 1]`, 0 for data and 1 for noise.
        x0 (`torch.Tensor` of shape `(B, ...)`):
            Clean latents.
        noise (`torch.Tensor` of shape `(B, ...)`):
            The noise.
        transition ([`Transition`], *optional*):
            The step that the rollout went from `x_t`, for losses on such steps.
        kl_weight (`torch.Tensor` of shape `(B,)`, *optional*):
            By what the squared distance of velocities is to be multiplied for the [`Penalties`]. Defaults to 1.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    noise: Tensor
    transition: Transition | None = None
    kl_weight: Tensor | None = None


class FrozenVelocities(NamedTuple):
    """
    Velocities of policies that are not trained, at the same noisy inputs.

    Args:
        old (`torch.Tensor` of shape `(B, ...)`, *optional*):
            The old policy's. `None` where the old policy has the weights of the trained one (the detached velocity
            stands for it then), or where the micro-step does not need it.
        reference (`torch.Tensor` of shape `(B, ...)`, *optional*):
            The base model's. `None` where the micro-step does not need it.
    """

    old: Tensor | None = None
    reference: Tensor | None = None


class Penalties(NamedTuple):
    """
    How strongly the trained policy is held near policies that are not trained: coefficients of the squared distance of
    its velocity to theirs, the mean over elements and samples.

    Args:
        old (`float`, *optional*, defaults to `0.0`):
            Of the distance to the old policy.
        reference (`float`, *optional*, defaults to `0.0`):
            Of the distance to the base model, which is the KL to it up to a factor.
    """

    old: float = 0.0
    reference: float = 0.0


class StepCounts(NamedTuple):
    """
    Numbers of samples in one optimizer step, each counted once per timestep, over all micro-batches and processes.
    Divided by them, losses do not depend on how a step is split.

    Args:
        valid (`torch.Tensor` of shape `(K,)`):
            Samples that each reward applies to.
        scored (`torch.Tensor` of shape `()`):
            Samples that any reward applies to.
        total (`int`):
            All samples.
        groups ([`Groups`], *optional*):
            What the samples of this micro-step are compared with, for a loss that needs it.
    """

    valid: Tensor
    scored: Tensor
    total: int
    groups: Groups | None = None

    def compared_with(self) -> Groups:
        """The groups, for a loss whose [`~PolicyLoss.needs`] has them."""
        if self.groups is None:
            raise ValueError("This loss compares the samples of a prompt with each other: `groups` is missing.")
        return self.groups


class PolicyLoss(Protocol):
    """
    A loss as a component. A loss is a frozen dataclass whose fields are settings of `MarbleConfig` of the same names;
    it has no state.

    Every sample enters the loss of reward k only through C scalars of its own velocity, so the K gradients follow from
    C weighted backward passes, whatever K is: `grad L_k = sum_i sum_c coefficients[c][k, i] * grad terms[c][i]`.
    """

    @property
    def needs(self) -> frozenset[str]:
        """
        What the loss reads itself, in every micro-step: the velocities of frozen policies, any of `"old"` and
        `"reference"`; and `"group"`, what a sample is compared with ([`Groups`]).

        With `"group"` all samples of a prompt are drawn with one generator. Where the policies differ, each optimizer
        step begins with a pass without gradients over all its samples, in which the frozen velocities are read and
        [`~PolicyLoss.terms`] computed; these reach [`~PolicyLoss.coefficients`] and [`~PolicyLoss.shared`] as
        `counts.groups`. In the step itself the frozen velocities are not read once more: values are to be taken from
        `counts.groups`, gradients from the terms.
        """
        ...

    @property
    def penalties(self) -> Penalties:
        """
        What is added to the loss, once and with weight 1. It is no part of [`~PolicyLoss.shared`], because it may be
        taken from a random part of the micro-steps, and the velocities that it needs with it.
        """
        ...

    @property
    def samples_with_old(self) -> bool:
        """Whether images are sampled by the old policy; otherwise by the trained one."""
        ...

    def window(self, generation: int, num_steps: int, seed: int) -> SDEWindow | None:
        """
        The solver steps of a rollout that add noise and are kept, for losses on them; `None` for others.

        Args:
            generation (`int`):
                Number of the generation batch.
            num_steps (`int`):
                Steps of a rollout.
            seed (`int`):
                Seed of the run.
        """
        ...

    def num_times(self, num_steps: int, fraction: float) -> int:
        """
        How many timesteps each sample is trained on.

        Args:
            num_steps (`int`):
                Steps of a rollout.
            fraction (`float`):
                `timestep_fraction` of `MarbleConfig`.
        """
        ...

    def draw(
        self, sampled: Sampled, times: Tensor, num_times: int, generators: Sequence[torch.Generator]
    ) -> Iterator[Drawn]:
        """
        The noisy inputs of a micro-batch, one after the other.

        Args:
            sampled ([`Sampled`]):
                Its samples.
            times (`torch.Tensor` of shape `(N,)`):
                The rollout's own time grid.
            num_times (`int`):
                How many timesteps each sample is trained on: the number of inputs to yield.
            generators (`Sequence[torch.Generator]`):
                One per sample, so that how samples are split into micro-batches changes nothing. They are those of
                the prompts, alike for all samples of one, where [`~PolicyLoss.needs`] has `"group"`.
        """
        ...

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        """
        Scalars of every sample.

        Args:
            velocity (`torch.Tensor` of shape `(B, ...)`):
                The trained policy's velocity. Gradients flow through it only.
            drawn ([`Drawn`]):
                The noisy inputs.
            frozen ([`FrozenVelocities`]):
                What [`~PolicyLoss.needs`] asks for.

        Returns:
            `Sequence[torch.Tensor]`: tensors of shape `(B,)`, each entry of its own sample only. The first C are what
            the rewards act through; further ones are for [`~PolicyLoss.coefficients`] and [`~PolicyLoss.shared`].
        """
        ...

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        """
        How much of each scalar goes into the loss of each reward.

        Args:
            terms (`Sequence[torch.Tensor]`):
                What [`~PolicyLoss.terms`] returned.
            advantages (`torch.Tensor` of shape `(K, B)`):
                Clipped to `advantage_clip`; NaN where a reward does not apply.
            counts ([`StepCounts`]):
                What to divide by.

        Returns:
            `Sequence[torch.Tensor]`: C tensors of shape `(K, B)`, detached; 0 where a reward does not apply.
        """
        ...

    def shared(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        frozen: FrozenVelocities,
        scored: Tensor,
        counts: StepCounts,
    ) -> Tensor | None:
        """
        What all rewards share beside the [`~PolicyLoss.penalties`], such as a trust region: it enters the step once,
        with weight 1.

        Args:
            velocity (`torch.Tensor` of shape `(B, ...)`):
                The trained policy's velocity.
            terms (`Sequence[torch.Tensor]`):
                What [`~PolicyLoss.terms`] returned.
            frozen ([`FrozenVelocities`]):
                What [`~PolicyLoss.needs`] asks for.
            scored (`torch.BoolTensor` of shape `(B,)`):
                The samples that any reward applies to.
            counts ([`StepCounts`]):
                What to divide by.

        Returns:
            `torch.Tensor` of shape `(B,)`: each sample's part, to be summed; `None` where there is nothing shared. It
            may be detached, where only its value is of interest.
        """
        ...
