# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The settings: the papers' defaults, and refusals of what cannot work that say how to fix it."""

import copy
import dataclasses
import inspect
import json
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from trl_marble import MarbleConfig
from trl_marble.setting_names import OTHER_TRAINERS, TRAINER_ARGUMENTS
from trl_marble.world_size import check_world_size


PROGRESS = {"multi_objective_aggregation": "progress"}


def config(**settings) -> MarbleConfig:
    return MarbleConfig("runs/test", **({"use_cpu": True} | settings))


def test_defaults_are_the_papers_but_where_others_were_better() -> None:
    defaults = config()
    expected = {
        "learning_rate": 3e-4,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "num_generations": 24,
        "num_inference_steps": 25,
        "guidance_scale": 1.0,
        "nft_beta": 0.1,
        "advantage_clip": 5.0,
        "beta": 0.1,  # the paper: 1e-4
        "scale_rewards": "batch",
        "multi_objective_aggregation": "marble",
        "balance_on": "advantage",  # the paper: "loss"
        "balance_every": 1,  # the paper: 10
        "balance_ema": 0.7,
        "policy_loss": "nft",
        "weighting": "mgda",
        "old_policy_preset": 0,  # the paper: 1
        "regularizer_fraction": 0.25,  # the paper: 1.0
        "num_iterations": 1,
        "prompts_per_generation": 48,
        "generation_batch_size": 48 * 24,
    }
    assert {name: getattr(defaults, name) for name in expected} == expected


def test_one_optimizer_step_a_generation_batch_unless_told() -> None:
    assert config(gradient_accumulation_steps=6).steps_per_generation == 6
    several = config(
        per_device_train_batch_size=4, gradient_accumulation_steps=3, steps_per_generation=6, num_generations=8
    )
    assert several.generation_batch_size == 24 and several.prompts_per_generation == 3


def test_every_own_setting_is_documented_and_has_help() -> None:
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    for setting in dataclasses.fields(MarbleConfig):
        if setting.name not in inherited:
            assert f"        {setting.name} (`" in MarbleConfig.__doc__
            assert setting.metadata["help"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("num_generation", "num_generations"), ("balance_evry", "balance_every"), ("learning_rates", "learning_rate")],
)
def test_an_unknown_setting_is_refused_with_the_nearest(name, nearest) -> None:
    with pytest.raises(TypeError, match=f"`MarbleConfig` has no setting `{name}`; did you mean `{nearest}`?"):
        config(**{name: 4})


def test_an_unknown_setting_that_is_near_to_none_is_refused() -> None:
    with pytest.raises(TypeError, match="`MarbleConfig` has no setting `xyzzy`; see the docstring"):
        config(xyzzy=4)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("log_completions", "did you mean `log_images`?"),
        ("num_completions_to_print", "did you mean `num_images_to_log`?"),
        ("max_train_steps", "did you mean `max_steps`?"),
        ("train_batch_size", "did you mean `per_device_train_batch_size`?"),
        ("num_image_per_prompt", "did you mean `num_generations`?"),
        ("num_epochs", "did you mean `num_train_epochs`?"),
        ("micro_batch_size", "did you mean `per_device_train_batch_size`?"),
        ("num_ppo_epochs", "did you mean `num_iterations`?"),
        ("log_with", "did you mean `report_to`?"),
        ("repo_id", "did you mean `hub_model_id`?"),
        ("vllm_max_model_length", "the pipeline itself samples the images; see `rollout_batch_size`."),
        (
            "epsilon",
            "no likelihood ratio to clip (those of AWM and GRPO have `awm_clip_range` and `grpo_clip_range`); "
            "`advantage_clip` limits the advantages.",
        ),
        ("clip_range", "`advantage_clip` limits the advantages."),
        ("warmup_ratio", "is a fraction of the run: `warmup_steps=0.1`."),
        ("resolution", "set `height` and `width`."),
        ("temperature", "`guidance_scale` set how images are sampled."),
        ("lora_r", "as `peft_config` of the trainer."),
        ("reward_funcs", "pass them as `reward_funcs` of the trainer."),
    ],
)
def test_names_of_other_trainers_are_understood(name, how) -> None:
    with pytest.raises(TypeError, match=f"`MarbleConfig` has no setting `{name}`; ") as caught:
        config(**{name: 4})
    assert str(caught.value).endswith(how)


