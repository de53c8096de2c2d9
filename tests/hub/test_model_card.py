# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import ast
import re

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import card_errors, local_hub

from trl_marble.evaluation import BalanceSummary
from trl_marble.hub import GalleryItem, RewardRow, build_model_card


BALANCE = BalanceSummary(
    alpha={"composition": 0.2, "reader": 0.8},
    cos_min=0.012,
    conflict=0.0,
    weighted_sum_cos_min=-0.29,
    weighted_sum_conflict=0.83,
)


def full_card(**changes) -> ModelCard:
    arguments = {
        "repo_name": "sd3.5m-marble",
        "model_id": "me/sd3.5m-marble",
        "base_model": "stabilityai/stable-diffusion-3.5-medium",
        "dataset_name": "me/prompts",
        "pipeline_class": "StableDiffusion3Pipeline",
        "rewards": [RewardRow("composition", 0.7, 0.8, 0.01, 0.02), RewardRow("reader", 21.5, 21.0)],
        "balance": BALANCE,
        "settings": {"learning_rate": 3e-4, "num_inference_steps": 10, "guidance_scale": 1.0},
        "gallery": [GalleryItem(f"images/{i}.png", f"prompt {i}") for i in range(5)],
        "balance_plot": "balance.png",
        "before_after": "before_after.png",
        "framework_versions": {"torch": "2.13.0"},
    }
    return build_model_card(**(arguments | changes))


def bare_card(**changes) -> ModelCard:
    arguments = {"repo_name": "bare", "pipeline_class": "FluxPipeline", "rewards": [RewardRow("composition")]}
    return build_model_card(**(arguments | changes))


def section(card: ModelCard, title: str) -> str:
    return card.content.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(card: ModelCard) -> ast.Module:
    return ast.parse(re.search(r"```python\n(.*?)```", card.content, re.DOTALL)[1])


def call_prompt(card: ModelCard) -> ast.expr:
    """The first argument of the pipeline's call in the example, which is `pipeline(...).images[0]`."""
    return code(card).body[3].value.value.value.args[0]


def test_rewards_stand_in_a_table_with_their_change():
    text = section(full_card(), "Rewards before and after")
    assert (
        "| composition | 0.7000 ± 0.0100 | 0.8000 ± 0.0200 | +0.1000 |\n| reader | 21.50 | 21.00 | -0.5000 |" in text
    )


def test_balance_of_the_update_and_of_the_weighted_sum():
    text = section(full_card(), "How the rewards were balanced")
    assert "| composition | 0.200 |\n| reader | 0.800 |" in text
    assert "| +0.0120 | -0.2900 |" in text
    assert "| 0% | 83% |" in text
    assert "(balance.png)" in text


def test_what_was_not_measured_is_said_to_be():
    card = bare_card()
    assert "| composition | not measured | not measured | not measured |" in card.content
    assert "not measured" in section(card, "How the rewards were balanced")
    assert card.data.eval_results is None
    partly = bare_card(rewards=[RewardRow("a", 0.5, float("nan")), RewardRow("b", None, 0.5)])
    assert "| a | 0.5000 | not measured | not measured |" in partly.content
    assert [result.metric_type for result in partly.data.eval_results] == ["b"]


@pytest.mark.parametrize("card", [full_card(), bare_card()], ids=["full", "bare"])
def test_the_card_is_whole(card):
    for title in ("How to use it", "Training settings", "Licence and limits", "Citation"):
        assert section(card, title).strip()
    assert "2605.06507" in section(card, "Citation") and "2509.16117" in section(card, "Citation")
    assert "None" not in card.content and "{{ " not in card.content and "\n\n\n" not in card.content
    assert card_errors(card.content) == []


def test_metadata_is_read_back():
    data = full_card().data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert data.datasets == ["me/prompts"]
    assert {"trl_marble", "marble", "lora"} <= set(data.tags)
    assert data.model_name == "sd3.5m-marble"
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in data.eval_results] == [
        ("composition", 0.8, "me/prompts"),
        ("reader", 21.0, "me/prompts"),
    ]
    assert data["widget"][4] == {"text": "prompt 4", "output": {"url": "images/4.png"}}


def test_example_loads_this_adapter_as_it_was_trained():
    load, use, call, _ = code(full_card()).body[1:]
    assert ast.unparse(load.value) == (
        "StableDiffusion3Pipeline.from_pretrained('stabilityai/stable-diffusion-3.5-medium')"
    )
    assert ast.unparse(use.value) == "pipeline.load_lora_weights('me/sd3.5m-marble')"
    assert "num_inference_steps=10, guidance_scale=1.0" in ast.unparse(call.value)


