# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What becomes of every argument that [`MarbleConfig`] inherits: it works, or it is refused with a reason."""

import inspect
import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig


class Refusal(NamedTuple):
    """
    An argument that would be without effect, or that cannot work here.

    Args:
        accepted (`tuple`):
            The values that say nothing: the default, and what `transformers` makes of it.
        reason (`str`):
            Why another value is refused, and what to use instead.
    """

    accepted: tuple[Any, ...]
    reason: str


_TOKENS = "it is about the tokens of a language model, and there are none here; leave it out"
_LABELS = "it is about labels, and rewards take their place here; leave it out"
_PREDICTION = "it is about collecting a model's predictions, and an evaluation samples and scores images"
_OWN_SAMPLER = "prompts are drawn in whole groups by a sampler of our own, seeded by `data_seed`; leave it out"
_ROW_NUMBERS = "a batch holds row numbers only, and rows are read once, when they are sampled from; leave it out"
_DDP = "gradients of the adapter are added up once an optimizer step, without DDP's machinery; leave it out"
_SCRIPTS = "it is a note for scripts, which nothing reads here"
_LAUNCH = "start plain processes, `accelerate launch --multi_gpu --num_processes N`"

REFUSED: dict[str, Refusal] = {
    # Precision and memory
    "fp16": Refusal((False,), "per-reward gradients are not loss-scaled. Use `bf16=True`"),
    "fp16_full_eval": Refusal((False,), "images are evaluated in the precision of training; set `bf16=True` for bf16"),
    "bf16_full_eval": Refusal((False,), "images are evaluated in the precision of training; set `bf16=True` for bf16"),
    "auto_find_batch_size": Refusal(
        (False,),
        "it would change the prompts of a step. Set `per_device_train_batch_size` and `rollout_batch_size` yourself",
    ),
    "torch_empty_cache_steps": Refusal(
        (None,),
        "no step empties the cache; lower `per_device_train_batch_size`, or set `activation_checkpointing=True`",
    ),
    # Language models
    "use_liger_kernel": Refusal((False,), "its kernels are for language models; see `torch_compile`"),
    "liger_kernel_config": Refusal((None,), "its kernels are for language models; see `torch_compile`"),
    "use_cache": Refusal((False,), _TOKENS),
    "neftune_noise_alpha": Refusal((None,), "it adds noise to token embeddings, and text encoders are frozen here"),
    "include_num_input_tokens_seen": Refusal(("no", False), _TOKENS),
    "average_tokens_across_devices": Refusal((True,), "a loss counts the images of all processes in any case"),
    # Labels and predictions
    "label_smoothing_factor": Refusal((0,), _LABELS),
    "label_names": Refusal((None,), _LABELS),
    "prediction_loss_only": Refusal((False,), _PREDICTION),
    "eval_do_concat_batches": Refusal((True,), _PREDICTION),
    "eval_use_gather_object": Refusal((False,), _PREDICTION),
    "eval_accumulation_steps": Refusal((None,), f"{_PREDICTION}; lower `per_device_eval_batch_size` to save memory"),
    "include_for_metrics": Refusal(([],), f"{_PREDICTION}; measure with rewards (`eval_reward_funcs`)"),
    "batch_eval_metrics": Refusal((False,), f"{_PREDICTION}; measure with rewards (`eval_reward_funcs`)"),
    # Data
    "remove_unused_columns": Refusal((False,), "it must be `False`, because rewards receive every column"),
    "train_sampling_strategy": Refusal(("random",), _OWN_SAMPLER),
    "length_column_name": Refusal(("length",), _OWN_SAMPLER),
    "dataloader_drop_last": Refusal((False,), _OWN_SAMPLER),
    "dataloader_in_order": Refusal((True,), "generation batches come in order, so that a run can be repeated"),
    "dataloader_pin_memory": Refusal((False,), _ROW_NUMBERS),
    "dataloader_num_workers": Refusal((0,), _ROW_NUMBERS),
    "dataloader_persistent_workers": Refusal((False,), _ROW_NUMBERS),
    "dataloader_prefetch_factor": Refusal((None,), _ROW_NUMBERS),
    "dataloader_multiprocessing_context": Refusal((None,), _ROW_NUMBERS),
    # How processes share the work
    "parallelism_config": Refusal((None,), f"tensor, context and pipeline parallelism are not supported; {_LAUNCH}"),
    "fsdp_config": Refusal((None, {}), f"`accelerate`'s FSDP is not supported; {_LAUNCH}, with `shard_base=True`"),
    "ddp_find_unused_parameters": Refusal((None,), _DDP),
    "ddp_bucket_cap_mb": Refusal((None,), _DDP),
    "ddp_broadcast_buffers": Refusal((None,), _DDP),
    "ddp_static_graph": Refusal((None,), _DDP),
    "local_rank": Refusal((-1,), "the launcher says which process this is, by the environment variable `LOCAL_RANK`"),
    # Saving and scripts
    "enable_jit_checkpoint": Refusal(
        (False,), "SIGTERM makes a run save its last complete optimizer step and end in any case; leave it out"
    ),
    "do_train": Refusal((False,), f"{_SCRIPTS}; call `trainer.train()`"),
    "do_predict": Refusal((False,), f"{_SCRIPTS}; call `trainer.evaluate(prompts)`"),
    "debug": Refusal(
        ("", [], None), "set `on_nonfinite` for numbers that are not finite; its default names where they arose"
    ),
    "logging_nan_inf_filter": Refusal(
        (False,),
        "it would wait for the device after every micro-batch; set `on_nonfinite` for losses that are not finite",
    ),
    "optim_target_modules": Refusal((None,), "it is of GaLore and APOLLO, which are not supported; leave it out"),
}

