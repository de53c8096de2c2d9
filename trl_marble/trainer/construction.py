# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The components of a trainer, made from its settings."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig
from torch import Tensor, nn
from transformers.utils import logging

from ..balance import (
    BalanceSchedule,
    ProgressWeights,
    aggregate_advantages,
    get_weighting,
    weighted_sum_weights,
)
from ..checkpoint.run_state import base_fingerprint
from ..checkpoint.tensor_tree import copy_tree
from ..data import RepeatPromptSampler
from ..evaluation.policy_evaluation import PolicyEvaluator
from ..evaluation.prompt_sets import evaluation_sets, set_label
from ..losses import LOSSES, NoRewardLoss, PolicyLoss, build_loss
from ..metrics import MetricBuffer
from ..pipelines import (
    Acceleration,
    FlowPipeline,
    PolicyWeights,
    Teacher,
    add_trainable_adapter,
    edits_images,
    load_teachers,
    lora_config,
    measured_linears,
    place_base,
    verify_acceleration,
)
from ..pipelines.embedding_cache import in_chunks
from ..pipelines.mixing import add_mixed_adapter
from ..processes import FailingTogether
from ..progress import MakeBar
from ..rewards import RewardScorer
from ..rewards.held_out import held_out_scorer
from ..rewards.no_rewards import NoRewards
from ..rewards.protocol import check_media, reward_center
from ..rewards.signatures import check_signatures
from ..rollout import (
    BaseImageSettings,
    BatchLayout,
    FailurePolicy,
    ProgressMeter,
    RewardLearning,
    RolloutSampler,
    RolloutSettings,
    RolloutSource,
)
from ..step_times import StepTimes
from ..update import BalanceSettings, KLControl, NonFiniteGuard, PolicyUpdate, StepGradient, Teaching, TimeGrid
from ..update.micro_steps import draw_micro_steps
from .balance_slider import share_draws
from .marble_config import MarbleConfig
from .teachers import assign_teachers


logger = logging.get_logger(__name__)
EMBEDDINGS = Path(HF_HOME) / "trl_marble" / "embeddings"


def default_config(pipeline: Any) -> MarbleConfig:
    """A configuration with an output folder named after the pipeline."""
    name = Path(type(pipeline).__name__ if isinstance(pipeline, DiffusionPipeline) else pipeline)
    return MarbleConfig(f"{name.absolute().name}-marble")


def check_weighting(weighting: Any, args: MarbleConfig) -> None:
    """
    See that a weighting that the trainer is given is used.

    Raises:
        `TypeError`: If it is not callable.
        `ValueError`: If the settings have it, or nothing is weighted.
    """
    if weighting is None:
        return
    if not callable(weighting):
        raise TypeError(
            f"`weighting` is {weighting!r}; the trainer takes a callable, and `MarbleConfig(weighting=...)` a name."
        )
    if args.multi_objective_aggregation != "marble":
        raise ValueError(
            f"`weighting` has no effect with `multi_objective_aggregation={args.multi_objective_aggregation!r}`; "
            "leave one of the two out."
        )
    if args.weighting != "mgda":
        raise ValueError(
            f"The trainer has a `weighting` of its own and `MarbleConfig` has {args.weighting!r}; leave one "
            "of the two out."
        )


