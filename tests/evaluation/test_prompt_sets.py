# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Several prompt sets to evaluate on, by name; and prompt sets that are conversations."""

import io
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tiny_edits import edit_set, tiny_flux_kontext
from trainer_helpers import PROMPTS, blue, bright, prompt_set, small_trainer
from transformers import TrainerCallback

from trl_marble.hub import CardInputs
from trl_marble.trainer import LiveTableCallback


SETS = {
    "general": prompt_set().select([0, 1]),
    "ocr": Dataset.from_dict({"prompt": ['a "hi"', "sky", "a red dog"], "text": ["hi", None, None]}),
}


def signs(images, text=None, **kwargs):
    """Of the images whose row has a text."""
    return [None if each is None else float(i) for i, each in enumerate(text or [None] * len(images))]


class Events(TrainerCallback):
    """The metrics of each evaluation."""

    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.metrics.append(metrics)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    events, screen = Events(), io.StringIO()
    trainer = small_trainer(
        tmp_path_factory.mktemp("run"),
        reward_funcs=[bright, signs],
        eval_reward_funcs=[blue],
        eval_dataset=SETS,
        callbacks=[events, LiveTableCallback(Console(file=screen, width=200))],
        num_generations_eval=2,
        num_images_to_log=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        log_images=True,
    )
    trainer.train()
    trainer.create_model_card()
    trainer.events, trainer.screen = events, screen.getvalue()
    return trainer


def test_every_evaluation_knows_its_set_and_the_last_one_is_of_all(trained):
    assert [evaluation.name for evaluation in trained.evaluations] == ["general", "ocr", None] * 2
    assert [evaluation.step for evaluation in trained.evaluations] == [0] * 3 + [2] * 3
    general, ocr, together = trained.evaluations[3:]
    assert general.rewards.shape == (3, 4) and ocr.rewards.shape == (3, 6)
    torch.testing.assert_close(together.rewards, torch.cat([general.rewards, ocr.rewards], dim=1), equal_nan=True)
    assert general.rewards[1].isnan().all() and (~ocr.rewards[1].isnan()).sum() == 2  # columns are those of the set


def test_metrics_are_of_each_set_and_of_all(trained):
    per_set = [list(metrics) for metrics in trained.events.metrics[:3]]
    for keys, prefix in zip(per_set, ["eval_general", "eval_ocr", "eval"], strict=True):
        assert all(re.match(f"{prefix}_(rewards/|drift/|gain[/_]|joint_|kl)", key) for key in keys)
    metrics = {key: value for part in trained.events.metrics[3:] for key, value in part.items()}
    general, ocr, together = trained.evaluations[3:]
    for row, name in enumerate(["bright", "signs", "blue"]):
        for prefix, evaluation in (("eval_general", general), ("eval_ocr", ocr), ("eval", together)):
            values = evaluation.rewards[row]
            expected = values.double().nanmean().item()
            assert metrics[f"{prefix}_rewards/{name}/mean"] == pytest.approx(expected, nan_ok=True)
            assert metrics[f"{prefix}_rewards/{name}/valid"] == pytest.approx((~values.isnan()).float().mean().item())
    gains = [metrics[f"eval_gain/{name}/mean"] for name in ("bright", "signs", "blue")]
    assert metrics["eval_gain_worst"] == min(gains[:2]) and metrics["eval_gain_mean"] == pytest.approx(
        sum(gains[:2]) / 2
    )
    kl = torch.cat([evaluation.kl for evaluation in trained.evaluations[3:5]])
    assert kl.mean() > 0 and metrics["eval_kl"] == pytest.approx(kl.mean().item())
    diversities = [metrics[f"eval_{name}_drift/diversity"] for name in SETS]
    assert metrics["eval_drift/diversity"] == pytest.approx((4 * diversities[0] + 6 * diversities[1]) / 10)
    assert min(diversities) <= metrics["eval_drift/diversity"] <= max(diversities)


def test_logs_tables_cards_and_pictures_have_them(trained):
    rows = trained.state.log_history
    assert sum("eval_rewards/bright/mean" in row for row in rows) == 2
    assert sum("eval_ocr_rewards/bright/mean" in row for row in rows) == 2
    assert trained.screen.count("evaluation | bright") == 2  # a line for each, of all sets
    folder = Path(trained.args.output_dir)
    card = CardInputs.load(folder)
    before, after = trained.evaluations[2], trained.evaluations[5]
    assert card.rewards[0].before == pytest.approx(before.rewards[0].mean().item())
    assert card.rewards[0].after == pytest.approx(after.rewards[0].mean().item())
    assert [item.prompt for item in card.gallery] == list(after.gallery) and len(card.gallery) == 2
    assert next(iter(trained.evaluations[4].gallery)) in after.gallery  # something of the second set too
    pictures = {path.name for path in (folder / "images").glob("eval*.png")}
    assert pictures == {f"eval_{name}_step_{step:06d}.png" for name in SETS for step in (0, 2)}


def test_evaluate_takes_sets_and_returns_the_metrics_of_all(tmp_path):
    trainer = small_trainer(tmp_path, reward_funcs=[bright])
    one = trainer.evaluate(SETS["general"])
    both = trainer.evaluate({"one": SETS["general"], "two": SETS["general"]}, metric_key_prefix="eval_x")
    for prefix in ("eval_x", "eval_x_one", "eval_x_two"):
        for what in ("rewards/bright/mean", "rewards/bright/valid", "drift/diversity", "drift/velocity_norm"):
            if f"eval_{what}" in one:
                assert both[f"{prefix}_{what}"] == pytest.approx(one[f"eval_{what}"])
    assert [evaluation.name for evaluation in trainer.evaluations] == [None, "one", "two", None]


def test_the_images_of_each_set_are_edited(tmp_path):
    holed = edit_set().map(lambda row: {"image": None if row["tag"] == "b" else row["image"]})
    with pytest.raises(ValueError, match=r'Row 1 of `eval_dataset\["second"\]` has no image'):
        small_trainer(
            tmp_path,
            pipeline=tiny_flux_kontext(),
            train_dataset=edit_set(),
            eval_dataset={"first": edit_set(), "second": holed},
        )


def test_conversations_train_and_evaluate_as_their_prompts(tmp_path):
    def evaluated(folder, prompts):
        dataset = Dataset.from_dict({"prompt": prompts})
        trainer = small_trainer(folder, train_dataset=dataset, eval_dataset=dataset, max_steps=1)
        trainer.train()
        return trainer.evaluate()

    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert evaluated(tmp_path / "a", conversations) == evaluated(tmp_path / "b", PROMPTS)