# What the training loop of `transformers`, its callbacks, or this package itself reads; some of it under conditions
# that `check_combinations` and `MarbleConfig` check.
WORKS: frozenset[str] = frozenset(
    """
    output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps
    gradient_accumulation_steps max_grad_norm learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    bf16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_cpu
    logging_strategy logging_steps logging_first_step log_on_each_node log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start do_eval
    save_only_model save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    resume_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    full_determinism seed data_seed accelerator_config ddp_backend ddp_timeout fsdp deepspeed
    """.split()
)

ACCELERATOR_CONFIG: dict[str, Refusal] = {
    "split_batches": Refusal((False,), "a batch is the part of one process already; leave it out"),
    "dispatch_batches": Refusal(
        (None, False), "every process reads its own rows, which are not tensors; leave it out"
    ),
    "even_batches": Refusal((True,), _OWN_SAMPLER),
    "use_seedable_sampler": Refusal((True,), _OWN_SAMPLER),
    "non_blocking": Refusal((False,), _ROW_NUMBERS),
    "gradient_accumulation_kwargs": Refusal((None,), "set `gradient_accumulation_steps`"),
}

# Optimizers that take steps of their own or look at more than the adapter's gradients; by how their names begin.
_REFUSED_OPTIMIZERS = {
    "galore": "it projects the gradients of full weights, and those of a LoRA are of low rank already",
    "apollo": "it projects the gradients of full weights, and those of a LoRA are of low rank already",
    "lomo": "it takes its steps inside the backward pass, before the rewards' gradients are balanced",
    "adalomo": "it takes its steps inside the backward pass, before the rewards' gradients are balanced",
    "schedule_free": "it averages the weights itself, which `weight_ema_decay` does here",
}
_READ_OPTIM_ARGS = ("ademamix", "rmsprop", "anyprecision", "sgd", "adagrad", "grokadamw", "_4bit", "_8bit", "stable")


def check_arguments(args: TrainingArguments) -> None:
    """
    Refuse what cannot work, or would be without effect, whatever else is set.

    Args:
        args ([`~transformers.TrainingArguments`]):
            As they were given, before `transformers` looks at them.

    Raises:
        `ValueError`: With the value, the reason, and what to use instead.
    """
    for name, refusal in REFUSED.items():
        value = getattr(args, name)
        if value not in refusal.accepted:
            raise ValueError(f"`{name}={value!r}` is not supported: {refusal.reason}.")


def check_combinations(args: Any) -> None:
    """
    Refuse values out of range, and settings that have no effect beside others.

    Args:
        args ([`~transformers.TrainingArguments`]):
            As `transformers` has completed them.

    Raises:
        `ValueError`: With the values, the reason, and what to use instead.
    """
    _check_ranges(args)
    for name in ("activation_checkpointing_kwargs", "lr_scheduler_kwargs"):
        if (value := getattr(args, name)) is not None and not isinstance(value, Mapping):
            raise ValueError(f"`{name}` is {value!r}; pass a mapping of names to values, in JSON on the command line.")
    if "no" in args.report_to:
        raise ValueError("`report_to` is 'no', which is no tracker; set `report_to='none'` to report to none.")
    _check_optimizer(args)
    _check_schedule(args)
    _check_checkpointing(args)
    _check_evaluation(args)
    _check_accelerator_config(args.accelerator_config)
    strategies = ((args.save_strategy, "save_steps", 50), (args.logging_strategy, "logging_steps", 1))
    for strategy, name, default in strategies:
        if strategy not in ("steps", "no") and getattr(args, name) != default:  # "no" is said on purpose
            kind = name.partition("_")[0]
            _refuse(args, name, f"`{kind}_strategy='{strategy.value}'`", f"set `{kind}_strategy='steps'`")
    if args.max_steps > 0 and args.num_train_epochs != 3:
        _refuse(args, "num_train_epochs", f"`max_steps={args.max_steps}`", "leave one of the two out")
    if not args.push_to_hub:
        for name, usual in (("hub_strategy", "every_save"), ("hub_always_push", False)):
            if getattr(args, name) != usual:
                _refuse(args, name, "`push_to_hub=False`", "set `push_to_hub=True` to push at each save")
    if "trackio" not in args.report_to:
        for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
            if getattr(args, name) is not None:
                _refuse(args, name, f"`report_to={args.report_to}`", "set `report_to='trackio'`")


