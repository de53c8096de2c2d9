# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What turns a generation batch into directions: the loss, and the update."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ...balance import BalanceSchedule, get_weighting
from ...losses import LOSSES, NoRewardLoss, PolicyLoss, build_loss
from ...metrics import MetricBuffer
from ...pipelines import PolicyWeights, Teacher, measured_linears
from ...progress import MakeBar
from ...rollout import BatchLayout
from ...step_times import StepTimes
from ...update import BalanceSettings, KLControl, NonFiniteGuard, PolicyUpdate, StepGradient, Teaching, TimeGrid
from ...update.random_part import draw_fraction
from ..balance_slider import share_draws
from ..marble_config import MarbleConfig


def build_policy_loss(args: MarbleConfig, has_rewards: bool = True) -> PolicyLoss:
    """The loss that `policy_loss` names, where there are rewards."""
    if not has_rewards:
        return NoRewardLoss(args.beta, args.teacher_states == "trajectory")
    settings = vars(args)
    if not args.balances_gradients:  # there is one loss, and nothing to take out of it
        settings = settings | {"balance_on": "loss"}
    return build_loss(LOSSES[args.policy_loss], settings)


def build_update(
    weights: PolicyWeights,
    loss: PolicyLoss,
    schedule: BalanceSchedule,
    weighting: Callable[[Tensor], Tensor] | None,
    reward_names: list[str],
    layout: BatchLayout,
    edits: bool,
    accelerator: Accelerator,
    metrics: MetricBuffer,
    make_bar: MakeBar,
    times: StepTimes,
    args: MarbleConfig,
    teachers: Sequence[Teacher] = (),
) -> PolicyUpdate:
    """What turns a generation batch into directions: the loss, and the update."""
    guard = NonFiniteGuard(args.on_nonfinite, accelerator, metrics)
    balance = linears = None
    if args.balances_gradients:
        is_equal = args.multi_objective_aggregation == "equal"
        chosen = get_weighting("equal" if is_equal else weighting or args.weighting)
        priorities = None
        if args.reward_priorities is not None:
            priorities = torch.tensor([*args.reward_priorities, *[1.0] * len(teachers)])
        names = [*reward_names, *(teacher.row for teacher in teachers)]
        balance = BalanceSettings(schedule, chosen, args.balance_fraction, names, priorities)
        linears = measured_linears(weights.flow, weights.trained, edits, args.per_device_train_batch_size)
    grid_times = weights.flow.training_times(args.num_inference_steps)
    grid = TimeGrid(grid_times, loss.num_times(len(grid_times), args.timestep_fraction))
    _check_regularizer_fraction(args, grid.per_sample)
    teaching = None
    if teachers:
        weight = None if args.balances_gradients else args.teacher_weight
        teaching = Teaching(teachers, weights, metrics, times, weight)
    return PolicyUpdate(
        loss,
        weights,
        StepGradient(accelerator, weights.parameters, linears, balance, args.seed, guard, metrics),
        guard,
        layout,
        grid,
        args.regularizer_fraction,
        args.seed,
        args.world_size,
        args.num_generations,
        metrics,
        make_bar,
        times,
        None if args.kl_target is None else KLControl(args.beta, args.kl_target),
        teaching,
        share_draws(args, len(reward_names)),
    )


def _check_regularizer_fraction(args: MarbleConfig, num_times: int) -> None:
    """Refuse a fraction of the timesteps that is all of them."""
    fraction = args.regularizer_fraction
    if fraction in (1.0, MarbleConfig.regularizer_fraction):  # the default need not fit every run
        return
    if len(draw_fraction(fraction, num_times, seed=0)) < num_times:
        return
    times = "1 timestep" if num_times == 1 else f"{num_times} timesteps"
    raise ValueError(
        f"`regularizer_fraction={fraction}` has no effect: each image is trained at {times}, and that part of them, "
        "rounded, is all of them. Leave it out, or train at more (`timestep_fraction`)."
    )
