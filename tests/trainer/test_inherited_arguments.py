# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Every argument that comes from `transformers` works or is refused, and so is every method of its trainer."""

import dataclasses
import inspect

import pytest
from trainer_helpers import prompt_set, small_config, small_trainer
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from trl_marble import MarbleConfig
from trl_marble.trainer.inherited_arguments import ACCELERATOR_CONFIG, REFUSED, WORKS


def config(**settings) -> MarbleConfig:
    return MarbleConfig("runs/test", **({"use_cpu": True} | settings))


# Values that are not the default, for arguments whose type does not say one.
OTHER = {
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["inputs"],
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "label_names": ["labels"],
    "parallelism_config": {},
    "fsdp_config": {"xla": False},
    "debug": "underflow_overflow",
    "optim_target_modules": "all-linear",
    "liger_kernel_config": {"rope": True},
    "local_rank": 0,
}
NUMBERS = ("neftune_noise_alpha", "label_smoothing_factor", "torch_empty_cache_steps", "eval_accumulation_steps")


def other_value(name: str):
    if name in OTHER:
        return OTHER[name]
    if name in (*NUMBERS, "ddp_bucket_cap_mb"):
        return 1
    return not REFUSED[name].accepted[0]


def test_every_inherited_argument_is_known() -> None:
    """A new version of `transformers` with a new argument fails here: find out what becomes of it."""
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert not WORKS & REFUSED.keys()
    assert inherited == WORKS | REFUSED.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_argument_without_effect_is_refused_with_its_value_and_a_reason(name) -> None:
    value = other_value(name)
    with pytest.raises(ValueError) as caught:
        config(**{name: value})
    message = str(caught.value)
    if name != "parallelism_config":  # refused together with the launchers of that kind
        assert f"`{name}={value!r}` is not supported: " in message and len(message) > 60


def test_the_defaults_and_copies_of_them_are_accepted() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.name in REFUSED}
    given = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    own = ("dataloader_pin_memory", "remove_unused_columns", "logging_nan_inf_filter")
    given |= dict.fromkeys(own, False)  # whose defaults are our own
    args = config(**given)
    assert dataclasses.replace(args, seed=3).seed == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"split_batches": True},
        {"dispatch_batches": True},
        {"even_batches": False},
        {"use_seedable_sampler": False},
        {"non_blocking": True},
        {"gradient_accumulation_kwargs": {"num_steps": 2}},
    ],
    ids=str,
)
def test_every_part_of_the_accelerator_config_is_known(settings) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"`accelerator_config` has `{name}=.* is not supported"):
        config(accelerator_config=settings)
    known = {f.name for f in dataclasses.fields(AcceleratorConfig)}
    assert known == ACCELERATOR_CONFIG.keys() | {"use_configured_state"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"warmup_steps": 2},
            "`warmup_steps=2` has no effect with `lr_scheduler_type='constant'`; set .*_with_warmup",
        ),
        ({"warmup_steps": 0.1}, "`warmup_steps=0.1` has no effect"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-5}}, "`lr_scheduler_kwargs=.* has no effect .*'constant'"),
        ({"eval_steps": 5}, "`eval_steps=5` has no effect with `eval_strategy='no'`; set `eval_strategy='steps'`"),
        ({"eval_delay": 5}, "`eval_delay=5` has no effect with `eval_strategy='no'`"),
        ({"do_eval": True}, "`do_eval=True` has no effect with `eval_strategy='no'`"),
        ({"metric_for_best_model": "rewards/x/mean"}, "`metric_for_best_model=.* has no effect"),
        ({"greater_is_better": True}, "`greater_is_better=True` has no effect"),
        ({"save_strategy": "epoch", "save_steps": 7}, "`save_steps=7` has no effect with `save_strategy='epoch'`"),
        ({"logging_strategy": "epoch", "logging_steps": 7}, "`logging_steps=7` has no effect"),
        ({"max_steps": 7, "num_train_epochs": 2}, "`num_train_epochs=2` has no effect with `max_steps=7`"),
        ({"optim_args": "a=1"}, "`optim_args='a=1'` has no effect with `optim='adamw_torch"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "`adam_beta1=0.8` has no effect with `optim='sgd'`"),
        ({"optim": "galore_adamw"}, "`optim='galore_adamw'` is not supported: it projects"),
        ({"optim": "lomo"}, "`optim='lomo'` is not supported: it takes its steps"),
        ({"optim": "schedule_free_adamw"}, "`weight_ema_decay`"),
        ({"activation_checkpointing_kwargs": {"a": 1}}, "set `activation_checkpointing=True`"),
        ({"activation_checkpointing_kwargs": "a"}, "is 'a'; pass a mapping"),
        ({"lr_scheduler_kwargs": "num_cycles"}, "is 'num_cycles'; pass a mapping"),
        ({"report_to": "no"}, "`report_to` is 'no'.*'none'"),
        ({"dataloader_num_workers": 2}, "`dataloader_num_workers=2` is not supported: a batch holds row numbers only"),
        ({"hub_strategy": "end"}, "`hub_strategy='end'` has no effect with `push_to_hub=False`"),
        ({"trackio_space_id": "me/x", "report_to": "none"}, "`trackio_space_id='me/x'` has no effect"),
        ({"learning_rate": -1e-4}, "`learning_rate` is -0.0001; it must be a finite number of at least 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
        ({"max_grad_norm": None}, r"`max_grad_norm` is None; .*\(0 does not clip\)"),
        ({"adam_beta2": 1.0}, r"`adam_beta2` is 1.0; it must be in \[0, 1\)"),
        ({"max_steps": 0}, "`max_steps` is 0; set the number of optimizer steps"),
        ({"learning_rate": "1e-3"}, "`learning_rate` is '1e-3'; it must be a finite number"),
        ({"adam_epsilon": 0.0}, "`adam_epsilon` is 0; a weight without a gradient"),
        ({"max_steps": 1.5}, "`max_steps` is 1.5; it must be an integer"),
        ({"num_train_epochs": float("nan")}, "`num_train_epochs` is nan"),
        ({"per_device_train_batch_size": 4.0}, "`per_device_train_batch_size` is 4.0; it must be an integer"),
        ({"save_steps": -1}, "`save_steps` is -1; it must be above 0.*`save_strategy='no'` for never"),
        ({"eval_strategy": "steps", "eval_steps": -1}, "`eval_steps` is -1; it must be above 0"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "with `lr_scheduler_kwargs={}`.*num_decay_steps"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"typo": 1}}, "cannot be made with .*'typo'"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}}, "smaller than initial lr"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"typo": 1}},
            "has 'typo', which `torch.utils.checkpoint.checkpoint` does not know. Use some of use_reentrant",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "an evaluation has no loss. Name one of its metrics",
        ),
    ],
    ids=str,
)
def test_inherited_settings_that_have_no_effect_together_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "warmup_steps": 0.1},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 1, "metric_for_best_model": "rewards/x/mean"},
        {"eval_on_start": True},
        {"save_strategy": "no", "save_steps": 7},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"max_grad_norm": 0.0, "weight_decay": 0.0},
        {"accelerator_config": {"dispatch_batches": False}},
    ],
    ids=str,
)
def test_settings_that_have_an_effect_are_accepted(settings) -> None:
    config(**settings)


