# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What samples and scores, in training and in evaluations."""

from collections.abc import Sequence

from accelerate import Accelerator

from ...evaluation.policy_evaluation import PolicyEvaluator
from ...pipelines import Acceleration, FlowPipeline
from ...processes import FailingTogether
from ...progress import MakeBar
from ...rewards import RewardScorer
from ...rollout import FailurePolicy, RolloutSampler
from ...step_times import StepTimes
from ..marble_config import MarbleConfig


def build_sampler(
    flow: FlowPipeline, together: FailingTogether, make_bar: MakeBar, times: StepTimes, args: MarbleConfig
) -> RolloutSampler:
    """What samples and scores in training."""
    acceleration = args.build_acceleration()
    return _build_sampler(flow, args.num_inference_steps, together, make_bar, args, acceleration, times)


def build_evaluator(
    flow: FlowPipeline,
    scorers: Sequence[RewardScorer],
    accelerator: Accelerator,
    together: FailingTogether,
    make_bar: MakeBar,
    args: MarbleConfig,
) -> PolicyEvaluator:
    """What evaluates, with steps and a size of its own where the settings have them."""
    if args.evaluation_size != (args.height, args.width):
        flow = flow.with_size(*args.evaluation_size)
    sampler = _build_sampler(flow, args.evaluation_steps, together, make_bar, args)
    return PolicyEvaluator(sampler, scorers, accelerator, args.num_images_to_log)


def _build_sampler(
    flow: FlowPipeline,
    num_inference_steps: int,
    together: FailingTogether,
    make_bar: MakeBar,
    args: MarbleConfig,
    acceleration: Acceleration | None = None,
    times: StepTimes | None = None,
) -> RolloutSampler:
    return RolloutSampler(
        flow,
        together,
        num_inference_steps,
        FailurePolicy(args.reward_failure, args.on_nonfinite),
        reward_timeout=args.reward_timeout,
        calls_together=args.base_is_sharded,
        make_bar=make_bar,
        acceleration=acceleration,
        times=times,
    )
