# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Cards with the results of real evaluations of a tiny pipeline."""

import dataclasses
import re

import numpy as np
import pytest
import tiny
from adapter_helpers import FILE, add_trained_adapter, quiet
from datasets import Dataset
from huggingface_hub import ModelCard
from local_hub import card_errors
from PIL import Image

from trl_marble.evaluation import EvaluationConfig, EvaluationResults, compare_evaluations, evaluate_pipeline
from trl_marble.hub import CardInputs, RewardRow, card_from_evaluations, save_adapter


PROMPTS = ["a red dog", "a cat", "red hat", "tree", "big red", "sky"]


def bright(images, **kwargs) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def only_signs(images, source, **kwargs) -> list[float | None]:
    """A reward that applies to one source of prompts."""
    return [value if place == "signs" else None for value, place in zip(bright(images), source, strict=True)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with an adapter, and the evaluations of its base and of itself."""
    folder = tmp_path_factory.mktemp("evaluated")
    pipeline = quiet(tiny.tiny_sd3())
    pipeline.save_pretrained(folder / "my_base")
    add_trained_adapter(pipeline)
    save_adapter(pipeline, folder / "adapter")
    prompts = Dataset.from_dict({"prompt": PROMPTS, "source": ["signs", "things"] * 3})
    results = {
        name: evaluate_pipeline(
            folder / "my_base",
            [bright, only_signs],
            prompts,
            EvaluationConfig(
                str(folder / name),
                adapter=adapter,
                num_generations=2,
                num_inference_steps=2,
                width=16,
                max_sequence_length=16,
            ),
        )
        for name, adapter in (("before", None), ("after", str(folder / "adapter")))
    }
    return folder, results


@pytest.fixture
def adapter(evaluated, tmp_path):
    """A fresh folder with the adapter alone, and the evaluations."""
    folder, results = evaluated
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / FILE).write_bytes((folder / "adapter" / FILE).read_bytes())
    return tmp_path / "mine", results


def cells(card: ModelCard, name: str) -> list[str]:
    line = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", card.content, re.MULTILINE)[0]
    return [cell.strip() for cell in line.split("|")]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.split(" ± ")]


def test_the_numbers_are_those_of_the_evaluations(adapter):
    folder, results = adapter
    card = card_from_evaluations(folder, results)
    tables = {name: result.table for name, result in results.items()}
    for reward in ("bright", "only_signs"):
        before, after, change = (numbers(cell) for cell in cells(card, reward.replace("_", r"\_")))
        for cell, name in ((before, "before"), (after, "after")):
            assert cell == pytest.approx(results[name].summary()[reward], abs=1e-4)
        difference = tables["after"][reward] - tables["before"][reward]
        assert change[0] == pytest.approx(difference.mean(), abs=1e-4) and change[0] != 0
        by_prompt = difference.groupby(tables["after"]["prompt"]).mean().dropna()
        assert change[1] == pytest.approx(by_prompt.std() / len(by_prompt) ** 0.5, abs=1e-4)
    before, after, _ = (numbers(cell) for cell in cells(card, "*diversity within a prompt*"))
    assert before[0] == pytest.approx(results["before"].diversity()[0], abs=1e-4) and before[0] > 0
    assert after[0] == pytest.approx(results["after"].diversity()[0], abs=1e-4)
    assert "Means over 12 images of 6 prompts (2 each, seed 0, 2 solver steps, guidance scale 1)" in card.content
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == pytest.approx(
        {name: mean for name, (mean, _) in results["after"].summary().items()}, rel=1e-5
    )


def test_the_gains_are_those_of_the_comparison(adapter):
    folder, results = adapter
    card_from_evaluations(folder, results)
    row, point = CardInputs.load(folder).gains, compare_evaluations(results).gains["after"]
    assert (row.kl, row.kl_se) == point.kl == results["after"].kl_to_base() and row.kl > 0
    assert (row.worst, row.mean, row.joint_gain) == (point.worst[0], point.mean[0], point.joint_gain[0])
    card_from_evaluations(folder, {"after": results["after"]})
    row = CardInputs.load(folder).gains
    assert row.kl == point.kl[0] and row.worst is row.joint_gain is None
    text = (folder / "README.md").read_text()
    assert "## Gains against drift" in text and "| not measured | not measured |" in text


def test_each_source_has_its_own_averages(adapter):
    folder, results = adapter
    card = card_from_evaluations(folder, results)
    table = results["after"].table
    by_source = card.content.split("| Reward | signs | things |")[1].split("\n\n")[0]
    found = {name: row.split(" | ") for name, row in re.findall(r"^\| (\S+) \| (.*) \|$", by_source, re.MULTILINE)}
    assert found[r"only\_signs"][1] == "–"  # the reward does not apply to the others
    for source, cell in zip(("signs", "things"), found["bright"], strict=True):
        after = float(cell.split(" → ")[1])
        assert after == pytest.approx(table[table["source"] == source]["bright"].mean(), abs=1e-4)


def test_the_pictures_are_the_evaluated_images(adapter):
    folder, results = adapter
    card = card_from_evaluations(folder, results)
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.content)
    assert shown == ["before_after.png", *(f"images/sample_{k}.png" for k in range(6))]
    first = results["after"].table.iloc[0]
    with (
        Image.open(folder / "images" / "sample_0.png") as ours,
        Image.open(results["after"].folder / first["image"]) as original,
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(original))
    assert [item["text"] for item in card.data["widget"]] == PROMPTS
    assert (folder / "before_after.png").stat().st_size > 1000


def test_the_card_of_an_adapter_without_inputs_names_the_evaluated_pipeline(adapter, tmp_path):
    folder, results = adapter
    card = card_from_evaluations(folder, results)
    assert "A LoRA adapter for `my_base`.\n" in card.content and "# mine\n" in card.content
    assert "made with **trl_marble**" not in card.content and "held out" not in card.content
    assert "num_inference_steps=2, guidance_scale=1.0, width=16, max_sequence_length=16" in card.content
    assert "pipeline = StableDiffusion3Pipeline.from_pretrained(" in card.content
    assert card_errors(card.content) == []
    written = (folder / "README.md").read_text() + (folder / "model_card.json").read_text()
    assert str(tmp_path) not in written and str(results["after"].folder.parent) not in written
    assert (folder / "README.md").read_text() == str(card)
    named = card_from_evaluations(folder, results, base_model="acme/base")
    assert named.data.base_model == "acme/base"
    # The inputs are used the next time, but not the rewards of the earlier evaluation.
    fewer = {name: dataclasses.replace(result, reward_names=["bright"]) for name, result in results.items()}
    again = card_from_evaluations(folder, fewer)
    assert again.data.base_model == "acme/base" and [r.metric_type for r in again.data.eval_results] == ["bright"]
    assert r"only\_signs" not in again.content


def test_inputs_of_the_trainer_are_kept_and_other_rewards_are_held_out(adapter):
    folder, results = adapter
    CardInputs(
        repo_name="the trained one",
        rewards=[
            RewardRow("bright", 0.1, 0.2),
            RewardRow("unmeasured", 0.3, 0.4),
            RewardRow("old", 1, 2, held_out=True),
        ],
        pipeline_class="StableDiffusion3Pipeline",
        base_model="acme/base",
        settings={"learning_rate": 0.001},
        balance_plot="balance.png",
    ).save(folder)
    card = card_from_evaluations(folder, results)
    assert "# the trained one\n" in card.content and card.data.base_model == "acme/base"
    assert "| `learning_rate` | `0.001` |" in card.content and "(balance.png)" in card.content
    assert "against 2 rewards at once:\n`bright`, `unmeasured`. It" in card.content
    assert cells(card, r"only\_signs (held out)") and cells(card, "bright")
    assert cells(card, "unmeasured") == ["not measured"] * 3  # not the value of an earlier evaluation
    assert "old" not in [row.name for row in CardInputs.load(folder).rewards]
    of_bright = CardInputs.load(folder).gains
    assert of_bright.worst == of_bright.mean == compare_evaluations(results).gains["after"].gains["bright"][0]
    # Again, and nothing changes.
    assert str(card_from_evaluations(folder, results)) == str(card)


def test_loaded_evaluations_give_the_same_card(adapter):
    folder, results = adapter
    card = card_from_evaluations(folder, results)
    loaded = {name: EvaluationResults.load(result.folder) for name, result in results.items()}
    assert str(card_from_evaluations(folder, loaded)) == str(card)


def test_one_evaluation_has_no_before(adapter):
    folder, results = adapter
    card = card_from_evaluations(folder, {"after": results["after"]})
    before, after, change = cells(card, "bright")
    assert (before, change) == ("not measured", "not measured") and "±" in after
    assert "before_after.png" not in card.content
    assert " → " not in card.content.split("| Reward | signs")[1].split("\n\n")[0]


def test_the_card_has_the_number_of_failed_images(adapter):
    folder, results = adapter
    after = dataclasses.replace(results["after"], failed={"bright": 3, "only_signs": 0})
    card = card_from_evaluations(folder, {"after": after})
    assert "without those for which a reward failed (`bright` for 3)" in card.content


def test_bad_input_is_refused_and_leaves_no_card(adapter, tmp_path):
    folder, results = adapter
    with pytest.raises(FileNotFoundError, match="has no adapter"):
        card_from_evaluations(tmp_path, results)
    with pytest.raises(ValueError, match="There are 0 evaluations"):
        card_from_evaluations(folder, {})
    with pytest.raises(ValueError, match="There are 3 evaluations"):
        card_from_evaluations(folder, {**results, "more": results["after"]})
    other = dataclasses.replace(results["after"], settings=results["after"].settings | {"seed": 1})
    with pytest.raises(ValueError, match="seed"):
        card_from_evaluations(folder, {"before": results["before"], "after": other})
    pipeline = tiny.tiny_sd3()
    add_trained_adapter(pipeline, seed=1)
    save_adapter(pipeline, folder)
    with pytest.raises(ValueError, match="'after' is of .* which is not the adapter in"):
        card_from_evaluations(folder, results)
    assert not (folder / "README.md").exists()
