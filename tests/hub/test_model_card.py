# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import ast
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from adapter_helpers import add_trained_adapter, images, quiet
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import card_errors, local_hub

from trl_marble.evaluation import BalanceSummary, ProgressSummary, summarize_progress
from trl_marble.hub import CardInputs, GalleryItem, RewardRow, build_model_card, save_adapter


BALANCE = BalanceSummary(
    alpha={"composition": 0.2, "reader": 0.8},
    cos_min=0.012,
    conflict=0.0,
    weighted_sum_cos_min=-0.29,
    weighted_sum_conflict=0.83,
    cos={"composition": 0.41, "reader": 0.43},
    heldout_cos={"composition": -0.0312, "reader": None},
    heldout_cos_se={"composition": 0.0081, "reader": None},
    weighted_sum_heldout_cos={"composition": 0.012, "reader": None},
    signal={"composition": 0.046, "reader": None},
)


def full_inputs(**changes) -> CardInputs:
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
    return CardInputs(**(arguments | changes))


def full_card(**changes) -> ModelCard:
    return build_model_card(full_inputs(**changes))


def bare_card(**changes) -> ModelCard:
    arguments = {"repo_name": "bare", "pipeline_class": "FluxPipeline", "rewards": [RewardRow("composition")]}
    return build_model_card(CardInputs(**(arguments | changes)))


def every_section(**changes) -> ModelCard:
    """A card with all parts."""
    return full_card(
        rewards=[
            RewardRow("composition", 0.7, 0.8, 0.01, 0.02, change=0.1, change_se=0.005),
            RewardRow("beauty", 5.0, 4.0, 0.1, 0.1, held_out=True),
        ],
        diversity=RewardRow("diversity within a prompt", 0.13, 0.12, 0.001, 0.001),
        sources={
            "signs": [RewardRow("composition"), RewardRow("beauty", 5.0, 4.5)],
            "a|b": [RewardRow("beauty", 5.0, 3.5)],
        },
        evaluated_on="512 images of 128 prompts",
        **changes,
    )


def section(card: ModelCard, title: str) -> str:
    return card.content.split(f"\n## {title}\n")[1].split("\n## ")[0]


def code(card: ModelCard) -> ast.Module:
    return ast.parse(re.search(r"```python\n(.*?)```", card.content, re.DOTALL)[1])


def call_prompt(card: ModelCard) -> ast.expr:
    """The first argument of the pipeline's call in the example, which is `pipeline(...).images[0]`."""
    return code(card).body[3].value.value.value.args[0]


def test_rewards_are_in_a_table_with_their_change():
    text = section(full_card(), "Rewards before and after")
    assert (
        "| composition | 0.7000 ± 0.0100 | 0.8000 ± 0.0200 | +0.1000 |\n| reader | 21.50 | 21.00 | -0.5000 |" in text
    )


def test_held_out_rewards_and_diversity_are_in_the_table_and_explained():
    card = every_section()
    text = section(card, "Rewards before and after")
    assert "| composition | 0.7000 ± 0.0100 | 0.8000 ± 0.0200 | +0.1000 ± 0.0050 |" in text
    assert "| beauty (held out) | 5.000 ± 0.1000 | 4.000 ± 0.1000 | -1.000 |" in text
    assert "| *diversity within a prompt* | 0.1300 ± 0.0010 | 0.1200 ± 0.0010 | -0.0100 |" in text
    assert "Means over 512 images of 128 prompts, ±" in text
    assert "- *Held out*" in text and "- *Diversity*" in text
    # What the adapter was trained for does not name them.
    assert "against one reward:\n`composition`. It" in card.content
    assert [(r.metric_type, r.metric_name) for r in card.data.eval_results] == [
        ("composition", "composition (before training: 0.7000)"),
        ("beauty", "beauty (held out, before training: 5.000)"),
    ]
    without = section(full_card(), "Rewards before and after")
    assert "*Held out*" not in without and "*Diversity*" not in without


def test_sources_have_a_table_of_their_own():
    text = section(every_section(), "Rewards before and after")
    assert "| Reward | signs | a\\|b |\n|:--|--:|--:|\n" in text
    assert "| composition | – | – |\n| beauty | 5.000 → 4.500 | 5.000 → 3.500 |" in text


def test_the_card_of_an_adapter_that_was_not_trained_here_does_not_claim_it():
    card = every_section(trained_here=False)
    assert "made with **trl_marble**" not in card.content and "2605.06507" not in card.content
    assert "## Training" not in card.content and "balanced" not in card.content
    assert not {"trl_marble", "marble"} & set(card.data.tags)
    assert section(card, "Samples") and section(card, "Rewards before and after")
    assert "\n\n\n" not in card.content and card_errors(card.content) == []


