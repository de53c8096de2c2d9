# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Keeps what is not finite out of the weights: finds it where it arises, names it, and raises or skips the step."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from ..metrics import MetricBuffer
from ..nonfinite import CAUSES


logger = logging.get_logger(__name__)

MAX_SKIPPED_STEPS = 10  # consecutive ones; more would be a run that only costs
HOW_TO_SKIP = "What was trained before is saved. To skip such steps instead, set `on_nonfinite='skip'`."


class _Noted(NamedTuple):
    """Which samples of a micro-step have finite losses, and how to name them."""

    finite: Tensor
    t: Tensor
    sample_ids: Tensor
    prompts: list[str]


class NonFiniteGuard:
    """
    Raises for an optimizer step whose gradient is not finite, or skips it.

    Losses are noted on the device, and read only where the gradient turns out not to be finite: then they say which
    sample it was.

    Args:
        on_nonfinite (`str`):
            `"raise"` or `"skip"`.
        accelerator ([`~accelerate.Accelerator`]):
            Tells the other processes.
        metrics ([`~trl_marble.metrics.MetricBuffer`]):
            Where to count skipped steps.
    """

    def __init__(
        self, on_nonfinite: Literal["raise", "skip"], accelerator: Accelerator, metrics: MetricBuffer
    ) -> None:
        self.skips = on_nonfinite == "skip"
        self.accelerator, self.metrics = accelerator, metrics
        self._consecutive_skips = 0
        self._noted: list[_Noted] = []

    def begin(self, step: int) -> None:
        """
        Start an optimizer step.

        Args:
            step (`int`):
                Optimizer steps taken so far.
        """
        self._step = step
        self._noted = []

    def note(self, t: Tensor, sample_ids: Tensor, prompts: list[str], losses: Sequence[Tensor]) -> None:
        """
        Remember which losses of a micro-step are finite, without waiting for the device.

        Args:
            t (`Tensor` of shape `[B]`):
                The times of the samples.
            sample_ids (`Tensor` of shape `[B]`):
                Their numbers in the generation batch.
            prompts (`list[str]`):
                Their prompts.
            losses (`Sequence[Tensor]` of shape `[B]`):
                Their losses.
        """
        finite = torch.stack([loss.detach().isfinite() for loss in losses]).all(dim=0)
        self._noted.append(_Noted(finite, t, sample_ids, prompts))

    def check_rewards(self, names: Sequence[str], squared_norms: Tensor) -> bool:
        """
        Whether the gradients of all rewards are finite.

        Args:
            names (`Sequence[str]`):
                Of the rewards.
            squared_norms (`Tensor` of shape `[K]`):
                Of their gradients, the same on all processes.

        Raises:
            `FloatingPointError`: If they are not, see [`~NonFiniteGuard.check_direction`].
        """
        finite = squared_norms.isfinite().tolist()
        broken = [f"`{name}`" for name, is_finite in zip(names, finite, strict=True) if not is_finite]
        if broken:
            self._skip(f"the gradient of the rewards {', '.join(broken)} is not finite")
        return not broken

    def check_direction(self, parameters: Sequence[nn.Parameter]) -> bool:
        """
        Whether the update's direction in `.grad` is finite. If not, it is taken away, so that the optimizer does
        nothing.

        Args:
            parameters (`Sequence[nn.Parameter]`):
                What is trained. Their gradients are the same on all processes.

        Raises:
            `FloatingPointError`: With `"raise"` if it is not finite; with `"skip"` if it was not for the tenth
                consecutive time.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not nn.utils.get_total_norm(gradients).isfinite():
            self._skip("the norm of the update's direction is not finite")
            drop_gradients(parameters)
            return False
        self._consecutive_skips = 0
        if self.skips:
            self.metrics.record("nonfinite/skipped_steps", 0.0)
        return True

    def _skip(self, fault: str) -> None:
        """Raise for this step, or count it. All processes call it."""
        message = f"Step {self._step + 1}: {fault}; {self._describe_losses()}."
        self._consecutive_skips += 1
        if not self.skips:
            raise FloatingPointError(f"{message} {CAUSES} {HOW_TO_SKIP}")
        if self._consecutive_skips >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(f"{message} This is the {self._consecutive_skips}th consecutive step. {CAUSES}")
        self.metrics.record("nonfinite/skipped_steps", 1.0)
        logger.warning(f"{message} The step is skipped.")

    def _describe_losses(self) -> str:
        """Which losses are not finite, first on which sample of which process."""
        own: list[str] = []
        for noted in self._noted:
            for place in (~noted.finite).nonzero().flatten().tolist():
                own.append(
                    f"sample {int(noted.sample_ids[place])} (prompt {noted.prompts[place]!r}) at "
                    f"t = {noted.t[place].item():.3f} on process {self.accelerator.process_index}"
                )
        found = gather_object([(len(own), own[0])] if own else [])
        if not found:
            return "the losses of all samples are finite, so something overflows in the backward pass"
        number = sum(count for count, _ in found)
        return f"{number} losses (of a sample at a timestep) are not finite, first that of {found[0][1]}"


def drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Take the gradients away: optimizers pass such parameters over, without decay and without moments."""
    for parameter in parameters:
        parameter.grad = None