def test_a_warmup_raises_the_learning_rate(tmp_path) -> None:
    trainer = small_trainer(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=2, learning_rate=1e-3)
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.0, 5e-4])


@pytest.mark.parametrize("checkpointing", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_set_the_same(checkpointing, recwarn) -> None:
    args = config(**{checkpointing: True})
    assert args.activation_checkpointing and args.gradient_checkpointing
    deprecated = [warning for warning in recwarn if "activation_checkpointing" in str(warning.message)]
    assert bool(deprecated) == (checkpointing == "gradient_checkpointing")


# ---- Settings of our own ----


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"multi_objective_aggregation": "sum_then_normalize", "balance_every": 10}, "balance_every"),
        ({"multi_objective_aggregation": "normalize_then_sum", "balance_on": "loss"}, "balance_on"),
        ({"multi_objective_aggregation": "equal", "weighting": "equal"}, "weighting"),
        ({"log_images": False, "log_images_steps": 3}, "log_images_steps"),
    ],
    ids=str,
)
def test_own_settings_that_have_no_effect_together_are_refused(settings, name) -> None:
    with pytest.raises(ValueError, match=f"`{name}=.*` has no effect with .*; leave one of the two out"):
        config(**settings)


# ---- Methods ----

SUPPORTED = """
    add_callback autocast_smart_context_manager call_model_init compute_loss_context_manager
    create_accelerator_and_postprocess create_model_card create_optimizer create_optimizer_and_scheduler
    create_scheduler end evaluate floating_point_ops get_batch_samples get_cp_size get_decay_parameter_names
    get_learning_rates get_num_trainable_parameters get_optimizer_cls_and_kwargs get_optimizer_group get_sp_size
    get_total_train_batch_size get_tp_size get_train_dataloader init_hf_repo is_local_process_zero
    is_world_process_zero log log_metrics metrics_format num_examples pop_callback push_to_hub remove_callback
    save_metrics save_model save_state set_initial_training_values store_flos train training_step
""".split()
REFUSED_METHODS = {
    "predict": "call `trainer.evaluate",
    "prediction_step": "call `trainer.evaluate",
    "evaluation_loop": "call `trainer.evaluate",
    "get_eval_dataloader": "read `trainer.eval_dataset`",
    "get_test_dataloader": "call `trainer.evaluate",
    "compute_loss": "see `trainer.training_step`",
    "hyperparameter_search": "make a new `MarbleNFTTrainer` for each trial",
}


def test_methods_of_the_base_class_work_or_say_what_to_use(tmp_path) -> None:
    public = {name for name, _ in inspect.getmembers(Trainer, callable) if not name.startswith("_")}
    assert public == {*SUPPORTED, *REFUSED_METHODS}
    trainer = small_trainer(tmp_path)
    for name, instead in REFUSED_METHODS.items():
        with pytest.raises(NotImplementedError, match=f"has no `{name}`: .*{instead}"):
            getattr(trainer, name)(prompt_set())


def test_the_checked_settings_survive_a_round_trip(tmp_path) -> None:
    args = small_config(tmp_path, lr_scheduler_type="cosine", warmup_steps=1)
    again = dataclasses.replace(args, warmup_steps=0)
    assert again.warmup_steps == 0 and again.lr_scheduler_type == args.lr_scheduler_type
