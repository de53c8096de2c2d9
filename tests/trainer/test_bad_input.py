# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Bad input to real runs: an error that names the value and how to fix it, and nothing lost of what was trained."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_sd3
from trainer_helpers import PROMPTS, blue, bright, prompt_set, small_config, small_trainer
from transformers import TrainerCallback, TrainingArguments

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.rewards import RewardError


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def assert_equal_adapters(one: Path, other: Path) -> None:
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- The pipeline and its adapter ----


@pytest.mark.parametrize("as_text", [str, Path], ids=["text", "path"])
def test_a_pipeline_may_be_a_path(tmp_path, monkeypatch, as_text) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "my-sd3"
    tiny_sd3(num_layers=1).save_pretrained(folder)
    settings = {"reward_funcs": [bright], "train_dataset": prompt_set()}
    trainer = MarbleNFTTrainer(as_text(folder), **settings)
    assert trainer.args.output_dir == "my-sd3-marble"
    assert trainer.pipeline.config["_name_or_path"] == str(folder)
    monkeypatch.chdir(folder)
    assert MarbleNFTTrainer(as_text("."), **settings).args.output_dir == "my-sd3-marble"


def test_a_lora_without_layers_gets_those_of_the_family(tmp_path) -> None:
    given = LoraConfig(r=3, lora_alpha=6)
    own = small_trainer(tmp_path, peft_config=given)
    usual = small_trainer(tmp_path)
    assert own.weights.trained.keys() == usual.weights.trained.keys()
    assert {min(weight.shape) for weight in own.weights.trained.values()} == {3}
    assert given.target_modules is None  # it is the user's


# ---- Prompts ----


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a cat"]}, r"has the columns \['text'\] but no `prompt`.*rename_column"),
        ({"prompt": []}, "is empty; it needs at least one prompt"),
        ({"prompt": ["a cat", ""]}, "Row 1 of .* has the prompt ''; every prompt must be a non-empty string"),
        ({"prompt": ["a cat"], "images": ["x"]}, "has the column 'images'.*Rename"),
    ],
)
def test_prompt_sets_without_prompts_are_refused(tmp_path, which, columns, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        small_trainer(tmp_path, **{which: Dataset.from_dict(columns)})
    assert f"`{which}`" in str(caught.value)


def test_a_missing_or_wrong_prompt_set_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is missing; pass a `datasets.Dataset` with a `prompt`"):
        MarbleNFTTrainer(tiny_sd3(), bright, small_config(tmp_path))
    with pytest.raises(TypeError, match="`train_dataset` is a list; pass a `datasets.Dataset`"):
        small_trainer(tmp_path, train_dataset=["a cat"])


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_sets_of_other_kinds_are_refused_with_what_to_pass(tmp_path, which) -> None:
    prompts = prompt_set()
    with pytest.raises(TypeError, match=rf"`{which}` is a DatasetDict with the splits train, test; use \["):
        small_trainer(tmp_path, **{which: DatasetDict(train=prompts, test=prompts)})
    with pytest.raises(TypeError, match=rf"`{which}` is an IterableDataset \(streaming\).*Make a `datasets.Dataset`"):
        small_trainer(tmp_path, **{which: prompts.to_iterable_dataset()})


@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ({}, ValueError, "`eval_dataset` is an empty dict"),
        ({"a/b": prompt_set()}, ValueError, "`eval_dataset` has a set named 'a/b'; a name is of letters"),
        ({1: prompt_set()}, ValueError, "has a set named 1"),
        ({"a": prompt_set(), "b": ["a cat"]}, TypeError, r'`eval_dataset\["b"\]` is a list; pass a'),
        ({"a": prompt_set().remove_columns("prompt")}, ValueError, r'`eval_dataset\["a"\]` has the columns'),
        ({"a": DatasetDict(x=prompt_set())}, TypeError, r'`eval_dataset\["a"\]` is a DatasetDict'),
    ],
)
def test_bad_evaluation_sets_are_refused_by_name(tmp_path, sets, error, message) -> None:
    with pytest.raises(error, match=message):
        small_trainer(tmp_path, eval_dataset=sets)
    if sets:
        trainer = small_trainer(tmp_path)
        with pytest.raises(error, match=message):
            trainer.evaluate(sets)


