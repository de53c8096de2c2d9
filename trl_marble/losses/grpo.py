# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Policy gradients of the steps of rollouts ([Flow-GRPO](https://huggingface.co/papers/2505.05470) and successors)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sde import SDEKind, SDESteps, SDEWindow
from ..seeding import Draw, derive_seed
from .forward_process import at_least_float32, divide_by_counts
from .policy_loss import Drawn, FrozenVelocities, Penalties, Sampled, StepCounts, Transition


WindowPlacement = Literal["fixed", "random", "sliding"]
Reweighting = Literal["none", "noise", "step"]


@dataclass(frozen=True)
class GRPOLoss:
    """
    The loss of Flow-GRPO, one per reward, on transitions of the rollout. Some steps of a rollout add noise (see
    [`~trl_marble.sde.SDEWindow`]); each of them goes from `x` to `x'` with probability `N(x'; mu, s^2)`, where the
    mean `mu` follows from the velocity in `x`. With the old policy, which sampled, `D = mu - mu_old`, and means over
    the elements of a sample,

    `log ratio = log N(x'; mu, s^2) - log N(x'; mu_old, s^2) = mean(D (x' - mu_old)) / s^2 - mean(D^2) / (2 s^2)`,

    `L_k = sum_i w_i (m[k,i] / n_k) max(-A[k,i] ratio_i, -A[k,i] clip(ratio_i, 1 - c, 1 + c))`.

    Every image has one advantage for all of its transitions. The KL of a transition to the base model, with the
    coefficient `beta`, is `mean((mu - mu_base)^2) / (2 s^2)`.

    Args:
        grpo_sde (`str`):
            How steps add noise: `"flow_sde"` or `"cps"`.
        grpo_noise_level (`float`):
            `a`, in (0, 1].
        grpo_window_size (`int`):
            Number of steps that add noise, which are those that are trained on; less than the steps of a rollout.
        grpo_window (`str`):
            Where they are, the same place for all images of a generation batch: `"fixed"`, from the first step on;
            `"random"`, drawn for each generation batch from the first half of the rollout
            ([Flow-GRPO-Fast](https://huggingface.co/papers/2505.05470)); or `"sliding"`, from the first step on, later
            by one step every `grpo_window_every` generation batches, and after the first half from the beginning
            ([MixGRPO](https://huggingface.co/papers/2507.21802)). Noise of late steps would stay in the images.
        grpo_window_every (`int`):
            See above.
        grpo_clip_range (`float`):
            `c`, above 0.
        grpo_guard (`bool`):
            Whether the ratio is that of [GRPO-Guard](https://huggingface.co/papers/2510.22319): without the part of
            `log ratio` that is negative on average, and times `s`, so that its size does not depend on the step:
            `log ratio = mean(D (x' - mu_old)) / s`.
        grpo_reweighting (`str`):
            The weight `w` of a transition: `"none"`, 1; `"noise"`, proportional to `s`
            ([TempFlow-GRPO](https://huggingface.co/papers/2508.04324)); or `"step"`, proportional to `1 / (t - t')`,
            which belongs to the guard. The mean over the steps of a rollout, but the last, is 1.
        beta (`float`):
            Coefficient of the KL to the base model.
    """

    grpo_sde: SDEKind
    grpo_noise_level: float
    grpo_window_size: int
    grpo_window: WindowPlacement
    grpo_window_every: int
    grpo_clip_range: float
    grpo_guard: bool
    grpo_reweighting: Reweighting
    beta: float

    needs = frozenset({"old"})
    samples_with_old = True

    @property
    def penalties(self) -> Penalties:
        return Penalties(reference=self.beta)

    def window(self, generation: int, num_steps: int, seed: int) -> SDEWindow:
        begin, places = 0, max(1, num_steps // 2 - self.grpo_window_size + 1)
        if self.grpo_window == "random":
            generator = torch.Generator().manual_seed(derive_seed(seed, Draw.WINDOW, generation))
            begin = int(torch.randint(places, (), generator=generator))
        elif self.grpo_window == "sliding":
            begin = generation // self.grpo_window_every % places
        return SDEWindow(self.grpo_sde, self.grpo_noise_level, begin, self.grpo_window_size)

    def num_times(self, num_steps: int, fraction: float) -> int:
        return self.grpo_window_size

    def draw(
        self, sampled: Sampled, times: Tensor, num_times: int, generators: Sequence[torch.Generator]
    ) -> Iterator[Drawn]:
        """All transitions of the samples, one after the other; nothing is drawn."""
        x0, transitions = sampled
        if transitions is None:
            raise TypeError(
                "`policy_loss='grpo'` is trained on steps of rollouts, and this generation batch has none. If it is "
                "of a checkpoint of another loss, resume from one between two generation batches."
            )
        steps = SDESteps.of_grid(self.grpo_sde, self.grpo_noise_level, transitions.times)
        weights = self._weights(steps)
        points = at_least_float32(transitions.points)
        for place in range(points.shape[1] - 1):
            number = transitions.begin + place
            x_t, step = points[:, place], steps.at(number).expand(points)
            t = step.t.view(-1, *[1] * (x0.ndim - 1))
            noise = (x_t - (1 - t) * x0) / t  # which x_t has of the noise, as seen from where it went
            transition = Transition(points[:, place + 1], step, weights[number].to(points).expand(len(points)))
            kl_weight = (step.velocity_factor / step.deviation).square() / 2
            yield Drawn(x_t, step.t, x0, noise, transition, kl_weight)

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        assert drawn.transition is not None
        x_next, step, weight = drawn.transition
        velocity = at_least_float32(velocity)
        old = velocity.detach() if frozen.old is None else at_least_float32(frozen.old)
        factor = step.velocity_factor.view(-1, *[1] * (velocity.ndim - 1))
        # Not the difference of two means, or of two log-probabilities, which is lost in rounding.
        difference = factor * (velocity - old)
        rest = x_next - step.mean(drawn.x_t, old)
        normalized = (difference * rest).flatten(1).mean(dim=1) / step.deviation
        if self.grpo_guard:
            return normalized, weight
        square = difference.square().flatten(1).mean(dim=1)
        return normalized / step.deviation - square / (2 * step.deviation.square()), weight

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        log_ratio, weight = (term.detach() for term in terms)
        ratio = log_ratio.exp()
        values, share = divide_by_counts(advantages, counts)
        clipped = ratio.clamp(1 - self.grpo_clip_range, 1 + self.grpo_clip_range)
        # The larger of both is the one without the clip, whose gradient with respect to log ratio is -A ratio.
        follows = values * ratio <= values * clipped
        return (-share * weight * values * ratio * follows,)

    def shared(
        self,
        velocity: Tensor,
        terms: Sequence[Tensor],
        frozen: FrozenVelocities,
        scored: Tensor,
        counts: StepCounts,
    ) -> Tensor | None:
        return None  # its KL is a penalty

    def _weights(self, steps: SDESteps) -> Tensor:
        """`w` of each step of a rollout."""
        match self.grpo_reweighting:
            case "none":
                return torch.ones_like(steps.t)
            case "noise":
                values = steps.deviation
            case "step":
                values = 1 / (steps.t - steps.t_next)
        return values / values[:-1].mean()
