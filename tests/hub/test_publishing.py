# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What real runs leave on a Hub, and what it is good for after a download."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from local_hub import TOKEN, LocalHub, card_errors, local_hub
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_sd3
from trainer_helpers import blue, bright, prompt_set, small_config, small_trainer

from trl_marble import MarbleNFTTrainer
from trl_marble.hub import CardInputs, RewardRow, build_model_card
from trl_marble.hub.publishing import diversity_row, framework_versions, reward_rows


BASE = "me/tiny-sd3"
BALANCE_SETTINGS = ("weighting", "balance_on", "balance_every", "balance_ema")
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")

# One process trains with every strategy; a second one, with an empty cache, uses what it finds on the Hub.
TRAIN = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from trainer_helpers import prompt_set, small_trainer

folder, strategies = Path(sys.argv[1]), sys.argv[2:]
seen = {}
for strategy in strategies:
    trainer = small_trainer(
        folder / f"run-{strategy}",
        pipeline="me/tiny-sd3",
        eval_dataset=prompt_set().select(range(3)),
        eval_on_start=True, eval_strategy="steps", eval_steps=2, num_generations_eval=1,
        save_strategy="steps", save_steps=1, log_images=strategy == "end", num_images_to_log=2,
        report_to="tensorboard" if strategy == "end" else "none",
        push_to_hub=True, hub_strategy=strategy, hub_model_id=f"me/{strategy}", hub_token="hf_local",
        hub_always_push=True,
    )
    trainer.train()
    seen[strategy] = HfApi().list_repo_files(f"me/{strategy}")
    if strategy == "end":
        trainer.push_to_hub()
        seen["first card"] = (folder / "run-end" / "README.md").read_text()
        trainer.args.balance_ema = 0.123
        trainer.push_to_hub("Once more")
late = small_trainer(folder / "run-late", pipeline="me/tiny-sd3")  # of which nothing was said about the Hub
late.push_to_hub(private=True, token="hf_local", model_name="A late one")
print("SEEN " + json.dumps(seen))
"""

USE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import hf_hub_download, snapshot_download
from trainer_helpers import small_trainer

folder = Path(sys.argv[1])

def images(adapter):
    pipeline = StableDiffusion3Pipeline.from_pretrained("me/tiny-sd3")
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np").images

base, pushed, local = images(None), images("me/end"), images(str(folder / "run-end"))
result = {"same": bool(np.array_equal(pushed, local)), "changed": float(np.abs(pushed - base).max())}

card = Path(hf_hub_download("me/end", "README.md")).read_text()
code = card.split("```python")[1].split("```")[0]
code = code.replace('image.save("', f'image.save("{folder}/')
exec(code)
result["size"] = list(image.size)

place = snapshot_download("me/all_checkpoints", allow_patterns="checkpoint-1/*")
resumed = small_trainer(folder / "resumed", pipeline="me/tiny-sd3")
resumed.train(resume_from_checkpoint=str(Path(place) / "checkpoint-1"))
resumed.save_model()
name = "pytorch_lora_weights.safetensors"
original = Path(hf_hub_download("me/all_checkpoints", name)).read_bytes()
result["resumed"] = (folder / "resumed" / name).read_bytes() == original

place = snapshot_download("me/checkpoint", allow_patterns="last-checkpoint/*")
longer = small_trainer(folder / "longer", pipeline="me/tiny-sd3", max_steps=3)
longer.train(resume_from_checkpoint=str(Path(place) / "last-checkpoint"))
longer.save_model()
result["longer"] = longer.state.global_step
result["went on"] = (folder / "longer" / name).read_bytes() != original
print("RESULT " + json.dumps(result))
"""


@dataclass
class Published:
    """The Hub after all runs, the folder they ran in, and what the training process saw."""

    hub: LocalHub
    folder: Path
    seen: dict[str, Any]
    printed: str

    def files(self, strategy: str) -> dict[str, bytes]:
        return self.hub.files[f"me/{strategy}"]

    def card(self, strategy: str) -> str:
        return self.hub.text(f"me/{strategy}", "README.md")

    def metadata(self, strategy: str) -> dict[str, Any]:
        return yaml.safe_load(self.card(strategy).split("---\n")[1])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("publishing")
    tiny_sd3(num_layers=1).save_pretrained(folder / "base")
    with local_hub() as hub:
        base = [path for path in (folder / "base").rglob("*") if path.is_file()]
        hub.files[BASE] = {str(path.relative_to(folder / "base")): path.read_bytes() for path in base}
        hub.commits[BASE] = ["The base pipeline"]
        process = hub.run(TRAIN, str(folder), *STRATEGIES, home=folder / "home")
        seen = json.loads(process.stdout.split("SEEN ")[1].splitlines()[0])
        yield Published(hub, folder, seen, process.stdout + process.stderr)


