# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A saved adapter is right when a fresh base pipeline that loads it makes the same images."""

import json

import numpy as np
import pytest
import tiny
import torch
from adapter_helpers import FILE, TARGETS, add_trained_adapter, images, quiet
from local_hub import local_hub
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from trl_marble.hub import adapter_state, load_adapter, save_adapter
from trl_marble.hub.files import read_layers
from trl_marble.shapeworld import load_pipeline


FACTORIES = {"sd3": tiny.tiny_sd3, "flux": tiny.tiny_flux}


@pytest.fixture
def trained():
    pipeline = quiet(tiny.tiny_sd3())
    add_trained_adapter(pipeline)
    return pipeline


@pytest.mark.parametrize("family", FACTORIES)
def test_fresh_pipeline_makes_the_same_images(family, tmp_path):
    pipeline = quiet(FACTORIES[family]())
    base = images(pipeline)
    add_trained_adapter(pipeline)
    trained = images(pipeline)
    assert np.abs(trained - base).max() > 0.01

    assert save_adapter(pipeline, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / FILE
    fresh = quiet(FACTORIES[family]())
    fresh.load_lora_weights(tmp_path / "new" / "folder")
    np.testing.assert_allclose(images(fresh), trained, atol=1e-5)  # alpha / r is 3: a rounding apart


@pytest.mark.slow
def test_pushed_adapter_makes_the_same_images_in_another_process(trained, tmp_path):
    save_adapter(trained, tmp_path / "adapter")
    head = """
import sys
import numpy as np, tiny
from adapter_helpers import add_trained_adapter, images, quiet
from huggingface_hub import HfApi
"""
    make = "p = quiet(tiny.tiny_sd3()); add_trained_adapter(p); np.save(sys.argv[1], images(p))"
    use = """
folder, out = sys.argv[1:]
HfApi().create_repo("me/adapter")
HfApi().upload_folder(folder_path=folder, repo_id="me/adapter")
results = []
for source in (folder, "me/adapter"):
    pipeline = quiet(tiny.tiny_sd3())
    pipeline.load_lora_weights(source)
    results.append(images(pipeline))
np.save(out, np.stack(results))
"""
    with local_hub() as hub:
        # In another process: state of other tests cannot change the result.
        hub.run(head + make, str(tmp_path / "expected.npy"), home=tmp_path / "home")
        hub.run(head + use, str(tmp_path / "adapter"), str(tmp_path / "images.npy"), home=tmp_path / "home")
        assert list(hub.files["me/adapter"]) == [FILE]
    from_folder, from_hub = np.load(tmp_path / "images.npy")
    expected = np.load(tmp_path / "expected.npy")
    np.testing.assert_allclose(from_folder, expected, atol=1e-5)
    np.testing.assert_array_equal(from_hub, from_folder)


CONFIGURATIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "alpha below r": {"r": 4, "lora_alpha": 1},
    "rank-stabilized": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 12,
        "rank_pattern": {"transformer_blocks.0.attn.to_q": 2, "to_v": 8},
        "alpha_pattern": {"transformer_blocks.1.attn.to_q": 2, "to_v": 4},
    },
    "patterns, rank-stabilized": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_q": 9}},
    "DoRA": {"r": 4, "lora_alpha": 12, "use_dora": True},
    "with biases": {"r": 4, "lora_alpha": 12, "lora_bias": True},
}


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_tensors_alone_make_the_same_images_as_the_file(configuration, tmp_path):
    pipelines = [quiet(load_pipeline()) for _ in range(4)]
    trained, by_file, by_tensors, by_us = pipelines

    def picture(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a red circle", num_inference_steps=2, guidance_scale=1.0, output_type="np", generator=generator
        ).images

    base = picture(trained)
    settings = {"target_modules": ["attn.to_q", "attn.to_v"], "init_lora_weights": True} | configuration
    add_trained_adapter(trained, std=0.1, **settings)
    right = picture(trained)
    assert np.abs(right - base).max() > 0.01
    before = {key: value.clone() for key, value in adapter_state(trained).items()}
    trained.set_adapters("default", 0.25)  # the file has the trained strength, whatever the one in use
    file = save_adapter(trained, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(trained).items())

    by_file.load_lora_weights(tmp_path)
    by_tensors.load_lora_weights(load_file(file))
    load_adapter(by_us, tmp_path)
    for pipeline in (by_file, by_tensors, by_us):
        np.testing.assert_allclose(picture(pipeline), right, atol=1e-4)
    if not configuration.keys() & {"use_dora", "lora_bias"}:
        assert {layer.scale for layer in read_layers(file).values()} == {1.0}