def _refuse(args: Any, name: str, beside: str, instead: str) -> None:
    value = getattr(args, name)
    value = getattr(value, "value", value)  # of an enumeration
    beside = f" with {beside}" if beside else ""
    raise ValueError(f"`{name}={value!r}` has no effect{beside}; {instead}.")


def _check_ranges(args: Any) -> None:
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"):
        value = getattr(args, name)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            off = " (0 does not clip)" if name == "max_grad_norm" else ""
            raise ValueError(f"`{name}` is {value!r}; it must be a finite number of at least 0{off}.")
    if args.adam_epsilon == 0:
        raise ValueError(
            "`adam_epsilon` is 0; a weight without a gradient would become 0 / 0. Set a small number above 0."
        )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; it must be in [0, 1).")
    if not isinstance(args.max_steps, Integral):
        raise ValueError(f"`max_steps` is {args.max_steps!r}; it must be an integer.")
    for name, strategy in (("save_steps", args.save_strategy), ("eval_steps", args.eval_strategy)):
        if strategy == "steps" and not 0 < getattr(args, name) < math.inf:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}; it must be above 0: a number of optimizer steps, or below 1 a "
                f"fraction of the run. Set `{name.partition('_')[0]}_strategy='no'` for never."
            )
    if args.max_steps == 0 or not 0 < args.num_train_epochs < math.inf:
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ValueError(
            f"`{name}` is {getattr(args, name)}; set the number of optimizer steps, `max_steps`, above 0."
        )


def _check_optimizer(args: Any) -> None:
    optimizer: str = args.optim.value
    for start, reason in _REFUSED_OPTIMIZERS.items():
        if optimizer.startswith(start):
            raise ValueError(f"`optim={optimizer!r}` is not supported: {reason}. Leave it out to use AdamW.")
    if args.optim_args and not any(part in optimizer for part in _READ_OPTIM_ARGS):
        _refuse(args, "optim_args", f"`optim={optimizer!r}`", "set `adam_beta1`, `weight_decay`, ... themselves")
    is_adam = "adam" in optimizer or "ademamix" in optimizer
    for name, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        reads = is_adam or ("lion" in optimizer and name != "adam_epsilon")
        if not reads and getattr(args, name) != default:
            _refuse(args, name, f"`optim={optimizer!r}`", "leave one of the two out")


def _check_schedule(args: Any) -> None:
    schedule: str = args.lr_scheduler_type.value
    if args.warmup_steps and schedule in ("constant", "reduce_lr_on_plateau", "greedy"):
        instead = "set `lr_scheduler_type='constant_with_warmup'`" if schedule == "constant" else "leave it out"
        _refuse(args, "warmup_steps", f"`lr_scheduler_type={schedule!r}`", instead)
    if args.lr_scheduler_kwargs and schedule in ("constant", "constant_with_warmup"):
        _refuse(args, "lr_scheduler_kwargs", f"`lr_scheduler_type={schedule!r}`", "leave one of the two out")
    kwargs = dict(args.lr_scheduler_kwargs or {})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:  # here, and not when everything is loaded
        get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=1, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_type={schedule!r}` cannot be made with `lr_scheduler_kwargs={kwargs}` and "
            f"`learning_rate={args.learning_rate}`: {error}. Change `lr_scheduler_kwargs`."
        ) from error


def _check_checkpointing(args: Any) -> None:
    given = args.activation_checkpointing_kwargs or {}
    if given and not args.activation_checkpointing:
        _refuse(args, "activation_checkpointing_kwargs", "", "set `activation_checkpointing=True`")
    own = [p.name for p in inspect.signature(checkpoint).parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = ["use_reentrant", "preserve_rng_state", *own]
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(
            f"`activation_checkpointing_kwargs` has {', '.join(map(repr, unknown))}, which "
            f"`torch.utils.checkpoint.checkpoint` does not know. Use some of {', '.join(dict.fromkeys(known))}."
        )


def _check_evaluation(args: Any) -> None:
    never = args.eval_strategy == "no"
    if args.eval_steps and args.eval_strategy != "steps":
        _refuse(args, "eval_steps", f"`eval_strategy='{args.eval_strategy.value}'`", "set `eval_strategy='steps'`")
    for name in ("eval_delay", "do_eval", "metric_for_best_model"):
        if getattr(args, name) and never:
            _refuse(args, name, "`eval_strategy='no'`", "set `eval_strategy='steps'` and `eval_steps`")
    if args.greater_is_better is not None and args.metric_for_best_model is None:
        _refuse(args, "greater_is_better", "`metric_for_best_model=None`", "set that, or leave it out")
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model!r} (the default where one is needed); an "
            "evaluation has no loss. Name one of its metrics, such as 'rewards/pickscore/mean'."
        )


def _check_accelerator_config(config: AcceleratorConfig) -> None:
    for name, refusal in ACCELERATOR_CONFIG.items():
        value = getattr(config, name)
        if value not in refusal.accepted:
            raise ValueError(f"`accelerator_config` has `{name}={value!r}`, which is not supported: {refusal.reason}.")
