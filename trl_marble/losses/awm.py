# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Flow matching weighted by advantages ([AWM](https://huggingface.co/papers/2509.25050))."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .forward_process import (
    OnNoisedSamples,
    at_least_float32,
    divide_by_counts,
    mean_square_distance,
)
from .policy_loss import Drawn, FrozenVelocities, Penalties, StepCounts


AWMWeighting = Literal["ghuber", "huber", "t", "t2", "uniform"]


@dataclass(frozen=True)
class AWMLoss(OnNoisedSamples):
    """
    AWM's loss, one per reward. The matching error `mse_i = mean((v_i - (noise_i - x0_i))^2)` stands for the log
    likelihood of a sample, `log p_i = -w(t_i, mse_i)`, and

    `L_k = sum_i (m[k,i] / n_k) max(-A ratio_i, -A clip(ratio_i, 1 - c, 1 + c))` with `A = A[k,i] / C` and
    `ratio_i = exp(log p_i - log p_old,i)`.

    On-policy (`awm_off_policy=False`) images are sampled by the trained policy and `ratio_i` is 1, with the gradient
    of `log p_i`. What all rewards share is `awm_ema_beta * mean((v - v_old)^2)`, a trust region around the old
    policy, and the KL to the base model. Here the old policy is a fast moving average of the trained weights
    (`old_policy_preset`).

    Args:
        awm_weighting (`str`):
            `w(t, mse)`: `"ghuber"`, `(t / p) ((mse + 1e-10)^p - (1e-10)^p)`; `"huber"`,
            `t (sqrt(mse + 1e-10) - 1e-5)`; `"t"`, `t mse`; `"t2"`, `t^2 mse`; or `"uniform"`, `mse`.
        awm_power (`float`):
            `p` of `"ghuber"`, in (0, 1].
        awm_off_policy (`bool`):
            Whether images are sampled by the old policy, and compared with it.
        awm_clip_range (`float`):
            `c`, above 0.
        awm_ema_beta (`float`):
            Coefficient of the trust region around the old policy.
        advantage_clip (`float`):
            `C`, the bound at which the advantages were clipped.
        beta (`float`):
            Coefficient of the KL to the base model.
    """

    awm_weighting: AWMWeighting
    awm_power: float
    awm_off_policy: bool
    awm_clip_range: float
    awm_ema_beta: float
    advantage_clip: float
    beta: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old"} if self.awm_off_policy else ())

    @property
    def penalties(self) -> Penalties:
        return Penalties(old=self.awm_ema_beta, reference=self.beta)

    @property
    def samples_with_old(self) -> bool:
        return self.awm_off_policy

    def terms(self, velocity: Tensor, drawn: Drawn, frozen: FrozenVelocities) -> Sequence[Tensor]:
        log_p = self._log_likelihood(velocity, drawn)
        if not self.awm_off_policy or frozen.old is None:
            return log_p, log_p.detach()
        return log_p, self._log_likelihood(frozen.old, drawn)

    def coefficients(self, terms: Sequence[Tensor], advantages: Tensor, counts: StepCounts) -> Sequence[Tensor]:
        log_p, log_p_old = (term.detach() for term in terms)
        ratio = (log_p - log_p_old).exp()
        values, share = divide_by_counts(advantages, counts)
        values = values / self.advantage_clip
        clipped = ratio.clamp(1 - self.awm_clip_range, 1 + self.awm_clip_range)
        # The larger of both is the one without the clip, whose gradient with respect to log p is -A ratio.
        follows = values * ratio <= values * clipped
        return (-share * values * ratio * follows,)

    def _log_likelihood(self, velocity: Tensor, drawn: Drawn) -> Tensor:
        target = at_least_float32(drawn.noise) - at_least_float32(drawn.x0)
        mse, t = mean_square_distance(velocity, target), at_least_float32(drawn.t)
        match self.awm_weighting:
            case "ghuber":
                p = self.awm_power
                return -(t / p) * ((mse + 1e-10) ** p - 1e-10**p)
            case "huber":
                return -t * ((mse + 1e-10).sqrt() - 1e-5)
            case "t":
                return -t * mse
            case "t2":
                return -t.square() * mse
            case "uniform":
                return -mse
