# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Loading and fusing adapters, checked by the images that the pipelines make."""

import json

import numpy as np
import pytest
import tiny
import torch
from adapter_helpers import FILE, add_trained_adapter, images, quiet
from diffusers import DiffusionPipeline
from local_hub import local_hub
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from trl_marble.hub import fuse_adapter, load_adapter, save_adapter


FACTORIES = {"sd3": tiny.tiny_sd3, "flux": tiny.tiny_flux}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter for `tiny_sd3`, and the images of the pipeline without and with it."""
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = quiet(tiny.tiny_sd3())
    base = images(pipeline)
    add_trained_adapter(pipeline)
    save_adapter(pipeline, folder)
    return folder, base, images(pipeline)


def lora_layers(pipeline) -> list[str]:
    return [name for name, module in pipeline.transformer.named_modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("make", [lambda folder: folder, str, lambda folder: folder / FILE])
def test_a_folder_or_file_makes_the_trained_images(adapter, make):
    folder, base, trained = adapter
    pipeline = quiet(tiny.tiny_sd3())
    assert load_adapter(pipeline, make(folder)) is pipeline
    np.testing.assert_allclose(images(pipeline), trained, atol=1e-5)
    assert pipeline.get_active_adapters() == ["default"]


def test_weight_scales_the_change(adapter):
    folder, base, trained = adapter
    pipeline = quiet(tiny.tiny_sd3())
    load_adapter(pipeline, folder, weight=0.0, adapter_name="off")
    np.testing.assert_allclose(images(pipeline), base, atol=1e-6)
    load_adapter(pipeline, folder, weight=0.5, adapter_name="first")
    assert pipeline.get_active_adapters() == ["first"]
    half = images(pipeline)
    assert np.abs(half - base).max() > 0.005 and np.abs(half - trained).max() > 0.005
    # Two times one half is one.
    load_adapter(pipeline, folder, adapter_name="second")
    pipeline.set_adapters(["first", "second"], [0.5, 0.5])
    np.testing.assert_allclose(images(pipeline), trained, atol=1e-5)


def test_an_adapter_of_other_origin_without_metadata_has_alpha_r(adapter, tmp_path):
    folder, _, trained = adapter
    save_file(load_file(folder / FILE), tmp_path / "a.safetensors")
    pipeline = quiet(tiny.tiny_sd3())
    load_adapter(pipeline, tmp_path / "a.safetensors")
    np.testing.assert_allclose(images(pipeline), trained, atol=1e-5)


@pytest.mark.parametrize("family", FACTORIES)
def test_a_fused_pipeline_makes_the_adapters_images_without_it(family, tmp_path):
    trained = quiet(FACTORIES[family]())
    base = images(trained)
    add_trained_adapter(trained)
    save_adapter(trained, tmp_path / "adapter")
    expected = images(trained)
    assert np.abs(expected - base).max() > 0.01

    pipeline = quiet(FACTORIES[family]())
    assert fuse_adapter(pipeline, tmp_path / "adapter", tmp_path / "fused") is pipeline
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-5)
    assert lora_layers(pipeline) == [] and pipeline.get_list_adapters() == {}
    files = [path.suffix for path in (tmp_path / "fused").rglob("*") if path.is_file()]
    assert ".safetensors" in files and ".bin" not in files
    reloaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "fused"))
    np.testing.assert_array_equal(images(reloaded), images(pipeline))


def test_half_fused_is_half_loaded(adapter):
    folder, _, _ = adapter
    loaded = load_adapter(quiet(tiny.tiny_sd3()), folder, weight=0.5)
    fused = fuse_adapter(quiet(tiny.tiny_sd3()), folder, weight=0.5)
    np.testing.assert_allclose(images(fused), images(loaded), atol=1e-5)


def test_a_pipeline_given_by_its_folder_is_loaded_and_left_alone(adapter, tmp_path):
    folder, _, trained = adapter
    tiny.tiny_sd3().save_pretrained(tmp_path / "base")
    before = {path: path.read_bytes() for path in (tmp_path / "base").rglob("*") if path.is_file()}
    pipeline = fuse_adapter(tmp_path / "base", folder)
    np.testing.assert_allclose(images(quiet(pipeline)), trained, atol=1e-5)
    assert {path: path.read_bytes() for path in (tmp_path / "base").rglob("*") if path.is_file()} == before


def peft_files(folder, tmp_path) -> dict[str, bytes]:
    """The same adapter as PEFT writes it."""
    weights = {
        f"base_model.model.{key.removeprefix('transformer.')}": value
        for key, value in load_file(folder / FILE).items()
    }
    save_file(weights, tmp_path / "peft.safetensors")
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}).encode()
    return {"adapter_model.safetensors": (tmp_path / "peft.safetensors").read_bytes(), "adapter_config.json": config}


@pytest.mark.slow
def test_an_adapter_on_the_hub(adapter, tmp_path):
    folder, _, trained = adapter
    script = """