def test_the_examples_run_with_diffusers_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = quiet(tiny.tiny_sd3())
    trained.save_pretrained("base")
    add_trained_adapter(trained)
    save_adapter(trained, "adapter")
    blocks = re.findall(r"```python\n(.*?)```", full_card().content, re.DOTALL)
    assert len(blocks) == 2 and "trl_marble" not in "".join(blocks)
    names = {}
    for block in blocks:
        block = block.replace("stabilityai/stable-diffusion-3.5-medium", "base").replace("me/sd3.5m-marble", "adapter")
        exec(block.replace("path/to/a/new/folder", "fused"), names)
    assert Path("image.png").is_file()
    fused = quiet(DiffusionPipeline.from_pretrained("fused"))
    np.testing.assert_allclose(images(fused), images(trained), atol=1e-5)


def test_balance_of_the_update_and_of_the_weighted_sum():
    text = section(full_card(), "How the rewards were balanced")
    assert "| composition | 0.200 | +0.410 | -0.031 ± 0.008 | +0.012 | 5% |\n" in text
    assert "| reader | 0.800 | +0.430 | not measured | not measured | not measured |\n\nMeans over the run." in text
    old = dataclasses.replace(BALANCE, cos={}, heldout_cos={}, heldout_cos_se={}, signal={})
    text_of_old = section(full_card(balance=old), "How the rewards were balanced")
    assert "| composition | 0.200 |\n| reader | 0.800 |\n\nHeld-out cosines were not measured" in text_of_old
    assert "| +0.0120 | -0.2900 |" in text
    assert "| 0% | 83% |" in text
    assert "(balance.png)" in text


def test_progress_and_the_weights_at_the_end():
    progress = summarize_progress(
        [{"progress/a": 0.1, "progress/weight/a": 1.0}]
        + [{"progress/a": 0.3, "progress/b|": math.nan, "progress/weight/a": 0.25, "progress/weight/b|": 0.75}]
        + [{"train_runtime": 3.0}]
    )
    changes = {"balance": None, "balance_plot": None, "settings": {"multi_objective_aggregation": "progress"}}
    card = full_card(progress=progress, progress_plot="progress.png", **changes)
    text = section(card, "How the rewards were balanced")
    assert "| a | +0.3000 | 0.250 |\n| b\\| | not measured | 0.750 |" in text
    assert "(progress.png)" in text and "(progress.png)" not in full_card(progress=progress, **changes).content
    assert "those that lag weigh most" in card.content and "without MARBLE's balancing" not in card.content


def test_progress_is_in_the_inputs_that_are_saved(tmp_path):
    inputs = full_inputs(progress=ProgressSummary({"a": 0.5}, {"a": 1.0}))
    inputs.save(tmp_path)
    assert CardInputs.load(tmp_path).progress == inputs.progress


def test_missing_values_are_not_measured():
    card = bare_card()
    assert "| composition | not measured | not measured | not measured |" in card.content
    assert "not measured" in section(card, "How the rewards were balanced")
    assert card.data.eval_results is None
    partly = bare_card(rewards=[RewardRow("a", 0.5, float("nan")), RewardRow("b", None, 0.5)])
    assert "| a | 0.5000 | not measured | not measured |" in partly.content
    assert [result.metric_type for result in partly.data.eval_results] == ["b"]


@pytest.mark.parametrize("card", [full_card(), bare_card(), every_section()], ids=["full", "bare", "every section"])
def test_the_card_has_all_sections(card):
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


def test_results_survive_the_hubs_own_parsing(tmp_path):
    card = every_section()
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.eval_results == card.data.eval_results and len(read.data.eval_results) == 2
    metadata = metadata_load(tmp_path / "README.md")
    assert len(metadata["model-index"]) == 1  # of several, the client keeps the last one's name for all
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert (name, results) == ("sd3.5m-marble", card.data.eval_results)
    assert metadata["base_model_relation"] == "adapter"
    assert str(read) == str(card)  # nothing is lost or added by reading


@pytest.mark.parametrize("value", [1e-9, 123456789.123, -0.5])
def test_a_result_keeps_its_digits(value):
    (result,) = bare_card(rewards=[RewardRow("a", None, value)]).data.eval_results
    assert result.metric_value == pytest.approx(value, rel=1e-5)


def test_saved_inputs_are_loaded_again(tmp_path):
    inputs = full_inputs(
        rewards=[RewardRow("a", math.nan, 0.5, held_out=True)],
        diversity=RewardRow("diversity", 0.1, 0.2),
        sources={"signs": [RewardRow("a", 0.1, 0.2)]},
    )
    assert inputs.save(tmp_path) == tmp_path / "model_card.json"
    read = CardInputs.load(tmp_path)
    assert str(build_model_card(read)) == str(build_model_card(inputs))
    # NaN, which JSON does not have, means not measured.
    assert read == dataclasses.replace(inputs.public(), rewards=[RewardRow("a", None, 0.5, held_out=True)])
    CardInputs("bare", [RewardRow("a")]).save(tmp_path)
    assert str(build_model_card(CardInputs.load(tmp_path))) == str(
        build_model_card(CardInputs("bare", [RewardRow("a")]))
    )