def build_scorers(reward_funcs: Any, eval_reward_funcs: Any, args: MarbleConfig) -> list[RewardScorer]:
    """
    What calls the rewards: those that are trained on, and the held-out ones where there are any.

    Raises:
        `ValueError`: If `reward_weights`, `reward_priorities`, `reward_targets` or `reward_bounds` does not have one
            value per reward, a held-out reward is trained on or learns, a reward learns whose progress would be
            measured, or `progress_base_images` or `resample_silent_prompts` does not fit a reward that compares
            images.
    """
    # An empty list is refused by the scorer; without teachers so is `None`, which is said later.
    scorer = NoRewards() if reward_funcs is None else RewardScorer(reward_funcs, args.reward_timeout)
    for setting, what in (
        ("reward_weights", "weight"),
        ("reward_priorities", "priority"),
        ("reward_targets", "target (or `None`)"),
        ("reward_bounds", "bound (or `None`)"),
    ):
        values = getattr(args, setting)
        if values is not None and len(values) != len(scorer):
            raise ValueError(
                f"`{setting}` has {len(values)} values ({values}) for {len(scorer)} rewards "
                f"({', '.join(scorer.names)}); pass one {what} per reward, in their order."
            )
    sets = [name for name, scope in zip(scorer.names, scorer.scopes, strict=True) if scope != "image"]
    if sets and args.multi_objective_aggregation == "progress" and args.progress_base_images != args.num_generations:
        raise ValueError(
            f"`progress_base_images={args.progress_base_images}` and `num_generations={args.num_generations}` differ, "
            f"and what a reward that compares images says, such as `{sets[0]}`, depends on how many it compares. Set "
            f"`progress_base_images={args.num_generations}`."
        )
    if scorer.learners and args.multi_objective_aggregation == "progress":
        learner = scorer.names[next(iter(scorer.learners))]
        raise ValueError(
            f"`multi_objective_aggregation='progress'` compares scores with those of the base model's images from the "
            f"start of the run, and the reward `{learner}` learns: its scores then and now are not of one reward. Use "
            "'marble' or another aggregation, or leave the reward out."
        )
    for name, scope in zip(scorer.names, scorer.scopes, strict=True):
        if scope == "batch" and args.resample_silent_prompts:
            raise ValueError(
                f"`resample_silent_prompts={args.resample_silent_prompts}` samples a part of the generation batch "
                f"again, and the reward `{name}` (`scope = 'batch'`) compares all of its images; leave one of the two "
                "out."
            )
    held_out = held_out_scorer(eval_reward_funcs, reward_funcs, scorer)
    scorers = [scorer] if held_out is None else [scorer, held_out]
    for each in scorers:
        each.to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    return scorers


def build_prompt_sampler(
    dataset: Dataset, source_weights: dict[str, float] | None, args: MarbleConfig
) -> RepeatPromptSampler:
    """What chooses the prompts of generation batches."""
    return RepeatPromptSampler(
        num_prompts=len(dataset),
        num_generations=args.num_generations,
        prompts_per_batch=args.prompts_per_generation,
        num_repeats=args.steps_per_generation * args.num_iterations,
        seed=args.seed if args.data_seed is None else args.data_seed,
        # [:] makes a list of the column, which is much faster to read.
        sources=None if source_weights is None else dataset["source"][:],
        source_weights=source_weights,
    )


def build_flow(pipeline: DiffusionPipeline, args: MarbleConfig) -> FlowPipeline:
    """
    The pipeline with the settings of the rollouts.

    Raises:
        `ValueError`: If it cannot have them.
    """
    flow = FlowPipeline(
        pipeline,
        args.height,
        args.width,
        args.guidance_scale,
        args.max_sequence_length,
        num_frames=args.num_frames,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
        reference_guidance_scale=args.reference_guidance_scale,
    )
    if args.policy_loss == "grpo" and flow.is_guided:
        raise ValueError(
            f"`policy_loss='grpo'` needs the velocity that the rollouts follow, and with "
            f"`guidance_scale={args.guidance_scale}` they follow a guided one, which is not trained; set "
            "`guidance_scale=1.0`."
        )
    return flow


def add_adapters(
    flow: FlowPipeline, peft_config: LoraConfig | None, teachers: Sequence[Teacher], parts: int | None
) -> tuple[dict[str, nn.Parameter], dict[str, Any]]:
    """
    Add the adapter that is trained, with a number of parts where it has some, and load the teachers.

    Returns:
        `tuple`: The trainable weights by name, and what describes the frozen ones, ready for JSON: the base model and
        the teachers.

    Raises:
        `ValueError`: If one of them does not fit the pipeline.
    """
    pipeline = flow.pipeline
    if parts is not None:
        trainable = add_mixed_adapter(flow, peft_config, parts)
    else:
        trainable = dict(add_trainable_adapter(pipeline, peft_config or lora_config(pipeline)))
    base_model = base_fingerprint(pipeline.transformer)
    # `None` is what a checkpoint from before there were teachers has.
    return trainable, {"base_model": base_model, "teachers": load_teachers(pipeline, teachers) or None}