import sys
import numpy as np, tiny
from adapter_helpers import images, quiet
from trl_marble.hub import load_adapter

made = [images(load_adapter(quiet(tiny.tiny_sd3()), name)) for name in ("me/adapter", "me/peft")]
np.save(sys.argv[1], np.stack(made))
for missing in ("me/none", "me/empty"):
    try:
        load_adapter(tiny.tiny_sd3(), missing)
    except OSError as error:
        print(error)
"""
    with local_hub() as hub:
        hub.files["me/adapter"] = {FILE: (folder / FILE).read_bytes()}
        hub.files["me/empty"] = {"README.md": b"nothing"}
        hub.files["me/peft"] = peft_files(folder, tmp_path)
        hub.commits |= {"me/adapter": ["Add"], "me/empty": ["Add"], "me/peft": ["Add"]}
        output = hub.run(script, str(tmp_path / "images.npy"), home=tmp_path / "home").stdout
    for made in np.load(tmp_path / "images.npy"):
        np.testing.assert_allclose(made, trained, atol=1e-5)
    assert "There is no adapter `me/none`" in output and "There is no adapter `me/empty`" in output


# ---- What is refused ----


def test_an_adapter_of_another_model_is_refused_and_changes_nothing(adapter, tmp_path):
    folder, _, _ = adapter
    flux = quiet(tiny.tiny_flux())
    before = images(flux)
    with pytest.raises(
        ValueError, match="made for another model: .* do not fit the FluxPipeline .first: 'transformer"
    ):
        load_adapter(flux, folder)
    # The same names, but other shapes.
    state = load_file(folder / FILE)
    save_file({key: value.repeat(2, 2) for key, value in state.items()}, tmp_path / "wide.safetensors")
    sd3 = tiny.tiny_sd3()
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(sd3, tmp_path / "wide.safetensors")
    # A deeper model of the same kind: diffusers would leave out the layers that the pipeline does not have.
    with pytest.raises(ValueError, match=r"first: 'transformer.transformer_blocks.1"):
        fuse_adapter(tiny.tiny_sd3(num_layers=1), folder)
    assert lora_layers(sd3) == lora_layers(flux) == []
    np.testing.assert_array_equal(images(flux), before)


def test_broken_values_and_weights_are_refused(adapter, tmp_path):
    folder, _, _ = adapter
    state = load_file(folder / FILE)
    key = next(key for key in state if "lora_A" in key)
    save_file(state | {key: torch.full_like(state[key], torch.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="has values that are not finite"):
        load_adapter(tiny.tiny_sd3(), tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="weight=nan is not finite"):
        load_adapter(tiny.tiny_sd3(), folder, weight=float("nan"))


def test_refuses_a_name_in_use_and_adapters_that_would_be_lost(adapter):
    folder, _, _ = adapter
    pipeline = load_adapter(tiny.tiny_sd3(), folder)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        load_adapter(pipeline, folder)
    with pytest.raises(ValueError, match=r"has adapters \(default\), which would be lost"):
        fuse_adapter(pipeline, folder)


@pytest.mark.parametrize("name", ["half", "a.b", ""])
def test_a_name_that_no_module_can_have(adapter, name):
    pipeline = tiny.tiny_sd3()
    with pytest.raises(ValueError, match=f"adapter_name='{name}' cannot be the name"):
        load_adapter(pipeline, adapter[0], adapter_name=name)
    assert lora_layers(pipeline) == []


def test_refuses_a_folder_in_use_before_the_weights_change(adapter, tmp_path):
    folder, base, _ = adapter
    (tmp_path / "something").write_text("")
    pipeline = quiet(tiny.tiny_sd3())
    for place in (tmp_path, tmp_path / "something"):
        with pytest.raises(FileExistsError, match="Pass a new folder"):
            fuse_adapter(pipeline, folder, place)
    np.testing.assert_array_equal(images(pipeline), base)


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.pt", "pytorch_lora_weights.bin"])
def test_pickles_are_refused(adapter, tmp_path, name):
    folder, _, _ = adapter
    torch.save(load_file(folder / FILE), tmp_path / name)
    with pytest.raises(ValueError, match="is not a .safetensors file"):
        load_adapter(tiny.tiny_sd3(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"no `{FILE}`"):
        load_adapter(tiny.tiny_sd3(), tmp_path)


@pytest.mark.parametrize("place", ["../nowhere", "./user/name", "a/b/c", "user/..", "user/a.safetensors"])
def test_refuses_names_that_are_neither_paths_nor_hub_ids(place):
    with pytest.raises(OSError, match="There is no adapter|does not exist"):
        load_adapter(tiny.tiny_sd3(), place)
