# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Going on with other settings, and starting anew where another run was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from trl_marble.checkpoint.folder import find_checkpoint
from trl_marble.checkpoint.settings import SETTINGS_FILE, load_settings


STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where a run of two steps is kept for the tests of this module."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def saved(make_trainer, kept, tmp_path):
    """The folder of a run of two steps, a copy of its own for each test."""
    if not (kept / "run").is_dir():
        trainer = make_trainer("saved", **STEPS)
        trainer.train()
        shutil.copytree(trainer.args.output_dir, kept / "run")
    return Path(shutil.copytree(kept / "run", tmp_path / "run"))


def resume(make_trainer, saved, **settings):
    trainer = make_trainer(saved, **{**STEPS, "max_steps": 4, **settings})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def rates(trainer):
    return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]


def test_a_resumed_run_says_where_it_goes_on(make_trainer, saved, caplog):
    resume(make_trainer, saved, max_steps=3)
    (message,) = [record.message for record in caplog.records if "Resuming" in record.message]
    assert f"Resuming from `{saved}/checkpoint-2`, step 2." in message
    assert "max_steps 2 -> 3" in message and "learning_rate" not in message
    caplog.clear()
    make_trainer(saved, **STEPS, resume_from_checkpoint="latest").train()  # by the settings alone
    (message,) = [record.message for record in caplog.records if "Resuming" in record.message]
    assert "step 3." in message


def test_another_learning_rate_is_used_and_named(make_trainer, saved, caplog):
    trainer = resume(make_trainer, saved, learning_rate=1e-4, weight_decay=0.5, adam_beta1=0.5)
    assert rates(trainer) == [1e-2, 1e-2, 1e-4, 1e-4]
    decaying, others = trainer.bare_optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert decaying["betas"] == others["betas"] == (0.5, 0.999)
    (message,) = [record.message for record in caplog.records if "Resuming" in record.message]
    for change in ("learning_rate 0.01 -> 0.0001", "weight_decay 0.0001 -> 0.5", "adam_beta1 0.9 -> 0.5"):
        assert change in message
    trainer.save_model()
    card = (saved / "README.md").read_text()
    assert "| `learning_rate` | `0.0001` |" in card and "| `learning_rate until step 2` | `0.01` |" in card
    history = load_settings(saved / "checkpoint-4")
    assert [each.step for each in history] == [0, 2]
    assert [each.settings["learning_rate"] for each in history] == [1e-2, 1e-4]


def test_another_learning_rate_keeps_the_place_in_its_schedule(make_trainer, tmp_path):
    schedule = {**STEPS, "lr_scheduler_type": "linear", "max_steps": 4}
    trainer = make_trainer("linear", **schedule)
    trainer.train()
    resumed = make_trainer("resumed", **schedule | {"learning_rate": 1e-3})
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert rates(trainer) == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert rates(resumed) == pytest.approx([1e-2, 0.75e-2, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize(
    ("schedule", "right"),
    [
        ({"lr_scheduler_type": "linear"}, [0.5e-2, 0.25e-2]),
        ({"lr_scheduler_type": "linear", "learning_rate": 1e-3}, [0.5e-3, 0.25e-3]),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8}, [0.25e-2, 0.375e-2]),
    ],
    ids=str,
)
def test_the_first_step_after_resuming_has_the_rate_of_its_own_schedule(make_trainer, saved, schedule, right):
    assert rates(resume(make_trainer, saved, **schedule))[2:] == pytest.approx(right)


def test_a_run_that_was_over_goes_on_in_a_longer_schedule(make_trainer):
    make_trainer(**STEPS, lr_scheduler_type="linear").train()  # to a rate of 0
    resumed = make_trainer(**{**STEPS, "max_steps": 4}, lr_scheduler_type="linear")
    resumed.train(resume_from_checkpoint=True)
    assert rates(resumed) == pytest.approx([1e-2, 0.5e-2, 0.5e-2, 0.25e-2])


def test_what_cannot_go_on_is_refused(make_trainer, saved, prompts):
    with pytest.raises(ValueError, match="saved with the optimizer AdamW, this run has SGD"):
        resume(make_trainer, saved, optim="sgd")
    with pytest.raises(ValueError, match="saved with the lr_scheduler LambdaLR, this run has ReduceLROnPlateau"):
        plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
        resume(make_trainer, saved, **plateau, metric_for_best_model="rewards/brightness/mean", eval_dataset=prompts)
    state = saved / "checkpoint-2" / "marble_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format_version": 1}))
    (saved / "checkpoint-2" / "manifest.json").unlink()
    shutil.rmtree(saved / "checkpoint-1")
    with pytest.raises(FileNotFoundError, match="checkpoint-2"):
        resume(make_trainer, saved)


def test_a_fresh_start_among_checkpoints_is_refused(make_trainer, saved):
    with pytest.raises(
        FileExistsError, match=r"earlier run \(checkpoint-1, checkpoint-2\).*overwrite_output_dir=True"
    ):
        make_trainer(saved, **STEPS).train()
    other = make_trainer("other", **STEPS)
    other.train()
    with pytest.raises(FileExistsError, match="earlier run"):  # going on from another folder mixes them too
        make_trainer(saved, **STEPS).train(resume_from_checkpoint=f"{other.args.output_dir}/checkpoint-1")
    assert {path.name for path in saved.iterdir() if path.is_dir()} >= {"checkpoint-1", "checkpoint-2"}


