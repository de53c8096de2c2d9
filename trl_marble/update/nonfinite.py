# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Numbers that are NaN or infinite: found where they arise, named, and left out or raised, on all processes alike."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from ..balance import NFTLosses, gram_matrix
from ..pipelines import Conditioning
from .generation import GenerationBatch
from .marble_config import MarbleConfig
from .metrics import MetricBuffer


if TYPE_CHECKING:
    from .marble_nft_trainer import MarbleNFTTrainer
    from .step_gradient import LossShares


logger = logging.get_logger(__name__)

MAX_SKIPPED_STEPS = 10  # on end; more would be a run that only costs
CAUSES = (
    "Usual causes: a learning rate that is too high (if `grad_norm` and `drift/velocity_rms` rose before, lower "
    "`learning_rate` or set `max_grad_norm`), or a base model, VAE or text encoder that overflows in its dtype (load "
    "the pipeline in bfloat16 or float32, not in float16)."
)
NOTHING_LEFT = "Nothing is left to train on."
MEND = "What was trained before is saved. To leave out what is not finite instead, set `on_nonfinite='mask'`."


class NonFiniteGuard:
    """
    Keeps what is not finite out of the weights, as `MarbleConfig.on_nonfinite` says.

    Losses of samples are noted on the device and looked at once an optimizer step. By then they may have spoilt the
    step's gradient, even where their coefficient is 0 (0 times NaN is NaN), so the gradient is thrown away: the step
    fails, or all processes take their micro-steps again without these samples. The others count what they counted
    before: the numbers of samples that losses are divided by are not corrected.

    Args:
        args ([`MarbleConfig`]):
            The settings.
        accelerator ([`~accelerate.Accelerator`]):
            Tells the other processes.
        names (`list[str]`):
            Of the rewards.
        metrics ([`MetricBuffer`]):
            Where to count, with `"mask"`.
    """

    def __init__(self, args: MarbleConfig, accelerator: Accelerator, names: list[str], metrics: MetricBuffer) -> None:
        self.args, self.accelerator, self.names, self.metrics = args, accelerator, names, metrics
        self._masks = args.on_nonfinite == "mask"
        self._skipped = 0  # steps on end

    # ---- Rollouts ----

    def settle_latents(self, finite: Tensor, prompts: list[str]) -> int:
        """
        Raise for samples whose latents are not finite, or count them.

        Args:
            finite (`Tensor` of shape `[B]`, bool, on the CPU):
                Which of this process's samples are finite.
            prompts (`list[str]`):
                Their prompts.

        Returns:
            `int`: How many samples of all processes are not.

        Raises:
            `FloatingPointError`: With `"raise"` if there is any; with `"mask"` if there is nothing else.
        """
        broken, total = self._add_up(torch.stack([(~finite).sum(), torch.tensor(len(finite))]))
        if broken > 0:
            own = [prompt for prompt, is_finite in zip(prompts, finite.tolist(), strict=True) if not is_finite]
            first = gather_object([f"{own[0]!r} on process {self.args.process_index}"] if own else [])[0]
            self._settle(
                f"The latents of {broken} of {total} sampled images are not finite, first for the prompt {first}.",
                hopeless=NOTHING_LEFT if broken == total else None,
            )
        return broken

    # ---- Losses of samples in an optimizer step ----

    def begin(
        self,
        step: int,
        batch: GenerationBatch,
        prompts: list[str],
        update: int,
        num_times: int,
        left_out: Tensor | None,
    ) -> None:
        """
        Start an optimizer step.

        Args:
            step (`int`):
                Optimizer steps taken so far.
            batch ([`GenerationBatch`]):
                The samples.
            prompts (`list[str]`):
                The prompts of this process's samples, in the order of the generation batch.
            update (`int`):
                Which optimizer step of the generation batch this is.
            num_times (`int`):
                Timesteps that each sample is trained on.
            left_out (`Tensor`, *optional*):
                What [`~NonFiniteGuard.settle`] returned, where the step is taken again.
        """
        micro_batches, size = self.args.gradient_accumulation_steps, self.args.per_device_train_batch_size
        self._step, self._batch, self._prompts = step, batch, prompts
        self._first = update * micro_batches * size
        if left_out is None:
            own = slice(self._first, self._first + micro_batches * size)
            left_out = ~batch.finite[own].cpu().view(micro_batches, 1, size)
            left_out = left_out.repeat(1, num_times, 1).flatten(0, 1)
        self._num_times = num_times
        self._left_out = left_out  # [micro-steps, samples of one]
        self._finite = torch.ones(left_out.shape, dtype=torch.bool, device=self.args.device)
        self._times: dict[int, Tensor] = {}

    def kept(self, place: int) -> Tensor | None:
        """
        Which samples of a micro-step take part.

        Args:
            place (`int`):
                Which micro-step of this process's step it is.

        Returns:
            `Tensor`, int64, on the CPU: their places in the micro-batch; `None` if all do.
        """
        left_out = self._left_out[place]
        return (~left_out).nonzero().flatten() if left_out.any() else None

    def without_left_out(
        self, place: int, x_t: Tensor, x0: Tensor, t: Tensor, conditioning: Conditioning, shares: "LossShares"
    ) -> tuple[Tensor, Tensor, Tensor, Conditioning, "LossShares"] | None:
        """
        The part of a micro-step that takes part in it.

        Args:
            place (`int`):
                See [`~NonFiniteGuard.kept`].
            x_t, x0, t, conditioning, shares:
                The whole micro-step: noisy and clean latents, times, embeddings and what each sample counts.

        Returns:
            `tuple`: The same for the samples that take part; `None` if none does.
        """
        kept = self.kept(place)
        if kept is None:
            return x_t, x0, t, conditioning, shares
        if len(kept) == 0:
            self.metrics.record("drift/velocity_rms", torch.nan)  # processes must record the same metrics
            if self.args.beta > 0:
                self.metrics.record("kl", torch.nan)
            return None
        on_device = kept.to(x_t.device)
        return x_t[on_device], x0[on_device], t[on_device], conditioning.select(kept), shares.select(on_device)

    def note(self, place: int, t: Tensor, losses: NFTLosses, divergence: Tensor | None) -> None:
        """
        Remember which losses of a micro-step are finite, without waiting for the device.

        Args:
            place (`int`):
                See [`~NonFiniteGuard.kept`].
            t (`Tensor` of shape `[b]`):
                The times of the samples that take part.
            losses ([`~trl_marble.balance.NFTLosses`] of shape `(b,)`):
                Their losses.
            divergence (`Tensor` of shape `(b,)` or `None`):
                Their squared distances to the base model, where these are penalized.
        """
        finite = losses.positive.isfinite() & losses.negative.isfinite()
        if divergence is not None:
            finite &= divergence.isfinite()
        kept = self.kept(place)
        self._times[place] = t
        self._finite[place, slice(None) if kept is None else kept.to(finite.device)] = finite

    def settle(self) -> Tensor | None:
        """
        Raise for the step's losses that are not finite, or say what to leave out of it. All processes call it.

        Returns:
            `Tensor` of shape `[micro-steps, samples of one]`, bool, or `None`: with `"mask"`, what this process
            takes the step again without; `None`, on all processes, if the gradients can be used.

        Raises:
            `FloatingPointError`: With `"raise"` if there is any; with `"mask"` if there is nothing else.
        """
        broken, total = self._add_up(torch.stack([(~self._finite).sum().cpu(), (~self._left_out).sum()]))
        if self._masks:
            self.metrics.record("nonfinite/losses", broken)
        if broken == 0:
            return None
        own = ~self._finite.cpu()
        where = gather_object([self._describe(own)] if own.any() else [])
        self._settle(
            f"Step {self._step + 1}: {broken} of {total} losses (of a sample at a timestep) are not finite, first "
            f"that of {where[0]}.",
            hopeless=NOTHING_LEFT if broken == total else None,
        )
        return self._left_out | own  # on all processes: the others would only wait

    def _describe(self, broken: Tensor) -> str:
        place, row = broken.nonzero()[0].tolist()
        sample = self._first + place // self._num_times * self.args.per_device_train_batch_size + row
        kept = self.kept(place)
        t = self._times[place][row if kept is None else kept.tolist().index(row)].item()
        number = int(self._batch.sample_ids[sample])
        prompt = self._prompts[number - self.args.process_index * len(self._prompts)]
        return f"sample {number} (prompt {prompt!r}) at t = {t:.3f} on process {self.args.process_index}"

    # ---- The step's gradients, which are the same on all processes ----

    @torch.no_grad()
    def settle_rewards(self, gradients: Tensor, gram: Tensor) -> Tensor:
        """
        Raise for rewards whose gradient is not finite, or set it to 0, so that they take no part.

        Args:
            gradients (`Tensor` of shape `[K, P]`):
                The rewards' gradients, changed in place.
            gram (`Tensor` of shape `[K, K]`):
                Their inner products.

        Returns:
            `Tensor` of shape `[K, K]`: The inner products of what is left.

        Raises:
            `FloatingPointError`: With `"raise"` if there is any.
        """
        broken = [not is_finite for is_finite in gram.diagonal().isfinite().tolist()]
        if self._masks:
            for name, is_broken in zip(self.names, broken, strict=True):
                self.metrics.record(f"nonfinite/gradient/{name}", float(is_broken))
        if not any(broken):
            return gram
        names = ", ".join(f"`{name}`" for name, is_broken in zip(self.names, broken, strict=True) if is_broken)
        self._settle(f"Step {self._step + 1}: the gradient of the rewards {names} is not finite.")
        gradients[torch.tensor(broken, device=gradients.device)] = 0
        return gram_matrix(gradients)

    def settle_direction(self, parameters: Iterable[nn.Parameter]) -> bool:
        """
        Raise if the update's direction in `.grad` is not finite, or take it away, so that the optimizer does nothing.

        Args:
            parameters (`Iterable[nn.Parameter]`):
                What is trained.

        Returns:
            `bool`: Whether the step is taken.

        Raises:
            `FloatingPointError`: With `"raise"` if it is not; with `"mask"` if none was for the tenth time on end.
        """
        parameters = list(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        taken = bool(nn.utils.get_total_norm(gradients).isfinite())
        if self._masks:
            self.metrics.record("nonfinite/skipped_steps", float(not taken))
        self._skipped = 0 if taken else self._skipped + 1
        if not taken:
            self._settle(
                f"Step {self._step + 1}: the norm of the update's direction is not finite, although the losses are: "
                "something overflows in the backward pass.",
                hopeless=f"This is the {self._skipped}th step on end." if self._skipped >= MAX_SKIPPED_STEPS else None,
            )
            for parameter in parameters:
                parameter.grad = None  # optimizers pass these over: no decay, no moment
        return taken

    # ---- Both ----

    def _add_up(self, counts: Tensor) -> list[int]:
        return self.accelerator.reduce(counts.to(self.args.device), reduction="sum").tolist()

    def _settle(self, message: str, hopeless: str | None = None) -> None:
        """Raise or warn; raise in any case if there is a reason why it is hopeless to go on."""
        if hopeless is not None:
            raise FloatingPointError(f"{message} {hopeless} {CAUSES}")
        if not self._masks:
            raise FloatingPointError(f"{message} {CAUSES} {MEND}")
        logger.warning(f"{message} Left out.")


def finite_mean(values: Tensor) -> Tensor:
    """Mean of the values that are finite, NaN if there is none."""
    return values.where(values.isfinite(), torch.nan).nanmean()


def finite_sum(values: Tensor) -> Tensor:
    """Sum of the values that are finite."""
    return values.where(values.isfinite(), 0.0).sum()


def refuse_nonfinite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """
    Make sure that tensors can be saved.

    Args:
        what (`str`):
            What they are, for the message.
        tensors (`Mapping[str, Tensor]`):
            The tensors by name.

    Raises:
        `FloatingPointError`: If one holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(
                f"`{name}` of the {what} holds values that are not finite, so nothing is saved, and what was saved "
                f"before is left as it is. Resume from an earlier checkpoint. {CAUSES}"
            )


def refuse_nonfinite_run(trainer: "MarbleNFTTrainer") -> None:
    """
    Make sure that a checkpoint of a run can be saved.

    Args:
        trainer ([`MarbleNFTTrainer`]):
            The run.

    Raises:
        `FloatingPointError`: If its weights or its optimizer are not finite.
    """
    refuse_nonfinite("trained weights", trainer.trainable)
    refuse_nonfinite("old policy", trainer.old_policy.state_dict())
    refuse_nonfinite("averaged weights", trainer.average.state_dict())
    if trainer.optimizer is not None:
        for state in trainer.optimizer.state_dict()["state"].values():
            refuse_nonfinite("optimizer", {name: value for name, value in state.items() if torch.is_tensor(value)})