def test_names_of_other_trainers_mean_settings_that_exist() -> None:
    known = {f.name for f in dataclasses.fields(MarbleConfig)} | TRAINER_ARGUMENTS.keys()
    assert not OTHER_TRAINERS.keys() & {f.name for f in dataclasses.fields(MarbleConfig)}
    for meant in OTHER_TRAINERS.values():
        assert " " in meant or meant in known, meant
        for named in re.findall(r"`([a-z_]+)`", meant):
            assert named in known or named in ("peft_config", "lora_dropout"), named


def test_notebooks_and_inspect_see_the_settings() -> None:
    shown = inspect.signature(MarbleConfig).parameters
    assert list(shown) == [f.name for f in dataclasses.fields(MarbleConfig) if f.init]
    assert shown["num_generations"].default == 24

    @dataclasses.dataclass
    class Mine(MarbleConfig):
        num_judges: int = 3

    assert inspect.signature(Mine).parameters["num_judges"].default == 3


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"multi_objective_aggregation": "marbles"}, ["'marbles'", "'marble', 'equal', 'sum_then_normalize'"]),
        ({"balance_on": "both"}, ["'both'", "'loss', 'advantage'"]),
        ({"scale_rewards": True}, ["True", "'batch', 'group', 'none'"]),
        ({"old_policy_preset": 5}, ["5", "0, 1, 2, 3, 4"]),
        ({"num_generations": 1}, ["is 1", "at least 2", "compare the images of one prompt"]),
        ({"num_inference_steps": 0}, ["is 0", "at least 1"]),
        ({"num_iterations": 0}, ["is 0", "at least 1"]),
        ({"num_generations_eval": 0}, ["is 0", "at least 1"]),
        ({"balance_every": 0}, ["is 0", "at least 1", "every optimizer step"]),
        ({"num_images_to_log": 0}, ["is 0", "log_images=False"]),
        ({"rollout_batch_size": 0}, ["is 0", "leave it out"]),
        ({"steps_per_generation": 0}, ["is 0", "leave it out"]),
        ({"per_device_train_batch_size": 0}, ["is 0", "at least 1"]),
        ({"per_device_eval_batch_size": 0}, ["is 0", "at least 1"]),
        ({"gradient_accumulation_steps": 0}, ["is 0", "at least 1"]),
        ({"height": 0}, ["`height` is 0", "leave it out"]),
        ({"width": -8}, ["`width` is -8", "leave it out"]),
        ({"max_sequence_length": -1}, ["is -1", "leave it out"]),
        ({"nft_beta": 0.0}, ["is 0.0", "greater than 0"]),
        ({"nft_beta": math.nan}, ["is nan", "finite"]),
        ({"advantage_clip": -5.0}, ["is -5.0", "greater than 0"]),
        ({"advantage_clip": math.inf}, ["is inf", "finite"]),
        ({"beta": -1e-4}, ["is -0.0001", "0 (no penalty"]),
        ({"beta": math.nan}, ["is nan", "0 (no penalty"]),
        ({"balance_ema": 1.0}, ["is 1.0", "[0, 1)"]),
        ({"weight_ema_decay": -0.1}, ["is -0.1", "[0, 1)"]),
        ({"timestep_fraction": 0.0}, ["is 0.0", "(0, 1]"]),
        ({"timestep_fraction": 1.5}, ["is 1.5", "(0, 1]"]),
        ({"reward_weights": [1.0, math.inf]}, ["[1.0, inf]", "one finite number for each reward"]),
        ({"reward_weights": 0.5}, ["0.5", "pass a list"]),
        ({"reward_weights": [1.0, "2"]}, ["[1.0, '2']", "pass a list"]),
        ({"progress_temperature": 0.0}, ["is 0.0", "greater than 0"]),
        ({"progress_ema": 1.0}, ["is 1.0", "[0, 1)"]),
        ({"progress_base_images": 0}, ["is 0", "at least 1"]),
        ({"progress_ema": 0.5}, ["=0.5`", "no effect", "'marble'"]),
        ({"reward_targets": [None, 0.5]}, ["=[None, 0.5]`", "no effect", "'marble'"]),
        ({"reward_bounds": [0.5], "multi_objective_aggregation": "equal"}, ["=[0.5]`", "no effect", "'equal'"]),
        ({"reward_weights": [1.0, 2.0]} | PROGRESS, ["=[1.0, 2.0]`", "no effect", "'progress'", "finds the weights"]),
        ({"scale_rewards": "none"} | PROGRESS, ["'none'", "`scale_rewards='group'`"]),
        ({"balance_every": 10} | PROGRESS, ["=10`", "no effect", "'progress'"]),
        ({"reward_targets": [None, math.nan]} | PROGRESS, ["[None, nan]", "one finite number, or `None`"]),
        ({"reward_priorities": [1.0, 0.0]}, ["[1.0, 0.0]", "one number above 0"]),
        ({"reward_priorities": 2.0}, ["2.0", "pass a list"]),
        ({"reward_priorities": [1.0, 2.0], "multi_objective_aggregation": "equal"}, ["no effect", "`reward_weights`"]),
        ({"reward_targets": 0.5} | PROGRESS, ["0.5", "pass a list"]),
        ({"reward_bounds": "12"} | PROGRESS, ["'12'", "pass a list"]),
        ({"reward_bounds": [None, None]} | PROGRESS, ["[None, None]", "no effect; leave it out"]),
        ({"reward_targets": [2, 0.9], "reward_bounds": [None, 0.8]} | PROGRESS, ["0.9", "0.8", "never reached"]),
        ({"steps_per_generation": 150}, ["(150)", "multiple of `gradient_accumulation_steps` (144)"]),
        ({"num_generations": 25}, ["1152 images", "`num_generations` (25)", "8 x 1", "Change one of them"]),
        ({"fp16": True}, ["`fp16=True`", "`bf16=True`"]),
        ({"auto_find_batch_size": True}, ["`auto_find_batch_size=True`", "rollout_batch_size"]),
        ({"remove_unused_columns": True}, ["`remove_unused_columns=True`", "must be `False`"]),
        (
            {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 50},
            ["`metric_for_best_model` is 'loss'", "rewards/pickscore/mean"],
        ),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_with_the_value_and_how_to_fix_it(settings, parts) -> None:
    with pytest.raises(ValueError) as caught:
        config(**settings)
    message = str(caught.value)
    for part in [*(f"`{name}" for name in list(settings)[:1]), *parts]:
        assert part in message


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0, "balance_ema": 0.0, "weight_ema_decay": 0.0, "timestep_fraction": 1.0},
        {"num_generations": 2, "balance_every": 1, "num_inference_steps": 1},
        {"reward_weights": [0, -1.5]},
        {"bf16": True},
        {"reward_targets": [None, 0, -2.5], "reward_bounds": [1, 0, None], "progress_ema": 0.0} | PROGRESS,
    ],
)
def test_settings_at_the_edge_are_taken(settings) -> None:
    made = config(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


def test_the_command_line_sets_every_kind_of_setting() -> None:
    command = (
        "--output_dir out --use_cpu --num_generations 4 --height 48 --width 64 --nft_beta 0.5 --scale_rewards group"
    )
    command += " --reward_weights 1 2.5 --weighting equal --log_images false --steps_per_generation 288"
    (parsed,) = HfArgumentParser(MarbleConfig).parse_args_into_dataclasses(command.split())
    expected = config(
        num_generations=4,
        height=48,
        width=64,
        nft_beta=0.5,
        scale_rewards="group",
        reward_weights=[1.0, 2.5],
        weighting="equal",
        log_images=False,
        steps_per_generation=288,
    ).to_dict()
    assert parsed.to_dict() == expected | {"output_dir": "out"}


def test_a_list_on_the_command_line_may_have_places_without_a_number() -> None:
    words = "--output_dir out --use_cpu --multi_objective_aggregation progress --reward_targets 0.5 none -1 Null"
    (parsed,) = HfArgumentParser(MarbleConfig).parse_args_into_dataclasses(words.split())
    assert parsed.reward_targets == [0.5, None, -1.0, None]


def test_the_help_of_the_command_line_renders(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        HfArgumentParser(MarbleConfig).parse_args(["--help"])
    assert ended.value.code == 0
    assert "--multi_objective_aggregation" in capsys.readouterr().out


@pytest.mark.parametrize("write", [str, repr, TrainingArguments.to_json_string, TrainingArguments.to_sanitized_dict])
def test_no_token_is_ever_written_out(write) -> None:
    assert "hf_secret" not in str(write(config(hub_token="hf_secret")))


def test_json_holds_the_settings() -> None:
    written = json.loads(config(balance_ema=0.25, reward_weights=[1.0, 2.0]).to_json_string())
    assert written["balance_ema"] == 0.25 and written["reward_weights"] == [1.0, 2.0]


def test_copies_are_equal_and_independent() -> None:
    original = config(reward_weights=[1.0, 2.0], num_generations=4)
    for copied in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
        assert type(copied) is MarbleConfig and copied.to_dict() == original.to_dict()
        copied.reward_weights.append(3.0)
    assert original.reward_weights == [1.0, 2.0]


def test_replace_changes_one_setting_and_checks_again() -> None:
    original = config(num_generations=4)
    replaced = dataclasses.replace(original, seed=7)
    changed = {name for name, value in original.to_dict().items() if replaced.to_dict()[name] != value}
    assert changed == {"seed"}
    with pytest.raises(ValueError, match="`num_generations` is 1"):
        dataclasses.replace(original, num_generations=1)
    with pytest.raises(TypeError, match="did you mean `seed`"):
        dataclasses.replace(original, sed=7)


def test_a_subclass_can_add_settings() -> None:
    @dataclasses.dataclass
    class Mine(MarbleConfig):
        num_judges: int = 3

    assert Mine("out", use_cpu=True, num_judges=5).num_judges == 5
    with pytest.raises(TypeError, match="`Mine` has no setting `num_judge`; did you mean `num_judges`"):
        Mine("out", num_judge=5)


# ---- How processes share the work ----


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed is not supported: it reduces .*--multi_gpu.*`shard_base=True`"),
        ("ACCELERATE_USE_FSDP", "FSDP as `accelerate` and `transformers` .*--multi_gpu.*`shard_base=True`"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "Tensor, context .* are not supported. Start plain processes"),
        ("ACCELERATE_USE_MEGATRON_LM", "Tensor, context and pipeline parallelism are not supported"),
    ],
)
def test_launches_that_share_the_work_otherwise_are_refused(monkeypatch, flag, message) -> None:
    monkeypatch.setenv(flag, "true")
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize("setting", [{"deepspeed": {"zero_optimization": {"stage": 2}}}, {"fsdp": "full_shard"}])
def test_settings_that_share_the_work_otherwise_are_refused(setting) -> None:
    with pytest.raises(ValueError, match="is not supported.*`shard_base=True`"):
        config(**setting)