@pytest.mark.parametrize("make", [str, lambda folder: f"{folder}/"])
def test_local_folder_is_written_as_its_name(make, tmp_path):
    folder = tmp_path / "my_pipeline"
    folder.mkdir()
    card = full_card(
        base_model=make(folder),
        dataset_name=make(folder),
        repo_name=make(folder),
        settings={
            "output_dir": str(folder),
            "resume": folder,
            "note": f"from {folder} and on",
            "nested": {"a": [folder]},
        },
    )
    assert str(tmp_path) not in card.content
    assert "`my_pipeline`" in card.content
    assert card.data.base_model is None and card.data.datasets is None
    assert "| `resume` | `my_pipeline` |" in card.content
    assert "| `note` | `from my_pipeline and on` |" in card.content
    assert card_errors(card.content) == []


def test_relative_folder_that_looks_like_a_repository_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert full_card(base_model="runs/base").data.base_model is None
    assert full_card(base_model="runs/other").data.base_model == "runs/other"


def test_cached_snapshot_is_called_by_its_repository():
    cached = "/home/someone/.cache/huggingface/hub/models--acme--tiny-sd3/snapshots/0123456789abcdef"
    assert full_card(base_model=cached).data.base_model == "acme/tiny-sd3"


@pytest.mark.parametrize("base_model", [r"C:\Users\someone\my_pipeline", "/home/someone/my_pipeline", "", None])
def test_no_base_model_and_folders_of_other_systems(base_model):
    card = full_card(base_model=base_model)
    assert "someone" not in card.content
    assert ("my_pipeline" in card.content) == bool(base_model)
    assert card.data.base_model is None


def test_tokens_never_get_in():
    token = "hf_" + "aB3" * 10
    card = full_card(
        settings={"hub_token": "my own secret", "token": "another", "note": token, "tokens_per_image": 16},
        gallery=[GalleryItem("a.png", f"a sign with {token}")],
    )
    assert token not in card.content
    assert "secret" not in card.content and "another" not in card.content
    assert "| `tokens_per_image` | `16` |" in card.content


def test_baselines_are_not_called_balanced():
    words = "without MARBLE's balancing"
    assert words in full_card(settings={"multi_objective_aggregation": "equal"}).content
    assert words not in full_card(settings={"multi_objective_aggregation": "marble"}).content


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="`rewards` is empty"):
        full_card(rewards=[])
    with pytest.raises(ValueError, match="'/tmp/a.png' is absolute"):
        full_card(gallery=[GalleryItem("/tmp/a.png", "a")])
    with pytest.raises(ValueError, match="is absolute"):
        full_card(balance_plot=r"C:\plots\balance.png")


@settings(deadline=None, max_examples=40)
@given(prompt=st.text(min_size=1, max_size=60), name=st.text(min_size=1, max_size=20))
def test_any_text_leaves_the_cards_structure_alone(prompt, name):
    card = full_card(
        gallery=[GalleryItem("images/a b.png", prompt), GalleryItem("c.png", "plain")],
        rewards=[RewardRow(name, 0.1, 0.2)],
    )
    assert card_errors(card.content) == []
    assert card.data["widget"][0]["text"] == " ".join(prompt.split())
    assert ast.literal_eval(call_prompt(card)) == prompt
    gallery = section(card, "Samples").strip().splitlines()
    assert len(gallery) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in gallery)
    assert "images/a%20b.png" in gallery[0]


def test_the_hub_accepts_the_card_and_a_second_push_keeps_nothing_of_the_first(tmp_path):
    script = """
import sys
from huggingface_hub import HfApi, ModelCard

HfApi().create_repo("me/card")
for path in sys.argv[1:]:
    card = ModelCard.load(path)
    card.validate()
    card.push_to_hub("me/card")
try:
    ModelCard("---\\npipeline_tag: 3\\n---\\ntext").validate()
except ValueError as error:
    print("refused:", error)
"""
    full_card(repo_name="stale", gallery=[GalleryItem("stale.png", "stale")]).save(tmp_path / "first.md")
    bare_card(repo_name="new", rewards=[RewardRow("reader", 0.1, 0.2)]).save(tmp_path / "second.md")
    with local_hub() as hub:
        process = hub.run(script, str(tmp_path / "first.md"), str(tmp_path / "second.md"), home=tmp_path / "home")
        text = hub.text("me/card", "README.md")
        assert len(hub.commits["me/card"]) == 2
    assert "# new" in text and "stale" not in text
    assert 'refused: {"errors"' in process.stdout and "pipeline_tag" in process.stdout