def test_overwriting_leaves_no_checkpoint_of_the_earlier_run(make_trainer, saved):
    trainer = make_trainer(saved, **{**STEPS, "max_steps": 1, "seed": 7}, overwrite_output_dir=True)
    trainer.train()
    assert [path.name for path in saved.glob("checkpoint-*")] == ["checkpoint-1"]
    trainer.save_model()
    newest = load_file(find_checkpoint("latest", saved) / "pytorch_lora_weights.safetensors")
    published = load_file(saved / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(newest[name], value) for name, value in published.items())


def test_going_back_warns_of_later_checkpoints_or_deletes_them(make_trainer, saved, caplog):
    make_trainer(saved, **STEPS).train(resume_from_checkpoint=str(saved / "checkpoint-1"))
    assert any("after the one that this run resumes from (checkpoint-2)" in r.message for r in caplog.records)
    settings = STEPS | {"max_steps": 1}
    make_trainer(saved, **settings, overwrite_output_dir=True).train(str(saved / "checkpoint-1"))
    assert [path.name for path in saved.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("spelling", ["link/checkpoint-1", "run/../run/checkpoint-1"])
def test_overwriting_keeps_what_is_resumed_however_its_folder_is_spelled(make_trainer, saved, tmp_path, spelling):
    (tmp_path / "link").symlink_to(saved)
    settings = STEPS | {"max_steps": 1}
    make_trainer(saved, **settings, overwrite_output_dir=True).train(str(tmp_path / spelling))
    assert [path.name for path in saved.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_refused_run_overwrites_nothing(make_trainer, saved, rewards):
    with pytest.raises(ValueError, match="was written with rewards"):
        trainer = make_trainer(saved, **STEPS, overwrite_output_dir=True, reward_funcs=rewards[:1])
        trainer.train(str(saved / "checkpoint-1"))
    assert {path.name for path in saved.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"to_q": 7}}], ids=str)
def test_an_adapter_of_another_strength_is_refused(make_trainer, change):
    layers = {"r": 2, "target_modules": ["attn.to_q"]}
    make_trainer(**STEPS, peft_config=LoraConfig(**layers)).train()
    other = make_trainer(**STEPS, peft_config=LoraConfig(**layers, **change))
    with pytest.raises(ValueError, match="was written with lora = "):
        other.train(resume_from_checkpoint=True)


def test_what_resuming_means(tmp_path):
    assert find_checkpoint(None, tmp_path) is find_checkpoint(False, tmp_path) is None
    assert find_checkpoint("auto", tmp_path) is find_checkpoint("false", tmp_path) is None
    for wanted in (True, "true", "latest"):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            find_checkpoint(wanted, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    for wanted in ("latest", True):
        with pytest.raises(FileNotFoundError, match=r"`checkpoint-3` \(it is empty\)"):
            find_checkpoint(wanted, tmp_path)


def test_auto_takes_what_is_valid_and_else_begins_anew_and_says_which(make_trainer, saved, caplog):
    def said(text):
        messages = [record.message for record in caplog.records if text in record.message]
        caplog.clear()
        return messages

    (saved / "tmp-checkpoint-3").mkdir()
    (saved / "checkpoint-2" / "trainer_state.json").unlink()
    trainer = make_trainer(saved, **STEPS)
    trainer.train(resume_from_checkpoint="auto")
    (passed_over, resumed) = said("Resuming from")
    assert passed_over.startswith(f"Resuming from `{saved}/checkpoint-1`. Passed over: `tmp-checkpoint-3` (it was not")
    assert "`checkpoint-2` (`trainer_state.json` is missing)" in passed_over and "step 1." in resumed
    expected = {name: value.detach().clone() for name, value in trainer.weights.trained.items()}
    for step in (1, 2):
        (saved / f"checkpoint-{step}" / "trainer_state.json").unlink()
    anew = make_trainer(saved, **STEPS)
    anew.train(resume_from_checkpoint="auto")
    (passed_over, begins) = said("raining begins anew")
    assert passed_over.startswith("Training begins anew. Passed over: `checkpoint-2` (`trainer_state.json` is miss")
    assert begins == f"There is no valid checkpoint in `{saved}`: training begins anew."
    assert all(value.equal(expected[name]) for name, value in anew.weights.trained.items())
    assert find_checkpoint("latest", saved) == saved / "checkpoint-2"  # written anew, in the place of the damaged one
    (saved / "checkpoint-2" / "trainer_state.json").unlink()
    (saved / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(FileExistsError, match="has checkpoints of an earlier run"):  # nobody has said that they may go
        make_trainer(saved, **STEPS).train()


def test_auto_begins_a_run_in_an_empty_folder_and_says_so(make_trainer, caplog):
    make_trainer("fresh", **STEPS | {"max_steps": 1}).train(resume_from_checkpoint="auto")
    (message,) = [record.message for record in caplog.records if "begins anew" in record.message]
    assert message.startswith("There is no valid checkpoint in `")


def test_no_token_and_no_folder_is_written(make_trainer):
    trainer = make_trainer(**STEPS, hub_token="hf_secretsecret")
    trainer.train()
    text = (Path(trainer.args.output_dir) / "checkpoint-2" / SETTINGS_FILE).read_text()
    assert "secret" not in text and trainer.args.output_dir not in text
    assert '"learning_rate": 0.01' in text