def test_one_process_with_several_gpus_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="One process sees 2 GPUs .*--multi_gpu.*or .*`CUDA_VISIBLE_DEVICES=0`"):
        config(use_cpu=False)
    assert config().n_gpu == 0  # GPUs are not to be used


@pytest.mark.parametrize(
    ("environment", "number", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, "2 processes were launched .*and 1 would work together.*`use_cpu=True`"),
        ({"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1"}, 1, "asked for several processes .*started one"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 2, None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, 1, None),
        ({"ACCELERATE_USE_CPU": "True"}, 1, None),
        ({}, 1, None),
    ],
    ids=str,
)
def test_other_processes_than_were_launched_are_refused(monkeypatch, environment, number, message) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        check_world_size(number)
    else:
        with pytest.raises(ValueError, match=message):
            check_world_size(number)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--multi_gpu"], []], ids=["two apart", "one for two"])
def test_two_processes_that_would_work_apart_are_refused_for_real(tmp_path, options) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom trl_marble import MarbleConfig\nMarbleConfig('out', use_cpu='cpu' in sys.argv)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    launch += ["--main_process_port", "0", *options]
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "`accelerate launch --multi_gpu --num_processes N`; for N on" in done.stderr
    if options:  # the line that the message names
        subprocess.run([*launch, str(script), "cpu"], check=True, capture_output=True, timeout=300)


def test_a_sharded_base_is_not_compiled(monkeypatch) -> None:
    with pytest.raises(ValueError, match="`shard_base=True` and `torch_compile=True` do not work together"):
        config(shard_base=True, torch_compile=True)
    assert config(shard_base=True).base_is_sharded is False  # there is one process


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_target": 0.0, "beta": 0.5}, "greater than 0"),
        ({"kl_target": float("inf"), "beta": 0.5}, "finite"),
        ({"kl_target": 0.05, "beta": 0.0}, "set `beta=0.5`"),
    ],
)
def test_a_target_of_the_kl_needs_a_first_coefficient(settings, words):
    with pytest.raises(ValueError, match=words):
        MarbleConfig("x", **settings)