def without_samples(files: dict[str, bytes]) -> set[str]:
    return {path for path in files if not re.fullmatch(r"images/sample_\d+\.png", path)}


ALWAYS = {"README.md", "model_card.json", "pytorch_lora_weights.safetensors", "balance.png", "gain_against_kl.png"}
CHECKPOINT = {
    "manifest.json",
    "marble_state.json",
    "marble_state.safetensors",
    "optimizer.safetensors",
    "pytorch_lora_weights.safetensors",
    "random_state_0.safetensors",
    "scheduler.safetensors",
    "settings.json",
    "trainer_state.json",
}


def test_end_pushes_only_when_asked(published) -> None:
    assert published.seen["end"] == []
    # Not the logs and grids of images that are in the output folder too.
    assert any((published.folder / "run-end").rglob("*tfevents*"))
    assert without_samples(published.files("end")) == ALWAYS
    assert published.hub.commits["me/end"][-2:] == ["End of training", "Once more"]


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("every_save", []),
        ("checkpoint", ["last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-1", "checkpoint-2"]),
    ],
)
def test_each_strategy_leaves_the_right_files(published, strategy, folders) -> None:
    expected = {f"{folder}/{name}" for folder in folders for name in CHECKPOINT}
    assert without_samples(published.files(strategy)) == ALWAYS | expected
    assert any("step 1" in title for title in published.hub.commits[f"me/{strategy}"])
    assert any("step 2" in title for title in published.hub.commits[f"me/{strategy}"])


def test_what_was_pushed_is_what_was_saved(published) -> None:
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        last = published.folder / f"run-{strategy}" / "checkpoint-2"
        name = "pytorch_lora_weights.safetensors"
        assert published.files(strategy)[name] == (last / name).read_bytes()
    for strategy, place in (("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")):
        for name in CHECKPOINT:
            local = published.folder / f"run-{strategy}" / "checkpoint-2" / name
            assert published.files(strategy)[f"{place}/{name}"] == local.read_bytes()


def test_no_settings_are_pickled_and_no_token_or_path_is_published(published) -> None:
    for strategy in (*STRATEGIES, "run-late"):
        for path, content in published.files(strategy).items():
            assert not path.endswith("training_args.bin")
            assert TOKEN.encode() not in content, path
            assert str(published.folder).encode() not in content, path


def test_the_token_is_in_nothing_that_a_run_writes_or_prints(published) -> None:
    files = [path for path in published.folder.rglob("*") if path.is_file()]
    written = {path.suffix for path in files} | {path.name.split(".")[0] for path in files}
    assert {".json", ".md", ".safetensors", ".png", "events"} <= written  # cards, checkpoints and a tracker's log
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert "bright" in published.printed and TOKEN not in published.printed