def test_fewer_prompts_than_a_generation_batch_are_refused(tmp_path) -> None:
    trainer = small_trainer(tmp_path, train_dataset=prompt_set().select([0]))
    with pytest.raises(ValueError, match="has 1 prompts, but one generation batch takes 2. Add prompts"):
        trainer.train()


def test_a_prompt_that_is_too_long_is_said_once(tmp_path) -> None:
    long = "a very long tale of a dog " * 10
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_trainer(
            tmp_path,
            train_dataset=Dataset.from_dict({"prompt": [long, long + "!"]}),
            eval_dataset=Dataset.from_dict({"prompt": [long]}),
            eval_on_start=True,
            eval_strategy="no",
        ).train()
    messages = [str(each.message) for each in caught if "tokens" in str(each.message)]
    assert len(messages) == 1
    assert long.strip()[:40] in messages[0] and "first 16" in messages[0] and "Shorten" in messages[0]


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_generations": 1}, ValueError, "`num_generations` is 1; it must be at least 2"),
        ({"num_generations": 3}, ValueError, r"has 4 images .* multiple of `num_generations` \(3\). Change one"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, ValueError, r"\(3\) must be a multiple of"),
        ({"num_generation": 2}, TypeError, "no setting `num_generation`; did you mean `num_generations`"),
        ({"multi_objective_aggregation": "mgda"}, ValueError, "is 'mgda'; it must be one of 'marble', 'equal'"),
        ({"reward_weights": [1.0]}, ValueError, r"has 1 values \(\[1.0\]\) for 2 rewards \(bright, blue\); pass one"),
        ({"reward_weights": [1.0, 2.0, 3.0]}, ValueError, "has 3 values .* for 2 rewards"),
        ({"height": 15, "width": 16}, ValueError, "15"),
        ({"height": 16, "width": 15}, ValueError, "15"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        small_trainer(tmp_path, **settings)


def test_other_arguments_are_refused(tmp_path) -> None:
    def build(**kwargs: Any) -> MarbleNFTTrainer:
        given = {"reward_funcs": [bright], "args": small_config(tmp_path), "train_dataset": prompt_set()}
        return MarbleNFTTrainer(tiny_sd3(num_layers=1), **(given | kwargs))

    with pytest.raises(TypeError, match="`args` is a TrainingArguments; pass a `MarbleConfig`"):
        build(args=TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="`reward_funcs` is empty; pass at least one"):
        build(reward_funcs=[])
    with pytest.raises(TypeError, match="must be a peft.LoraConfig, got dict"):
        build(peft_config={"r": 4})
    with pytest.raises(TypeError, match="`weighting` is 'nash'; the trainer takes a callable, and `MarbleConfig"):
        build(weighting="nash")
    with pytest.raises(ValueError, match="`weighting` is 'nash'; it must be one of 'mgda', 'equal'"):
        small_config(tmp_path, weighting="nash")
    with pytest.raises(ValueError, match="has a `weighting` of its own and `MarbleConfig` has 'equal'"):
        build(weighting=lambda gram: gram, args=small_config(tmp_path, weighting="equal"))
    with pytest.raises(ValueError, match="`weighting` has no effect with `multi_objective_aggregation='equal'`"):
        build(weighting=lambda gram: gram, args=small_config(tmp_path, multi_objective_aggregation="equal"))


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, place) -> None:
    (tmp_path / "file").write_text("in the way")

    def never(images, **kwargs):
        raise AssertionError("the run was started")

    with pytest.raises(OSError, match=f"`{tmp_path / place}` cannot be written .*pass another `output_dir`"):
        small_trainer(tmp_path / place, [never])
    assert (tmp_path / "file").read_text() == "in the way"


