# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Samples images or videos and scores them: for rollouts and for evaluations alike."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..media import Sample
from ..memory_advice import reward_advice
from ..nonfinite import CAUSES
from ..pipelines import Acceleration, Conditioning, FlowPipeline
from ..pipelines.mixing import mixing
from ..processes import FailingTogether
from ..progress import MakeBar
from ..rewards import RewardScorer, Scores
from ..sde import SDEWindow, Transitions
from ..seeding import Draw, derive_seed
from ..step_times import StepTimes
from .reward_failures import FailurePolicy
from .reward_requests import RewardRequests
from .set_scores import SetImages, score_sets


class SampleBatch(NamedTuple):
    """
    What one call of the pipeline samples from, and what the rewards get with it.

    Args:
        prompts (`list[str]`):
            The prompt of each image.
        columns (`dict[str, list]`):
            The other columns of the dataset, one value per image.
        seeds (`list[int]`):
            The seed of each image.
        conditioning ([`~trl_marble.pipelines.Conditioning`]):
            One row per image.
        shares (`Tensor` of shape `[B, K]`, *optional*):
            The share of each part of the adapter that samples each image, see
            [`~trl_marble.pipelines.mixing.mixing`]. By default the adapter is used as it is.
    """

    prompts: list[str]
    columns: dict[str, list]
    seeds: list[int]
    conditioning: Conditioning
    shares: Tensor | None = None


class Samples(NamedTuple):
    """
    A scored batch.

    Args:
        latents (`Tensor` of shape `[B, ...]`):
            Clean latents x0, all 0 where they are not finite.
        images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
            The decoded images, or videos.
        finite (`Tensor` of shape `[B]`, bool, on the CPU):
            Which samples have finite latents. No reward is asked about the others.
        scores ([`~trl_marble.rewards.Scores`]):
            The rewards' scores: one row per reward, those of the first scorer first.
        measured (`Tensor` of shape `[B, ...]`, *optional*):
            What was measured of each sample where it was sampled; NaN for those that are not finite.
        transitions ([`~trl_marble.sde.Transitions`], *optional*):
            What the steps with noise went through, where there are any; 0 for samples that are not finite.
    """

    latents: Tensor
    images: list[Sample]
    finite: Tensor
    scores: Scores
    measured: Tensor | None = None
    transitions: Transitions | None = None

    @staticmethod
    def concatenate(parts: "Sequence[Samples]") -> "Samples":
        """Several batches as one, without what was measured of them."""
        return Samples(
            torch.cat([part.latents for part in parts]),
            [image for part in parts for image in part.images],
            torch.cat([part.finite for part in parts]),
            Scores.concatenate([part.scores for part in parts]),
            transitions=Transitions.concatenate([part.transitions for part in parts]),
        )

    def select(self, chosen: Sequence[int]) -> "Samples":
        """Some of the samples, without what was measured of them."""
        index = torch.tensor(chosen, dtype=torch.int64)
        on_device = index.to(self.latents.device)
        return Samples(
            self.latents[on_device],
            [self.images[i] for i in chosen],
            self.finite[index],
            self.scores.select(chosen),
            transitions=None if self.transitions is None else self.transitions.select(on_device),
        )