def test_a_push_that_the_configuration_did_not_name(published) -> None:
    assert published.hub.private["me/run-late"] and not published.hub.private["me/end"]
    assert published.files("run-late").keys() == {"README.md", "model_card.json", "pytorch_lora_weights.safetensors"}
    assert "\n# A late one\n" in published.card("run-late") and "not measured" in published.card("run-late")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_card_can_be_rendered_again_from_what_was_pushed(published, strategy, tmp_path) -> None:
    (tmp_path / "model_card.json").write_bytes(published.files(strategy)["model_card.json"])
    inputs = CardInputs.load(tmp_path)
    assert str(build_model_card(inputs)) == published.card(strategy)
    assert inputs.model_id == f"me/{strategy}" and [row.name for row in inputs.rewards] == ["bright", "blue"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_card_is_valid_and_whole(published, strategy) -> None:
    card, metadata = published.card(strategy), published.metadata(strategy)
    assert card_errors(card) == []
    assert metadata["base_model"] == BASE
    assert {"lora", "text-to-image"} & set(metadata["tags"]) and metadata["library_name"] == "diffusers"
    title = strategy.replace("_", r"\_")
    assert f"\n# {title}\n" in card  # the repository's name
    assert f'from_pretrained("{BASE}")' in card and f'load_lora_weights("me/{strategy}")' in card
    assert "2605.06507" in card and "2509.16117" in card and "@article" in card
    assert "not measured" not in card
    for setting in ("num_generations", "nft_beta", "learning_rate", "lora_rank"):
        assert f"| `{setting}` | `" in card


def test_the_card_has_the_rewards_before_and_after(published) -> None:
    history = json.loads((published.folder / "run-end" / "checkpoint-2" / "trainer_state.json").read_text())
    evaluations = [row for row in history["log_history"] if "eval_rewards/bright/mean" in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    for name in ("bright", "blue"):
        before, after = (row[f"eval_rewards/{name}/mean"] for row in evaluations)
        (line,) = re.findall(rf"^\| {name} \| .*±.*$", published.card("end"), re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")[2:5]]
        shown = [float(cell.split(" ± ")[0]) for cell in cells]
        assert shown == pytest.approx([before, after, after - before], abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_picture_of_the_card_is_in_the_repository(published, strategy) -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", published.card(strategy))
    shown += [item["output"]["url"] for item in published.metadata(strategy)["widget"]]
    assert "balance.png" in shown and sum(path.startswith("images/sample_") for path in shown) >= 2
    for path in shown:
        assert published.files(strategy)[path].startswith(b"\x89PNG"), path


def test_pushing_again_renders_the_card_anew(published) -> None:
    assert "| `balance_ema` | `0.7` |" in published.seen["first card"]
    assert "| `balance_ema` | `0.123` |" in published.card("end")


def test_images_reach_the_tracker(published) -> None:
    (events,) = (published.folder / "run-end").rglob("events.out.tfevents*")
    log = EventAccumulator(str(events), size_guidance={"images": 0})
    log.Reload()
    found = {tag: len(log.Images(tag)) for tag in log.Tags()["images"]}
    # Grids of rollouts at least ten steps apart; plots at both checkpoints and at the end.
    expected = {"train/images": 1, "eval/images": 2, "plots/balance": 3, "plots/rewards": 3}
    assert {tag: found[tag] for tag in expected} == expected


@pytest.mark.slow
def test_a_download_makes_the_same_images_and_resumes_the_run(published) -> None:
    output = published.hub.run(USE, str(published.folder), home=published.folder / "empty home").stdout
    result = json.loads(output.split("RESULT ")[1].splitlines()[0])
    assert result["same"] and result["changed"] > 0
    assert result["size"] == [16, 16] and (published.folder / "image.png").is_file()  # the card's own example
    assert result["resumed"]
    assert result["longer"] == 3 and result["went on"]


# ---- Cards of unusual runs ----


def silent(images, **kwargs):
    return [None] * len(images)


@pytest.mark.filterwarnings("ignore:Reward `silent` applied to none")
def test_a_reward_that_never_applied_weighs_nothing_in_the_card(tmp_path) -> None:
    trainer = small_trainer(tmp_path, [bright, silent])
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| bright | 1.000 |" in card and "| silent | 0.000 |" in card
    assert (tmp_path / "balance.png").is_file() and "(balance.png)" in card


@pytest.mark.filterwarnings("ignore:Reward `silent` applied to none")
@pytest.mark.parametrize("rewards", [[silent], [bright]])
@pytest.mark.parametrize("aggregation", ["marble", "sum_then_normalize"])
def test_a_run_with_nothing_to_balance_has_a_card(tmp_path, rewards, aggregation) -> None:
    trainer = small_trainer(tmp_path, rewards, multi_objective_aggregation=aggregation)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card_errors(card) == []
    assert ("balance.png" in card) == (tmp_path / "balance.png").is_file()
    # What has no part in a run is not among its settings.
    assert all((f"`{name}`" in card) == (aggregation == "marble") for name in BALANCE_SETTINGS)


def test_held_out_rewards_and_diversity_are_in_the_card(tmp_path) -> None:
    trainer = MarbleNFTTrainer(
        tiny_sd3(num_layers=1),
        reward_funcs=[bright],
        eval_reward_funcs=[blue],
        args=small_config(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True, num_generations_eval=2),
        train_dataset=prompt_set(),
        eval_dataset=prompt_set().select(range(3)),
    )
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "against one reward:\n`bright`. It" in card
    (line,) = re.findall(r"^\| blue \(held out\) \|.*$", card, re.MULTILINE)
    (diversity,) = re.findall(r"^\| \*diversity within a prompt\* \|.*$", card, re.MULTILINE)
    assert "not measured" not in line + diversity and card_errors(card) == []
    (gains,) = re.findall(r"All rewards fell \|\n.*\n(\| .*)$", card, re.MULTILINE)
    assert "not measured" not in gains and "%" in gains
    assert "(gain_against_kl.png)" in card and Image.open(tmp_path / "gain_against_kl.png").width > 1000
    row = CardInputs.load(tmp_path).gains
    last = [logged for logged in trainer.state.log_history if "eval_kl" in logged][-1]
    assert row.kl == last["eval_kl"] > 0 and row.joint_gain == last["eval_joint_gain"]
    assert row.worst == row.mean == last["eval_gain/bright/mean"] and "Held-out rewards are not counted" in card


def test_the_card_names_the_weighting_that_the_trainer_was_given(tmp_path) -> None:
    def halves(gram):
        return torch.full((len(gram),), 1 / len(gram))

    assert small_trainer(tmp_path / "a").summarize().settings["weighting"] == "mgda"
    assert small_trainer(tmp_path / "b", weighting=halves).summarize().settings["weighting"] == "halves"


def test_a_card_can_be_written_before_training(tmp_path) -> None:
    small_trainer(tmp_path).create_model_card("My adapter")
    card = (tmp_path / "README.md").read_text()
    assert card_errors(card) == [] and "# My adapter\n" in card and "| bright | not measured | not measured |" in card


# ---- Before and after, from a log ----


def row(step: int, **means: float) -> dict[str, Any]:
    errors = {f"eval_rewards/{name}/standard_error": 0.1 for name in means}
    return {f"eval_rewards/{name}/mean": mean for name, mean in means.items()} | errors | {"step": step}


def test_before_and_after_are_the_first_and_the_last_evaluation() -> None:
    history = [row(0, a=1.0, b=2.0), {"loss": 1.0, "step": 1}, row(1, a=7.0, b=8.0), row(2, a=3.0, b=4.0)]
    assert reward_rows(["b", "a"], history) == [
        RewardRow("b", before=2.0, after=4.0, before_se=0.1, after_se=0.1),
        RewardRow("a", before=1.0, after=3.0, before_se=0.1, after_se=0.1),
    ]


@pytest.mark.parametrize(
    ("history", "before", "after"),
    [
        ([], None, None),
        ([row(0, a=1.0)], 1.0, None),
        ([row(4, a=3.0)], None, 3.0),  # not before training
        ([row(0, b=1.0), row(4, b=3.0)], None, None),
    ],
)
def test_what_was_not_evaluated_is_not_measured(history, before, after) -> None:
    (found,) = reward_rows(["a"], history)
    assert (found.before, found.after) == (before, after)


def test_a_reward_that_applied_to_nothing_stays_nan() -> None:
    (found,) = reward_rows(["a"], [row(0, a=math.nan), row(1, a=math.nan)])
    assert math.isnan(found.before) and math.isnan(found.after)


def test_diversity_is_that_of_the_same_evaluations() -> None:
    history = [{"eval_drift/diversity": value, "step": step} for value, step in ((0.3, 0), (0.1, 1), (0.2, 2))]
    assert diversity_row(history) == RewardRow("diversity within a prompt", before=0.3, after=0.2)
    assert diversity_row(history[1:]) == RewardRow("diversity within a prompt", before=None, after=0.2)
    assert diversity_row([row(0, a=1.0), row(2, a=2.0)]) is None  # one image a prompt


def test_versions_name_the_packages() -> None:
    versions = framework_versions()
    assert {"trl_marble", "torch", "diffusers", "transformers", "peft"} <= versions.keys()
    assert all(re.match(r"\d+\.\d+", version) for version in versions.values())


def test_saving_leaves_a_card_and_checkpoints_have_none(tmp_path):
    trainer = small_trainer(tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    assert not list((tmp_path / "run").rglob("README.md"))
    trainer.save_model()
    saved = (tmp_path / "run" / "README.md").read_text()
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text() == saved and "# run" in saved and "`bright`" in saved
    assert re.search(r"\| `lora_alpha` \| `64` \|", saved)  # of the training; the file's own is its rank
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "# elsewhere" in (tmp_path / "elsewhere" / "README.md").read_text()
    assert {"pytorch_lora_weights.safetensors", "model_card.json"} <= {
        file.name for file in (tmp_path / "elsewhere").iterdir()
    }


def test_saving_leaves_what_a_person_wrote_as_it_is(tmp_path, caplog):
    trainer = small_trainer(tmp_path)
    (tmp_path / "README.md").write_text("My notes.\n")
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == "My notes.\n" and "is left as it is" in caplog.text
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file() and not (tmp_path / "model_card.json").exists()

    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    trainer.args.balance_ema = 0.123
    trainer.save_model()  # its own card is written again
    again = (tmp_path / "README.md").read_text()
    assert again != card and "`0.123`" in again

    (tmp_path / "README.md").write_text(again + "And a note.\n")
    (tmp_path / "model_card.json").write_text("{")
    caplog.clear()
    trainer.save_model()
    assert (tmp_path / "README.md").read_text() == again + "And a note.\n" and "is left as it is" in caplog.text