# ---- Pipelines ----


def tiny_unet_pipeline() -> StableDiffusionPipeline:
    """A real Stable Diffusion 1 pipeline: epsilon prediction with a U-Net."""
    parts = tiny_sd3()
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_a_unet_pipeline_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="DDIMScheduler .*'epsilon'.*is not flow matching.*Use a pipeline"):
        small_trainer(tmp_path, pipeline=tiny_unet_pipeline())


def test_a_flow_pipeline_with_an_epsilon_scheduler_is_refused_and_left_alone(tmp_path) -> None:
    pipeline = tiny_sd3()
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="DDPMScheduler .*'epsilon'.*FlowMatchEulerDiscreteScheduler"):
        small_trainer(tmp_path, pipeline=pipeline)
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


def test_what_is_no_pipeline_is_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no diffusers pipeline"):
        small_trainer(tmp_path / "out", pipeline=str(tmp_path / "empty"))
    with pytest.raises(TypeError, match="must be a Hub model id, a local folder or a diffusers.DiffusionPipeline"):
        small_trainer(tmp_path / "out", pipeline=torch.nn.Linear(2, 2))


def test_a_pipeline_that_is_being_trained_already_is_refused(tmp_path) -> None:
    pipeline = tiny_sd3(num_layers=1)
    small_trainer(tmp_path, pipeline=pipeline)
    with pytest.raises(ValueError, match="has adapters already .*unload_lora_weights"):
        small_trainer(tmp_path, pipeline=pipeline)


# ---- Rewards: names and what does not apply ----