def check_prompts(
    flow: FlowPipeline,
    scorers: Sequence[RewardScorer],
    train_dataset: Dataset,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> bool:
    """
    See that the pipeline, the rewards and the prompt sets fit together.

    Returns:
        `bool`: Whether the pipeline edits the images of the prompt sets.

    Raises:
        `ValueError`: If they do not.
    """
    edits = edits_images(flow, train_dataset, "train_dataset")
    output = flow.family.output
    for scorer in scorers:
        check_media(scorer.funcs, scorer.names, output, type(flow.pipeline).__name__)
    trained = scorers[0]
    check_signatures(trained.funcs, trained.names, output, train_dataset.column_names, "train_dataset")
    for name, prompts in evaluation_sets(eval_dataset).items():
        check_evaluation_prompts(flow, scorers, prompts, name)
    if len(scorers) > 1 and eval_dataset is None:
        logger.warning(
            f"Held-out rewards ({', '.join(scorers[1].names)}) are scored in evaluations only, and there is no "
            "`eval_dataset`: pass one to the trainer, or to `evaluate`."
        )
    return edits


def check_evaluation_prompts(
    flow: FlowPipeline, scorers: Sequence[RewardScorer], prompts: Dataset, name: str | None
) -> bool:
    """See that rewards can score a prompt set; whether the pipeline edits its images."""
    if scorers[0].learners and not any(scorer.fixed_names for scorer in scorers):
        raise ValueError(
            f"There is nothing to evaluate on {set_label(name)}: all rewards learn ({', '.join(scorers[0].names)}), "
            "and evaluations leave those out. Pass `eval_reward_funcs`, or no `eval_dataset`."
        )
    edits = edits_images(flow, prompts, set_label(name))
    for scorer in scorers:
        check_signatures(scorer.funcs, scorer.names, flow.family.output, prompts.column_names, set_label(name))
    return edits


def cache_embeddings(
    flow: FlowPipeline, train_dataset: Dataset, eval_dataset: Dataset | dict[str, Dataset] | None, args: MarbleConfig
) -> None:
    """
    With `cache_embeddings`, encode all prompts that are not on disk yet, and drop the text encoders. Each process
    encodes its share.

    Raises:
        `ValueError`: If the pipeline takes no embeddings.
    """
    if not args.cache_embeddings:
        return
    flow.cache_embeddings(EMBEDDINGS, args.device)
    sets = [train_dataset, *evaluation_sets(eval_dataset).values()]
    prompts = dict.fromkeys(prompt for prompts in sets for prompt in prompts["prompt"][:])
    prompts |= {flow.family.empty_prompt: None}  # with which the time grid is found
    with FailingTogether().phase():
        for chunk in in_chunks(list(prompts)[args.process_index :: args.world_size]):
            flow.encode(chunk)
    flow.drop_text_encoders()


def place_pipeline(flow: FlowPipeline, trainable: Mapping[str, Any], args: MarbleConfig) -> None:
    """
    Bring a pipeline with its adapter to where it is trained, see [`~trl_marble.pipelines.place_base`].

    Raises:
        `ValueError`: If it cannot be sharded, is of an unknown class and its velocities are wrong, or cannot sample
            with `rollout_attention_backend` or `rollout_cache`.
    """
    if args.shard_base and flow.splits_batches:
        raise ValueError(
            "`shard_base=True` needs processes that call the transformer equally often, and "
            f"{type(flow.pipeline).__name__} is called once for every different time of a micro-batch. Set "
            "`shard_base=False`."
        )
    place_base(
        flow,
        trainable.values(),
        args.device,
        shards=args.base_is_sharded,
        offloads=args.offload_components,
        compile_backend=args.torch_compile_backend,  # `torch_compile` sets it, and is set by it
        compile_mode=args.torch_compile_mode,
    )
    if (acceleration := args.build_acceleration()) is not None:
        verify_acceleration(flow, acceleration, args.num_inference_steps)


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


def _build_layout(args: MarbleConfig) -> BatchLayout:
    """How a generation batch is cut into optimizer steps and micro-batches."""
    return BatchLayout(
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.steps_per_generation,
        args.num_iterations,
    )


def build_source(
    sampler: RolloutSampler,
    scorer: RewardScorer,
    dataset: Dataset,
    edits: bool,
    accelerator: Accelerator,
    metrics: MetricBuffer,
    args: MarbleConfig,
    teachers: Sequence[Teacher] = (),
) -> RolloutSource:
    """What makes generation batches."""
    loss = build_policy_loss(args, has_rewards=len(scorer) > 0)
    reward_weights = torch.tensor(args.reward_weights or [1.0] * len(scorer))
    batch_centred = torch.tensor([reward_center(func) == "batch" for func in scorer.funcs])
    meter = _build_meter(sampler, scorer, dataset, edits, accelerator, metrics, args)

    def compute_advantages(rewards: Tensor, groups: Tensor, shares: Tensor | None = None) -> Tensor:
        if len(rewards) == 0:
            return rewards
        weights = reward_weights if shares is None else reward_weights[:, None] * shares.T
        if meter is not None:
            rewards, weights = meter.weights.in_units_of_scales(rewards), meter.weights.weights
        mode, scale = args.multi_objective_aggregation, args.scale_rewards
        return aggregate_advantages(rewards, groups, weights, mode, scale, args.advantage_clip, batch_centred)

    return RolloutSource(
        sampler,
        scorer,
        dataset,
        _build_layout(args),
        RolloutSettings(
            args.seed,
            args.num_generations,
            args.rollout_batch_size,
            edits,
            int(args.resample_silent_prompts),
            share_draws(args, len(scorer)),
        ),
        compute_advantages,
        functools.partial(_compare_with_sum, reward_weights=reward_weights, args=args),
        accelerator,
        metrics,
        meter,
        functools.partial(loss.window, num_steps=args.num_inference_steps, seed=args.seed),
        functools.partial(assign_teachers, teachers) if teachers else None,
        RewardLearning(scorer, sampler.together, copy_tree) if scorer.learners else None,
    )


def _build_meter(
    sampler: RolloutSampler,
    scorer: RewardScorer,
    dataset: Dataset,
    edits: bool,
    accelerator: Accelerator,
    metrics: MetricBuffer,
    args: MarbleConfig,
) -> ProgressMeter | None:
    """What compares generation batches with the base model, where their weights come from that."""
    if args.multi_objective_aggregation != "progress":
        return None
    weights = ProgressWeights(
        scorer.names,
        args.progress_temperature,
        args.progress_ema,
        args.reward_targets,
        args.reward_bounds,
        args.reward_priorities,
    )
    settings = BaseImageSettings(args.seed, args.progress_base_images, args.rollout_batch_size, edits)
    return ProgressMeter(weights, sampler, scorer, dataset, settings, accelerator, metrics)


def _compare_with_sum(rewards: Tensor, taught: Tensor, reward_weights: Tensor, args: MarbleConfig) -> Tensor:
    """
    How "weighted sum of the raw rewards, then one advantage" would mix the per-reward gradients, and add those of
    teachers: `[K + T]`. Without teachers the common scale is left open.
    """
    scales = args.scale_rewards != "none"
    of_teachers = args.teacher_weight * (~taught.isnan()).float().mean(dim=1)
    if len(rewards) == 0:
        return of_teachers
    valid = ~rewards.isnan()
    stds = torch.ones(len(rewards))
    if scales:
        rows = [row[keep] for row, keep in zip(rewards, valid, strict=True)]
        stds = torch.tensor([row.std(correction=0).item() if len(row) else 0.0 for row in rows])
    of_rewards = weighted_sum_weights(reward_weights, stds, valid.sum(dim=1))
    if len(taught) > 0:
        sums = (reward_weights[:, None] * rewards).nansum(dim=0)[valid.any(dim=0)]
        scale = (reward_weights.abs() * stds * valid.sum(dim=1)).sum() / max(1, len(sums))
        of_rewards = of_rewards * scale / (sums.std(correction=0).clamp_min(1e-4) if scales else 1.0)
    return torch.cat([of_rewards, of_teachers.to(of_rewards)])


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
    """What turns a generation batch into directions."""
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
    _check_regularizer_fraction(args, layout.micro_batches_per_update * grid.per_sample)
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


def _check_regularizer_fraction(args: MarbleConfig, num_micro_steps: int) -> None:
    """Refuse a fraction of an optimizer step's micro-steps that is all of them."""
    fraction = args.regularizer_fraction
    if fraction in (1.0, MarbleConfig.regularizer_fraction):  # the default need not fit every step
        return
    if len(draw_micro_steps(fraction, num_micro_steps, seed=0)) < num_micro_steps:
        return
    steps = "1 micro-step" if num_micro_steps == 1 else f"{num_micro_steps} micro-steps"
    raise ValueError(
        f"`regularizer_fraction={fraction}` has no effect: an optimizer step has {steps} (one for each timestep of "
        "each micro-batch), and that part of them, rounded, is all of them. Leave it out, or choose a smaller "
        "`per_device_train_batch_size` and more `gradient_accumulation_steps`."
    )
