# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The parts of an adapter: their names and files, and what diffusers finds of them on a Hub."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_helpers import add_trained_adapter
from local_hub import TOKEN, local_hub
from safetensors.torch import load_file
from tiny import tiny_sd3

from trl_marble.hub import CardInputs, RewardRow, build_model_card, published_files, save_adapter
from trl_marble.hub.files import read_layers
from trl_marble.hub.slider import part_names, split_adapter


NAMES = ["bright", "blue"]
PARTS = ["adapters/blue.safetensors", "adapters/bright.safetensors"]

# Push a run and then a checkpoint of it, and load from the Hub with diffusers alone.
ROUND_TRIP = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from tiny import tiny_sd3
from trl_marble.hub import push_adapter
from trl_marble.hub.publishing import push_checkpoint

folder, checkpoint = map(Path, sys.argv[1:])
push_adapter(folder, "me/slider")
HfApi().create_repo("me/second")
options = {"token": None, "revision": None}
card = lambda: None
for job in push_checkpoint(checkpoint, folder, "me/second", 1, HubStrategy.EVERY_SAVE, card, **options):
    job.result()
pipeline = tiny_sd3(num_layers=1)
pipeline.load_lora_weights("me/slider", adapter_name="whole")
for name in ("bright", "blue"):
    pipeline.load_lora_weights("me/slider", weight_name=f"adapters/{name}.safetensors", adapter_name=name)
pipeline.set_adapters(["bright", "blue"], [0.25, 0.75])
layer = pipeline.transformer.transformer_blocks[0].attn.to_q
print("SEEN " + json.dumps({
    "files": sorted(HfApi().list_repo_files("me/slider")),
    "second": sorted(HfApi().list_repo_files("me/second")),
    "ranks": layer.r, "used": layer.active_adapters, "scaling": layer.scaling,
}))
"""


def make_run(folder):
    """An adapter with two parts and its card."""
    pipeline = tiny_sd3(num_layers=1)
    add_trained_adapter(pipeline, r=4)
    split_adapter(save_adapter(pipeline, folder), NAMES)
    inputs = CardInputs("run", [RewardRow(name) for name in NAMES], parts=part_names(NAMES))
    inputs.save(folder)
    build_model_card(inputs).save(folder / "README.md")
    return pipeline


def test_names_can_be_those_of_files_and_of_modules():
    names = ["reader", "my.reward", "my reward", "<lambda>", "type", "../up", "é", "reader_1", "training", "Up"]
    expected = ["reader", "my_reward", "my_reward_", "lambda", "type_", "up", "reward", "reader_1", "training_", "Up_"]
    assert part_names(names) == expected
    torch.nn.ModuleDict({name: torch.nn.Identity() for name in part_names(names)})


def test_the_mean_of_the_parts_is_the_whole(tmp_path):
    make_run(tmp_path)
    whole, bright, blue = (read_layers(tmp_path / name) for name in ("", "adapters/bright.safetensors", PARTS[0]))
    assert whole.keys() == bright.keys() == blue.keys()
    for name, layer in whole.items():
        assert bright[name].rank == blue[name].rank == 2
        changes = [part.scale * part.lora_B @ part.lora_A for part in (layer, bright[name], blue[name])]
        assert torch.allclose(changes[0], (changes[1] + changes[2]) / 2, atol=1e-5)
        assert not torch.allclose(changes[1], changes[2], atol=1e-1)


@pytest.mark.slow
def test_parts_are_published_with_the_card_that_explains_them_and_diffusers_finds_them(tmp_path):
    folder = tmp_path / "run"
    make_run(folder)
    (folder / "adapters" / "of_another_run.safetensors").write_bytes(b"old")
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(folder, checkpoint, ignore=shutil.ignore_patterns("*.md", "*.json", "of_another*"))
    later = load_file(checkpoint / PARTS[0])
    published = ["README.md", *PARTS, "model_card.json", "pytorch_lora_weights.safetensors"]
    assert published_files(folder) == published
    with local_hub() as hub:
        output = hub.run(ROUND_TRIP, str(folder), str(checkpoint), home=tmp_path / "home").stdout
    seen = json.loads(output.split("SEEN ")[1])
    assert [name for name in seen["files"] if name != ".gitattributes"] == sorted(published) and TOKEN not in output
    assert [name for name in seen["second"] if name != ".gitattributes"] == sorted(published)
    assert seen["ranks"] == {"whole": 4, "bright": 2, "blue": 2} and seen["used"] == ["bright", "blue"]
    assert seen["scaling"]["bright"] == 0.25 and seen["scaling"]["blue"] == 0.75
    assert later.keys() == load_file(folder / PARTS[0]).keys()


def test_a_part_that_the_card_explains_has_to_be_there(tmp_path):
    make_run(tmp_path)
    Path(tmp_path / PARTS[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"explains the adapter 'adapters/blue.safetensors', which is not in"):
        published_files(tmp_path)