def test_two_rewards_of_one_name_are_told_apart(tmp_path) -> None:
    trainer = small_trainer(tmp_path, [bright, bright], max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/bright/mean"] == logged["rewards/bright_1/mean"]
    assert logged["balance/alpha/bright"] + logged["balance/alpha/bright_1"] == pytest.approx(1)


@pytest.mark.parametrize("aggregation", ["marble", "equal", "sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_never_applies_is_said_once_and_takes_no_part(tmp_path, aggregation) -> None:
    def silent(images, **kwargs):
        return [None] * len(images)

    settings = {"multi_objective_aggregation": aggregation, "max_steps": 3}
    alone = small_trainer(tmp_path / "alone", [bright], **settings)
    alone.train()
    alone.save_model()
    both = small_trainer(tmp_path / "both", [silent, bright], **settings)
    with pytest.warns(UserWarning, match="`silent` applied to none of the 4 images of step 1; it takes no") as caught:
        both.train()
    both.save_model()
    assert sum("`silent`" in str(each.message) for each in caught) == 1

    # The run is the one without it.
    first, second = adapter(tmp_path / "alone"), adapter(tmp_path / "both")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-7)
    for row in both.state.log_history[:3]:
        assert row["rewards/silent/valid"] == 0 and math.isnan(row["rewards/silent/mean"])
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def test_a_run_in_which_no_reward_applies_changes_nothing_and_does_not_stop(tmp_path) -> None:
    def silent(images, **kwargs):
        return [math.nan] * len(images)

    trainer = small_trainer(tmp_path, [silent], beta=0.0, weight_decay=0.0)
    before = {name: value.detach().clone() for name, value in trainer.weights.trained.items()}
    with pytest.warns(UserWarning, match="`silent` applied to none"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.equal(value, before[name]) for name, value in trainer.weights.trained.items())


# ---- Rewards that fail, and what is kept ----


def answers_until(step: int, then: Any):
    """A reward that scores brightness up to an optimizer step, and from then on does something else."""

    def flaky(images, prompts, trainer_state, **kwargs):
        if trainer_state.global_step >= step:
            return then(images, prompts)
        return bright(images)

    return flaky


def raise_error(images, prompts):
    raise ZeroDivisionError("no face found")


@pytest.mark.parametrize(
    ("then", "parts"),
    [
        (raise_error, ["raised ZeroDivisionError: no face found"]),
        (lambda images, prompts: [0.5], ["returned 1 values for 2 images", "return one for each image"]),
        (lambda images, prompts: ["high"] * len(images), ["returned str 'high'", "a reward is a number, or `None`"]),
        (lambda images, prompts: [math.inf] * len(images), ["returned float inf", "must be finite", "bound it"]),
        (lambda images, prompts: None, ["returned NoneType None", "return a list with one number"]),
    ],
    ids=["raises", "wrong number", "not a number", "infinite", "nothing"],
)
def test_a_reward_that_fails_is_named_and_the_last_step_is_saved(tmp_path, then, parts) -> None:
    trainer = small_trainer(tmp_path, [blue, answers_until(2, then)], max_steps=4)
    with pytest.raises(RewardError) as caught:
        trainer.train()
    message = str(caught.value)
    for part in ["Reward `flaky`", *parts]:
        assert part in message
    if "images; return" not in message and "NoneType" not in message:
        assert any(repr(prompt) in message for prompt in PROMPTS)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A run of four optimizer steps in two generation batches, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole_run")
    trainer = small_trainer(folder, [blue, bright], save_strategy="steps", save_steps=1, **TWO_STEPS_A_BATCH)
    trainer.train()
    trainer.save_model()
    return folder


TWO_STEPS_A_BATCH = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
}


@pytest.mark.parametrize("failing_step", [2, 3])
def test_a_run_that_failed_is_resumed_as_if_nothing_had_happened(tmp_path, whole_run, failing_step) -> None:
    """Step 2 begins a generation batch, step 3 is in the middle of one."""

    class Stops(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == failing_step:
                raise KeyboardInterrupt

    interrupted = small_trainer(tmp_path, [blue, bright], **TWO_STEPS_A_BATCH)
    interrupted.add_callback(Stops())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{failing_step}"]

    resumed = small_trainer(tmp_path, [blue, bright], **TWO_STEPS_A_BATCH)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert_equal_adapters(tmp_path, whole_run)


@pytest.mark.parametrize("failing_step", [2, 3])
def test_a_failure_in_the_middle_of_a_step_keeps_the_step_before(tmp_path, whole_run, failing_step) -> None:
    class Stops(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == failing_step:
                raise OSError("no space left")

    interrupted = small_trainer(tmp_path, [blue, bright], **TWO_STEPS_A_BATCH)
    interrupted.add_callback(Stops())
    with pytest.raises(OSError, match="no space left"):
        interrupted.train()
    resumed = small_trainer(tmp_path, [blue, bright], **TWO_STEPS_A_BATCH)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{failing_step}"))
    resumed.save_model()
    assert_equal_adapters(tmp_path, whole_run)


def test_a_failure_in_an_evaluation_keeps_the_step(tmp_path) -> None:
    trainer = small_trainer(
        tmp_path,
        [answers_until(1, raise_error)],
        eval_dataset=prompt_set().select([3]),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
    )
    with pytest.raises(RewardError, match="`flaky` raised ZeroDivisionError: no face found .*'tree'"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()
    trained = {name: value.detach().clone() for name, value in trainer.weights.trained.items()}
    saved = load_file(tmp_path / "checkpoint-1" / "marble_state.safetensors")
    # The weights that are trained, though the average was being evaluated.
    assert all(torch.equal(saved[f"current/{name}"], value) for name, value in trained.items())


def test_a_failure_in_the_first_step_leaves_no_checkpoint(tmp_path) -> None:
    with pytest.raises(RewardError, match="`flaky` raised"):
        small_trainer(tmp_path, [answers_until(0, raise_error)]).train()
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- Checkpoints of something else ----


def resume(folder: Path, checkpoint: Path, rewards: Any = (blue, bright), **kwargs: Any) -> MarbleNFTTrainer:
    """Try to resume; the trainer must be left as it was."""
    trainer = small_trainer(folder, list(rewards), **(TWO_STEPS_A_BATCH | kwargs))
    before = {name: value.detach().clone() for name, value in trainer.weights.trained.items()}
    files = {path: path.read_bytes() for path in checkpoint.glob("*")}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    finally:
        assert all(torch.equal(value, before[name]) for name, value in trainer.weights.trained.items())
        assert {path: path.read_bytes() for path in checkpoint.glob("*")} == files
        assert not list(folder.glob("checkpoint-*"))
    return trainer


def renamed(images, **kwargs):
    return bright(images)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pipeline": "other base"}, "was written with base_model = '.*', this run has '.*'. Resume with what"),
        ({"rewards": (blue, renamed)}, r"rewards = \['blue', 'bright'\], this run has \['blue', 'renamed'\]"),
        ({"rewards": (bright, blue)}, r"rewards = \['blue', 'bright'\], this run has \['bright', 'blue'\]"),
        ({"rewards": (blue,)}, r"rewards = \['blue', 'bright'\], this run has \['blue'\]"),
        ({"peft_config": LoraConfig(r=2, lora_alpha=64)}, r"lora = .*'r': 32.*, this run has .*'r': 2"),
        ({"peft_config": LoraConfig(r=32, lora_alpha=1)}, r"lora = .*'lora_alpha': 64.*, this run has .*: 1"),
        (
            {"peft_config": LoraConfig(r=32, lora_alpha=64, target_modules=["to_q"])},
            "The saved weights belong to another adapter",
        ),
        ({"steps_per_generation": 4}, "2 optimizer steps .*, and this run has .* Set `steps_per_generation=2`"),
    ],
    ids=["base", "other reward", "other order", "fewer rewards", "rank", "alpha", "other layers", "batch"],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, whole_run, kwargs, message) -> None:
    if "pipeline" in kwargs:
        kwargs = {"pipeline": tiny_sd3(num_layers=1, seed=1)}
    peft_config = kwargs.get("peft_config")
    if peft_config is not None and peft_config.target_modules is None:
        peft_config.target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    with pytest.raises(ValueError, match=message):
        resume(tmp_path, whole_run / "checkpoint-2", **kwargs)


def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path, whole_run) -> None:
    checkpoint = tmp_path / "saved" / "checkpoint-2"
    shutil.copytree(whole_run / "checkpoint-2", checkpoint)
    content = (checkpoint / "marble_state.safetensors").read_bytes()
    (checkpoint / "marble_state.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is no valid checkpoint: `marble_state.safetensors` has .* bytes of"):
        resume(tmp_path / "out", checkpoint)
    (checkpoint / "marble_state.safetensors").unlink()
    with pytest.raises(ValueError, match="no valid checkpoint: `marble_state.safetensors` is missing"):
        resume(tmp_path / "out", checkpoint)
    with pytest.raises(FileNotFoundError, match="Pass the path of a `checkpoint-<step>` folder"):
        resume(tmp_path / "out", tmp_path / "nowhere")


def test_a_moved_pipeline_and_checkpoint_still_fit(tmp_path, whole_run) -> None:
    tiny_sd3(num_layers=1).save_pretrained(tmp_path / "moved pipeline")
    shutil.copytree(whole_run / "checkpoint-2", tmp_path / "moved" / "checkpoint-2")
    trainer = small_trainer(
        tmp_path / "out", [blue, bright], pipeline=str(tmp_path / "moved pipeline"), **TWO_STEPS_A_BATCH
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-2"))
    trainer.save_model()
    assert_equal_adapters(tmp_path / "out", whole_run)


def test_nothing_to_evaluate_on_is_refused(tmp_path) -> None:
    trainer = small_trainer(tmp_path)
    with pytest.raises(ValueError, match="nothing to evaluate on: pass `eval_dataset`"):
        trainer.evaluate()
    assert isinstance(trainer.args, MarbleConfig)
