# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How often an optimizer step passes an image through the transformer, from the settings alone."""

from dataclasses import dataclass
from functools import cache, partial

import torch

from ..balance import BalanceSchedule, old_policy_decay
from ..losses import FrozenVelocities, Groups, PolicyLoss, Sampled, StepCounts
from ..sde import Transitions
from ..trainer import MarbleConfig
from ..trainer.construction import build_policy_loss
from ..update.random_part import draw_fraction


UNBOUNDED_STEPS = 1000  # over which the mean is taken where `max_steps` is not set


@dataclass(frozen=True)
class StepPasses:
    """
    Passes of an optimizer step, the mean over a run. A pass is one image through the transformer once.

    Args:
        rollout (`float`):
            Forward passes that sample images.
        base_images (`float`):
            Forward passes that sample the base model's images.
        old, reference, trained (`float`):
            Forward passes of the old policy, the base model and the trained policy in the update.
        backward (`float`):
            Backward passes.
        checkpointed (`bool`):
            Whether each backward pass has a forward pass of its own, which recomputes the activations.
        teachers (`float`, *optional*, defaults to `0.0`):
            Forward passes of teachers in the update.
    """

    rollout: float
    base_images: float
    old: float
    reference: float
    trained: float
    backward: float
    checkpointed: bool
    teachers: float = 0.0

    @property
    def forward(self) -> float:
        """All forward passes."""
        recomputed = self.backward if self.checkpointed else 0
        return self.rollout + self.base_images + self.old + self.reference + self.teachers + self.trained + recomputed

    @property
    def total(self) -> float:
        """All passes."""
        return self.forward + self.backward


def compute_passes(
    args: MarbleConfig,
    num_processes: int,
    classifier_free: bool,
    num_rewards: int,
    num_prompts: int | None = None,
    weighted_rows: bool = True,
    num_lessons: int = 0,
    num_teachers: int = 0,
) -> StepPasses:
    """
    The passes of a step, on all processes together.

    Args:
        args ([`~trl_marble.MarbleConfig`]):
            The settings of one process that does the work of all: with `num_processes` times the accumulation.
        num_processes (`int`):
            Processes that share the work.
        classifier_free (`bool`):
            Whether guidance calls the transformer twice for each image, with a prompt and without.
        num_rewards (`int`):
            K.
        num_prompts (`int`, *optional*):
            Prompts of the prompt set. By default every prompt that is drawn is taken to be new to the run.
        weighted_rows (`bool`, *optional*, defaults to `True`):
            Whether per-reward gradients take one backward pass for each term of the loss, as in most families; else
            they take one for each reward.
        num_lessons (`int`, *optional*, defaults to `0`):
            Most teachers that any sample has: those of single sources count as one. Every sample is taken to have as
            many.
        num_teachers (`int`, *optional*, defaults to `0`):
            T.
    """
    loss = build_policy_loss(args, has_rewards=num_rewards > 0)
    preset = args.old_policy_schedule
    schedule = BalanceSchedule(num_rewards + num_teachers, args.balance_every, args.balance_ema)
    per_sample = loss.num_times(args.num_inference_steps, args.timestep_fraction)
    micro_steps = args.gradient_accumulation_steps // num_processes * per_sample
    updates = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
    penalized = _share(args.regularizer_fraction, per_sample)
    streamed = _share(args.balance_fraction, micro_steps)
    base_calls = 2 if classifier_free and (args.reference_guidance_scale or 1) > 1 else 1
    sums = {"old": 0.0, "reference": 0.0, "trained": 0.0, "backward": 0.0}
    steps = args.max_steps if args.max_steps > 0 else UNBOUNDED_STEPS
    objectives = cache(partial(_objectives, loss))
    for step in range(steps):
        # The old policy follows after each generation batch; at decay 0 it is the trained policy again.
        batch_start = step - step % updates
        lags = step > batch_start or (batch_start > 0 and old_policy_decay(batch_start, *preset) > 0)
        reads_old = lags and "old" in loss.needs
        ahead = "group" in loss.needs and (reads_old or "reference" in loss.needs or "old" not in loss.needs)
        reads = frozenset[str]() if ahead else loss.needs
        sums["old"] += ahead and reads_old
        sums["reference"] += ahead and "reference" in loss.needs
        sums["trained"] += 1 + ahead
        measured = 0.0
        if args.balances_gradients and schedule.is_due(step):
            measured = 1.0 if step == 0 else streamed
        for share, has_penalties in ((penalized, True), (1 - penalized, False)):
            old = lags and ("old" in reads or (has_penalties and loss.penalties.old > 0))
            reference = "reference" in reads or (has_penalties and loss.penalties.reference > 0)
            rows = num_rewards + num_teachers
            if weighted_rows:
                rows = num_lessons + objectives(old, ahead, has_penalties and (reference or old))
            sums["old"] += share * old
            sums["reference"] += share * reference
            sums["backward"] += share * (measured * rows + 1 - measured)
    sums["reference"] *= base_calls
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * per_sample
    solver_passes = args.num_inference_steps * (2 if classifier_free and args.guidance_scale > 1 else 1)
    new_prompts = args.prompts_per_generation / updates  # in a step; each has images of the base model once in a run
    if num_prompts is not None:
        new_prompts = min(new_prompts, num_prompts / steps)
    base_images = args.progress_base_images if args.multi_objective_aggregation == "progress" else 0
    return StepPasses(
        rollout=args.generation_batch_size * solver_passes / updates,
        base_images=new_prompts * base_images * solver_passes,
        **{name: total / steps * samples for name, total in sums.items()},
        checkpointed=bool(args.activation_checkpointing),
        teachers=num_lessons * samples,
    )


def _share(fraction: float, total: int) -> float:
    """The part of them that [`~trl_marble.update.random_part.draw_fraction`] draws."""
    return len(draw_fraction(fraction, total, seed=0)) / total


def _objectives(loss: PolicyLoss, has_old: bool, ahead: bool, has_penalties: bool) -> int:
    """The weighted backward passes of a micro-step: what the loss itself makes of one sample."""
    velocity = torch.zeros(1, 1, requires_grad=True)
    zeros = torch.zeros(1, 1)
    times, frozen = torch.tensor([1.0, 0.5, 0.0]), FrozenVelocities(zeros if has_old else None)
    sampled = Sampled(zeros, Transitions(torch.zeros(1, 2, 1), times, 0))
    drawn = next(loss.draw(sampled, times[:1], 1, [torch.Generator()]))
    terms = loss.terms(velocity, drawn, frozen)
    compared = torch.zeros(len(terms), 1, 1) if ahead else None
    groups = Groups(torch.zeros(1, dtype=torch.int64), zeros[None], compared)
    counts = StepCounts(torch.ones(1), torch.ones(()), 1, groups)
    acting = len(loss.coefficients(terms, zeros, counts))
    shared = loss.shared(velocity, terms, frozen, torch.ones(1, dtype=torch.bool), counts)
    return acting + (has_penalties or (shared is not None and shared.requires_grad))
