# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Adapters in the layouts of other programs: the same images, or an error that names the layout."""

import json

import numpy as np
import pytest
import tiny
import torch
from adapter_helpers import FILE, add_trained_adapter, images, quiet
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from trl_marble.hub import load_adapter, save_adapter


RANK, ALPHA = 4, 12


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The trained weights by the names of the transformer, a published adapter, and the images with it."""
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = quiet(tiny.tiny_sd3())
    add_trained_adapter(pipeline, r=RANK, lora_alpha=ALPHA)
    save_adapter(pipeline, folder)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(pipeline.transformer).items()}
    return state, folder, images(pipeline)


def old_names(key: str) -> str:
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


def kohya_names(key: str, layer_of: str = "transformer_blocks") -> str:
    layer, part = key.rsplit(".lora_", 1)
    layer = layer.replace("transformer_blocks", layer_of).replace(".", "_")
    return f"lora_unet_{layer}.lora_{'down' if part.startswith('A') else 'up'}.weight"


RENAMED = {
    "without prefix": lambda key: key,
    "ComfyUI": lambda key: f"diffusion_model.{key}",
    "ComfyUI, up and down": lambda key: (
        "diffusion_model." + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    ),
    "older diffusers": lambda key: f"transformer.{old_names(key)}",
    "kohya": kohya_names,
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_files_with_other_names_are_loaded(adapter, rename, tmp_path):
    _, folder, trained = adapter
    published = load_file(folder / FILE)
    save_file(
        {rename(key.removeprefix("transformer.")): published[key] for key in published}, tmp_path / "other.safetensors"
    )
    pipeline = load_adapter(quiet(tiny.tiny_sd3()), tmp_path / "other.safetensors")
    np.testing.assert_allclose(images(pipeline), trained, atol=1e-5)


def own_prefix(key):
    return f"transformer.{key}"


def own_prefix_up_and_down(key):
    return own_prefix(key).replace("lora_A", "lora_down").replace("lora_B", "lora_up")


@pytest.mark.parametrize("rename", [kohya_names, RENAMED["ComfyUI, up and down"], own_prefix, own_prefix_up_and_down])
def test_an_alpha_in_the_file_is_the_scale(adapter, rename, tmp_path):
    state, _, trained = adapter
    renamed = {rename(key): value for key, value in state.items()}
    alphas = {key.split(".lora_")[0] + ".alpha": torch.tensor(float(ALPHA)) for key in renamed}
    save_file(renamed | alphas, tmp_path / "other.safetensors")
    pipeline = load_adapter(quiet(tiny.tiny_sd3()), tmp_path / "other.safetensors")
    np.testing.assert_allclose(images(pipeline), trained, atol=1e-5)


def test_a_model_saved_by_itself_has_its_alpha_in_the_header(adapter, tmp_path):
    _, _, trained = adapter
    pipeline = tiny.tiny_sd3()
    add_trained_adapter(pipeline, r=RANK, lora_alpha=ALPHA)
    pipeline.transformer.save_lora_adapter(tmp_path)
    loaded = load_adapter(quiet(tiny.tiny_sd3()), tmp_path)
    np.testing.assert_allclose(images(loaded), trained, atol=1e-5)


def save_as_peft(state, folder, **config):
    folder.mkdir(exist_ok=True)
    weights = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "inference_mode": True,
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_of_peft_is_loaded_with_the_alpha_of_its_configuration(adapter, tmp_path):
    state, _, trained = adapter
    save_as_peft(state, tmp_path)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        np.testing.assert_allclose(images(load_adapter(quiet(tiny.tiny_sd3()), place)), trained, atol=1e-5)
    save_as_peft(state, tmp_path, use_rslora=True, lora_alpha=2 * ALPHA // RANK, alpha_pattern={"to_q": 6})
    rank_stabilized = load_adapter(quiet(tiny.tiny_sd3()), tmp_path)
    np.testing.assert_allclose(images(rank_stabilized), trained, atol=1e-5)


def test_refuses_adapters_of_peft_without_alpha_or_with_more_than_lora(adapter, tmp_path):
    state, _, _ = adapter
    save_as_peft(state, tmp_path, layer_replication=[[0, 1]])
    pipeline = tiny.tiny_sd3()
    with pytest.raises(ValueError, match="sets 'layer_replication' .* more than plain LoRA"):
        load_adapter(pipeline, tmp_path)
    save_as_peft(state, tmp_path, peft_type="LOHA")
    with pytest.raises(ValueError, match="not the configuration of a LoRA"):
        load_adapter(pipeline, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_adapter(pipeline, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="PEFT's layout .*no `adapter_config.json` in the same folder"):
        load_adapter(pipeline, tmp_path)
    assert pipeline.get_list_adapters() == {}


UNKNOWN = {
    "ComfyUI's layout": lambda key: f"diffusion_model.{key.replace('transformer_blocks', 'joint_blocks')}",
    "layout of kohya's scripts": lambda key: kohya_names(key, "joint_blocks"),
    "an unknown layout": lambda key: f"{key}.hada",
}


@pytest.mark.parametrize(("description", "rename"), UNKNOWN.items(), ids=UNKNOWN)
def test_refuses_other_names_of_layers_and_names_the_layout(adapter, description, rename, tmp_path):
    state, _, _ = adapter
    file = tmp_path / "other.safetensors"
    save_file({rename(key): value for key, value in state.items()}, file)
    pipeline = tiny.tiny_sd3()
    with pytest.raises(ValueError, match=f"{description}.*cannot be converted") as raised:
        load_adapter(pipeline, file)
    assert "another model" not in str(raised.value) and rename(min(state)) in str(raised.value)
    assert pipeline.get_list_adapters() == {}


def test_refuses_an_adapter_of_another_model_in_another_layout(adapter, tmp_path):
    state, _, _ = adapter
    save_as_peft(state, tmp_path)
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(tiny.tiny_sd3(num_layers=1), tmp_path)  # some of its layers are there