class RolloutSampler:
    """
    Samples with the weights that are in place, and scores. A batch is scored while the next ones are sampled.

    Args:
        flow ([`~trl_marble.pipelines.FlowPipeline`]):
            The pipeline.
        together ([`~trl_marble.processes.FailingTogether`]):
            Lets all processes stop where one fails.
        num_inference_steps (`int`):
            Number of solver steps.
        failures ([`FailurePolicy`]):
            What becomes of images without a score.
        reward_timeout (`float`, *optional*):
            Longest time in seconds to wait for scores once everything is sampled. Defaults to waiting for ever.
        calls_together (`bool`, *optional*, defaults to `False`):
            Whether all processes must call the transformer equally often, as with a sharded base.
        make_bar (`Callable[[str, int], ProgressBar]`):
            Makes the progress bars.
        acceleration ([`~trl_marble.pipelines.Acceleration`], *optional*):
            How to sample faster. Defaults to the pipeline as it is.
        times ([`~trl_marble.step_times.StepTimes`], *optional*):
            What decoding, waiting for rewards and the rewards take is added to. Defaults to measuring nothing.
    """

    def __init__(
        self,
        flow: FlowPipeline,
        together: FailingTogether,
        num_inference_steps: int,
        failures: FailurePolicy,
        *,
        reward_timeout: float | None = None,
        calls_together: bool = False,
        make_bar: MakeBar,
        acceleration: Acceleration | None = None,
        times: StepTimes | None = None,
    ) -> None:
        self.flow, self.together, self.num_inference_steps = flow, together, num_inference_steps
        self.failures, self.reward_timeout, self.calls_together = failures, reward_timeout, calls_together
        self.make_bar, self.acceleration, self.times = make_bar, acceleration, times

    @torch.no_grad()
    def sample_and_score(
        self,
        scorers: Sequence[RewardScorer],
        batches: Iterator[SampleBatch],
        rounds: int,
        num_images: int,
        trainer_state: Any,
        deliver: Callable[[Samples], None],
        max_waiting: int | None = None,
        measure: Callable[[SampleBatch, Tensor], Tensor] | None = None,
        sde: SDEWindow | None = None,
    ) -> None:
        """
        Sample and score batch by batch. A failure that ends the run does so before more is sampled.

        Args:
            scorers (`Sequence[RewardScorer]`):
                The rewards to ask.
            batches (`Iterator[SampleBatch]`):
                This process's batches, each made when its turn comes.
            rounds (`int`):
                The largest number of batches that any process has.
            num_images (`int`):
                Number of images of this process.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.
            deliver (`Callable[[Samples], None]`):
                Called with each scored batch, in their order.
            max_waiting (`int`, *optional*):
                How many batches may wait for their scores while the next one is sampled; beyond it the first of them
                is waited for. By default any number, and scores are waited for at the end only.
            measure (`Callable[[SampleBatch, Tensor], Tensor]`, *optional*):
                Called with each batch and its latents as soon as it is sampled, with the weights that sampled it; its
                result, with one row per sample, becomes `Samples.measured`.
            sde ([`~trl_marble.sde.SDEWindow`], *optional*):
                Solver steps that add noise. By default there are none.

        Raises:
            [`~trl_marble.rewards.RewardError`]: If a reward returned something that is not a score, or failed and the
                failure policy is to raise.
            `FloatingPointError`: If latents are not finite and the failure policy is to raise.
        """
        with RewardRequests(scorers, self.failures, self.reward_timeout) as requests:
            waiting: deque[tuple[Tensor, list[Sample], Tensor, Tensor | None, Transitions | None]] = deque()

            def deliver_next(deadline: float | None) -> None:
                latents, images, finite, measured, transitions = waiting.popleft()
                deliver(Samples(latents, images, finite, requests.collect_next(deadline), measured, transitions))

            with self.make_bar("rollout", num_images) as bar:
                for _ in range(rounds):
                    with self.together.phase(exchanges=self.calls_together, ask=False):
                        batch = next(batches, None)
                        if batch is not None:
                            latents, images, finite, transitions = self._sample(batch, sde)
                            measured = None
                            if measure is not None:
                                measured = self._check_measured(measure(batch, latents), finite)
                            waiting.append((latents, images, finite, measured, transitions))
                            requests.ask(images, batch.prompts, batch.columns, finite, trainer_state)
                    # Here processes learn of each other's failures, so that none of them goes on when one has failed.
                    with self.together.phase(), reward_advice():
                        while waiting and requests.next_is_done:  # before a later one may end the run
                            deliver_next(None)
                        requests.raise_failures()
                        while max_waiting is not None and len(waiting) > max_waiting:
                            deliver_next(self._deadline())
                    if batch is not None:
                        bar.update(len(batch.prompts))
            waiting_time = nullcontext() if self.times is None else self.times.measure("waiting")
            with waiting_time, self.together.phase(), reward_advice(), self.make_bar("rewards", num_images) as bar:
                deadline = self._deadline()
                bar.update(num_images - sum(len(images) for _, images, *_ in waiting))
                while waiting:
                    bar.update(len(waiting[0][1]))
                    deliver_next(deadline)
                for scorer in scorers:
                    scorer.release()

    def score_sets(self, scorer: RewardScorer, own: SetImages, trainer_state: Any) -> Scores:
        """
        Ask the rewards that compare images. All processes call it.

        Args:
            scorer ([`~trl_marble.rewards.RewardScorer`]):
                The rewards.
            own ([`SetImages`]):
                This process's images.
            trainer_state ([`~transformers.TrainerState`]):
                Passed on to the rewards.

        Returns:
            [`~trl_marble.rewards.Scores`]: of this process's images; NaN in the rows of the other rewards.
        """
        waiting_time = nullcontext() if self.times is None else self.times.measure("waiting")
        with waiting_time, reward_advice():
            return score_sets(scorer, own, trainer_state, self.failures, self.together)

    def _deadline(self) -> float | None:
        return None if self.reward_timeout is None else time.monotonic() + self.reward_timeout

    def _sample(
        self, batch: SampleBatch, sde: SDEWindow | None
    ) -> tuple[Tensor, list[Sample], Tensor, Transitions | None]:
        device = self.flow.device
        # Solvers that draw noise at every step draw it from the global generator. With the seed of an image that noise
        # would be the image's initial noise again.
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), mixing(self.flow, batch.shares):
            torch.manual_seed(derive_seed(batch.seeds[0], Draw.SOLVER))
            rollout = self.flow.rollout(
                batch.conditioning,
                batch.seeds,
                self.num_inference_steps,
                times=self.times,
                acceleration=self.acceleration,
                sde=sde,
            )
        is_finite = rollout.latents.flatten(1).isfinite().all(dim=1)
        keep = is_finite.view(-1, *[1] * (rollout.latents.ndim - 1))
        finite = is_finite.cpu()
        if not finite.all() and self.failures.raises_nonfinite:
            first = batch.prompts[finite.tolist().index(False)]
            raise FloatingPointError(
                f"The latents of {int((~finite).sum())} of {len(finite)} images that were sampled together are not "
                f"finite, first for the prompt {first!r}. {CAUSES} To leave such images out instead, set "
                f"{self.failures.how_to_leave_out_nonfinite}."
            )
        transitions = rollout.transitions
        if transitions is not None:
            transitions = transitions.without(~is_finite)
        return torch.where(keep, rollout.latents, 0.0), list(rollout.images), finite, transitions

    def _check_measured(self, measured: Tensor, finite: Tensor) -> Tensor:
        """NaN for samples without finite latents, and for those that something infinite was measured of."""
        measured = measured.masked_fill(~finite.view(-1, *[1] * (measured.ndim - 1)), torch.nan)
        overflowed = finite & ~measured.flatten(1).isfinite().all(dim=1)
        if overflowed.any() and self.failures.raises_nonfinite:
            raise FloatingPointError(
                f"The velocities of {int(overflowed.sum())} of {len(finite)} noised images are not finite. {CAUSES} "
                f"To leave such images out instead, set {self.failures.how_to_leave_out_nonfinite}."
            )
        return measured.masked_fill(~measured.isfinite(), torch.nan)
