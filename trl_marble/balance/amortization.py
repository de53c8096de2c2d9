# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""When to solve for the balance, and what to use in between."""

import torch
from torch import Tensor

from .harmonize import Harmonization


# Below this share of the total, what is left of old solves says nothing about how rewards compare.
_NEGLIGIBLE = 1e-6


class BalanceSchedule:
    """
    Holds the smoothed balance between two full solves ([MARBLE](https://huggingface.co/papers/2605.06507)).

    Every `balance_every` optimizer steps the per-reward gradients are harmonized and `alpha` goes into an exponential
    moving average. In between, one loss with mixed coefficients gives the update at the cost of a single
    reward. Rewards that apply to no sample of a solve keep their average.

    Args:
        num_rewards (`int`):
            `K`, at least 1.
        balance_every (`int`, *optional*, defaults to `10`):
            `N`, optimizer steps from one solve to the next, at least 1.
        balance_ema (`float`, *optional*, defaults to `0.7`):
            `rho` in `[0, 1)`: `alpha <- rho * alpha + (1 - rho) * new`. A reward's first value is taken as it is.

    Raises:
        `ValueError`: if a setting is out of range.
    """

    def __init__(self, num_rewards: int, balance_every: int = 10, balance_ema: float = 0.7):
        if num_rewards < 1:
            raise ValueError(f"num_rewards must be at least 1, got {num_rewards}.")
        if balance_every < 1:
            raise ValueError(f"balance_every must be at least 1 (solve at every step), got {balance_every}.")
        if not 0 <= balance_ema < 1:
            raise ValueError(f"balance_ema must be in [0, 1) (0: no smoothing), got {balance_ema}.")
        self.num_rewards = num_rewards
        self.balance_every = balance_every
        self.balance_ema = balance_ema
        # NaN stands for "not solved for yet".
        self._alpha = torch.full((num_rewards,), torch.nan, dtype=torch.float64)
        self._norms = torch.full((num_rewards,), torch.nan, dtype=torch.float64)
        self._total = torch.tensor(torch.nan, dtype=torch.float64)

    @property
    def alpha(self) -> Tensor:
        """
        The smoothed `alpha` of shape `(K,)`, float64 on the CPU; NaN for a reward that no solve has seen. Each entry
        is its reward's own average, so they need not sum to 1 where rewards come and go.
        """
        return self._alpha.clone()

    def is_due(self, step: int, active: Tensor | None = None) -> bool:
        """
        Whether this optimizer step is to be a full solve: at steps 0, N, 2N, ..., and whenever a reward takes part
        that no solve has seen yet, because there is no telling what it should weigh.

        Args:
            step (`int`):
                Optimizer steps taken so far.
            active (`torch.BoolTensor` of shape `(K,)`, *optional*):
                The rewards with a signal in this step: best those with any advantage other than 0. (A reward with
                only zero advantages may have no gradient to solve for, and would be due again and again.)

        Returns:
            `bool`.
        """
        return step % self.balance_every == 0 or (active is not None and not self.knows(active))

    def knows(self, active: Tensor) -> bool:
        """
        Whether every reward that takes part has been in a solve, so that [`~BalanceSchedule.weights`] can weigh it.

        Args:
            active (`torch.BoolTensor` of shape `(K,)`):
                The rewards with a signal in this step, see [`~BalanceSchedule.is_due`].

        Returns:
            `bool`.
        """
        return not bool((self._checked(active) & self._alpha.isnan()).any())

    def update(self, harmonization: Harmonization) -> None:
        """
        Takes in a full solve. Rewards that were not active in it keep their values.

        Args:
            harmonization ([`Harmonization`]):
                The result of [`harmonize`] at this step.
        """
        active = self._checked(harmonization.active)
        if not active.any():
            return
        new_alpha = harmonization.alpha.detach().cpu().double()
        smoothed = torch.where(self._alpha.isnan(), new_alpha, self._smooth(self._alpha, new_alpha))
        self._alpha = torch.where(active, smoothed, self._alpha)
        self._norms = torch.where(active, harmonization.norms.detach().cpu().double(), self._norms)
        new_total = new_alpha[active].abs().sum()
        self._total = new_total if self._total.isnan() else self._smooth(self._total, new_total)

    def weights(self, active: Tensor) -> Tensor:
        """
        Weights for a step without a solve: the smoothed `alpha` of the rewards that take part, scaled to the total
        that solves have (1 for MGDA), times the mean of their last known gradient norms over their own.

        Args:
            active (`torch.BoolTensor` of shape `(K,)`):
                The rewards that take part in this step.

        Returns:
            `torch.Tensor` of shape `(K,)`, float64 on the CPU. 0 for rewards that do not take part, and for rewards
            that no solve has seen (for which [`~BalanceSchedule.is_due`] asks for a solve instead). If the smoothed
            `alpha` of all that take part is (nearly) 0, they share equally: what made them superfluous is absent.
        """
        usable = self._checked(active) & ~self._alpha.isnan()
        weights = torch.zeros(self.num_rewards, dtype=torch.float64)
        if not usable.any():
            return weights
        alpha = self._alpha[usable]
        if alpha.abs().sum() <= _NEGLIGIBLE * self._total:
            alpha = torch.ones_like(alpha)
        alpha = alpha * self._total / alpha.abs().sum()
        norms = self._norms[usable]
        weights[usable] = alpha * norms.mean() / norms
        return weights

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, as tensors."""
        return {"alpha": self._alpha.clone(), "norms": self._norms.clone(), "total": self._total.clone()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """
        Restores the state.

        Args:
            state_dict (`dict`):
                What [`~BalanceSchedule.state_dict`] returned.

        Raises:
            `ValueError`: if it was saved for another number of rewards.
        """
        saved = len(state_dict["alpha"])
        if saved != self.num_rewards:
            raise ValueError(
                f"The saved balance is for {saved} rewards, this run has {self.num_rewards}: resume with the reward "
                "functions of the checkpoint."
            )
        self._alpha = state_dict["alpha"].detach().cpu().double().clone()
        self._norms = state_dict["norms"].detach().cpu().double().clone()
        self._total = state_dict["total"].detach().cpu().double().clone()

    def _smooth(self, old: Tensor, new: Tensor) -> Tensor:
        return self.balance_ema * old + (1 - self.balance_ema) * new

    def _checked(self, active: Tensor) -> Tensor:
        if active.dtype != torch.bool or active.shape != (self.num_rewards,):
            raise ValueError(
                f"active must hold one boolean per reward ({self.num_rewards}), got {active.dtype} of shape "
                f"{tuple(active.shape)}."
            )
        return active.detach().cpu()