def test_inputs_keep_no_path_and_no_token(tmp_path):
    token = "hf_" + "aB3" * 10
    folder = tmp_path / "my_pipeline"
    folder.mkdir()
    full_inputs(
        base_model=str(folder),
        dataset_name=str(folder),
        settings={"hub_token": "my own secret", "note": f"{token} in {folder}", "path": folder, "steps": 10},
        gallery=[GalleryItem("a.png", f"a sign with {token}")],
    ).save(tmp_path)
    text = (tmp_path / "model_card.json").read_text()
    assert token not in text and "my own secret" not in text and str(tmp_path) not in text
    read = CardInputs.load(tmp_path)
    assert (read.base_model, read.settings["path"], read.settings["steps"]) == ("my_pipeline", "my_pipeline", 10)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"repo_name": "a", "new_field": 1}'])
def test_a_damaged_file_of_inputs_is_named(tmp_path, content):
    (tmp_path / "model_card.json").write_text(content)
    with pytest.raises(ValueError, match="model_card.json cannot be read"):
        CardInputs.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        CardInputs.load(tmp_path / "none")


def test_example_loads_this_adapter_as_it_was_trained():
    load, use, call, _ = code(full_card()).body[1:]
    assert ast.unparse(load.value) == (
        "StableDiffusion3Pipeline.from_pretrained('stabilityai/stable-diffusion-3.5-medium')"
    )
    assert ast.unparse(use.value) == "pipeline.load_lora_weights('me/sd3.5m-marble')"
    assert "num_inference_steps=10, guidance_scale=1.0" in ast.unparse(call.value)


@pytest.mark.parametrize(
    ("pipeline_class", "guidance"),
    [
        ("QwenImagePipeline", "true_cfg_scale=1.5"),
        ("ZImagePipeline", "guidance_scale=0.5"),  # its own scale is 1 lower
        ("FluxPipeline", "guidance_scale=1.5"),
        ("SomebodysPipeline", "guidance_scale=1.5"),
    ],
)
def test_example_has_the_guidance_argument_of_the_pipeline(pipeline_class, guidance):
    settings = {"num_inference_steps": 10, "guidance_scale": 1.5}
    call = code(full_card(pipeline_class=pipeline_class, settings=settings)).body[3]
    assert f"num_inference_steps=10, {guidance})" in ast.unparse(call.value)


@pytest.mark.parametrize(
    ("pipeline_class", "edits_images", "arguments"),
    [
        ("StableDiffusion3Pipeline", False, "pipeline('"),
        ("Flux2Pipeline", False, "pipeline(prompt='"),  # its first argument is the image
        ("Flux2Pipeline", True, "pipeline(image=load_image('your_image.png'), prompt='"),
        ("QwenImageEditPipeline", False, "pipeline(image=load_image('your_image.png'), prompt='"),
    ],
)
def test_example_gives_an_image_to_a_pipeline_that_edits(pipeline_class, edits_images, arguments):
    card = full_card(pipeline_class=pipeline_class, edits_images=edits_images)
    source = ast.unparse(code(card))
    assert f"image = {arguments}" in source
    edits = "load_image(" in arguments
    assert ("from diffusers.utils import load_image" in source) == edits
    task = "image-to-image" if edits else "text-to-image"
    assert card.data.pipeline_tag == task and task in card.data.tags


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


def test_the_card_never_has_a_token():
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


@pytest.mark.parametrize(
    ("pipeline_class", "file", "videos"),
    [
        ("WanPipeline", "sample.png", True),
        ("StableDiffusion3Pipeline", "sample.webp", False),
        ("UnlistedPipeline", "sample.webp", True),
        ("UnlistedPipeline", "sample.png", False),
    ],
)
def test_a_card_of_videos_has_their_task_and_example(pipeline_class, file, videos):
    card = full_card(pipeline_class=pipeline_class, gallery=[GalleryItem(file, "a cat")])
    assert card.data.pipeline_tag == ("text-to-video" if videos else "text-to-image")
    assert card.data.pipeline_tag in card.data.tags
    assert {result.task_type for result in card.data.eval_results} == {card.data.pipeline_tag}
    code = card.content.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert ("export_to_video(frames" in code) == videos and (".images[0]" in code) != videos


def test_the_example_has_the_number_of_frames_under_the_familys_own_name():
    settings = {"num_frames": 9, "guidance_scale": 1.0}
    assert "num_frames=9" in full_card(pipeline_class="WanPipeline", settings=settings).content
    assert ", frames=9)" in full_card(pipeline_class="SanaVideoPipeline", settings=settings).content