def test_a_scale_that_cannot_be_part_of_the_weights_stays_in_the_metadata(tmp_path, caplog):
    pipeline = tiny.tiny_sd3()
    pipeline.transformer.table = nn.Embedding(5, 6)
    add_trained_adapter(pipeline, target_modules=["to_q", "table"])
    file = save_adapter(pipeline, tmp_path)
    assert "stays in the file's metadata, because of weights such as 'table.lora_embedding_A'" in caplog.text
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 12
        key = "transformer_blocks.0.attn.to_q.lora_B.weight"
        assert torch.equal(opened.get_tensor(f"transformer.{key}"), adapter_state(pipeline)[key])


def test_other_weights_can_be_saved_instead_of_the_adapters_own(trained, tmp_path):
    zero = {key: torch.zeros_like(value) for key, value in adapter_state(trained).items()}
    save_adapter(trained, tmp_path, zero)
    fresh = quiet(tiny.tiny_sd3())
    base = images(fresh)
    fresh.load_lora_weights(tmp_path)
    np.testing.assert_array_equal(images(fresh), base)


def test_only_the_named_adapter_is_saved(tmp_path):
    pipeline = tiny.tiny_sd3()
    add_trained_adapter(pipeline, "old", seed=1)
    add_trained_adapter(pipeline, "default", seed=2)
    save_adapter(pipeline, tmp_path / "default")
    save_adapter(pipeline, tmp_path / "old", adapter_name="old")
    for name in ("default", "old"):
        with safe_open(tmp_path / name / FILE, "pt") as file:
            saved = {key.removeprefix("transformer."): file.get_tensor(key) for key in file.keys()}
        own = adapter_state(pipeline, name)
        assert saved.keys() == own.keys() and len(own) > 0
        for key, value in own.items():
            assert torch.equal(saved[key], 3 * value if "lora_B" in key else value), key


def test_file_has_alpha_equal_to_r_and_no_path_of_the_machine(trained, tmp_path):
    trained.transformer.peft_config["default"].base_model_name_or_path = str(tmp_path)
    file = save_adapter(trained, tmp_path)
    with safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == metadata["transformer.r"] == 4
    assert metadata["transformer.rank_pattern"] == metadata["transformer.alpha_pattern"] == {}
    assert metadata["transformer.target_modules"] == sorted(TARGETS)
    assert str(tmp_path).encode() not in file.read_bytes()


def test_equal_adapters_are_equal_files(trained, tmp_path):
    copy = tiny.tiny_sd3()
    add_trained_adapter(copy)
    copy.transformer.peft_config["default"].target_modules = set(reversed(TARGETS))
    # Several times, since a random order can be right by chance.
    files = [save_adapter(pipeline, tmp_path / str(i)) for i in range(4) for pipeline in (trained, copy)]
    assert len({file.read_bytes() for file in files}) == 1


def test_state_that_does_not_fit_is_refused(trained, tmp_path):
    state = adapter_state(trained)
    key = sorted(state)[0]
    without = {name: value for name, value in state.items() if name != key}
    with pytest.raises(ValueError, match=f"1 missing .*{key}"):
        save_adapter(trained, tmp_path, without)
    with pytest.raises(ValueError, match="1 unexpected .*surplus"):
        save_adapter(trained, tmp_path, state | {"surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(1, 1\) instead of"):
        save_adapter(trained, tmp_path, state | {key: torch.zeros(1, 1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_and_the_earlier_file_stays(trained, tmp_path, value):
    file = save_adapter(trained, tmp_path)
    earlier = file.read_bytes()
    state = {key: tensor.clone() for key, tensor in adapter_state(trained).items()}
    key = list(state)[1]
    state[key][0, 0] = value
    with pytest.raises(ValueError, match=f"`{key}` of the adapter 'default' is not finite"):
        save_adapter(trained, tmp_path, state)
    assert file.read_bytes() == earlier


def test_missing_adapter_is_named(trained, tmp_path):
    with pytest.raises(ValueError, match="no adapter 'ema' .*has: 'default'"):
        save_adapter(trained, tmp_path, adapter_name="ema")
    with pytest.raises(ValueError, match="has: none"):
        adapter_state(tiny.tiny_sd3())


def test_folder_that_is_a_file_is_refused(trained, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="taken.*Pass a folder"):
        save_adapter(trained, tmp_path / "taken")
