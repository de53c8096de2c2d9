# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Adapters are found, loaded onto a pipeline, and removed again."""

import logging

import pytest
import torch
from evaluation_helpers import random_adapter
from safetensors.torch import save_file

from trl_marble.pipelines import find_adapter, load_adapter, loaded_adapter


@pytest.fixture
def pipeline(tiny_sd3):
    return tiny_sd3(t5=False, num_layers=1)


@pytest.fixture
def adapter(tiny_sd3, tmp_path):
    return random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path / "adapter")


def weights(pipeline):
    return {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}


def test_an_adapter_is_a_folder_or_a_file(adapter) -> None:
    assert find_adapter(adapter) == find_adapter(adapter.parent) == find_adapter(str(adapter)) == adapter


def test_refuses_files_and_names_that_are_not_adapters(tmp_path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for name, error, message in (
        ("weights.bin", ValueError, "not a .safetensors file"),
        ("missing.safetensors", FileNotFoundError, "does not exist"),
        ("", FileNotFoundError, "has no adapter"),
        ("missing/folder/somewhere", OSError, "neither a folder nor a file"),
    ):
        with pytest.raises(error, match=message):
            find_adapter(tmp_path / name)
    with pytest.raises(OSError, match="There is no adapter `nobody/has-this`"):
        find_adapter("nobody/has-this")


def test_the_pipeline_is_as_it_was_afterwards(pipeline, adapter) -> None:
    before = weights(pipeline)
    with loaded_adapter(pipeline, adapter):
        assert len(weights(pipeline)) > len(before)
    after = weights(pipeline)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ZeroDivisionError), loaded_adapter(pipeline, adapter):
        raise ZeroDivisionError
    assert weights(pipeline).keys() == before.keys()
    assert pipeline.get_list_adapters() == {}


def test_a_file_for_another_model_is_refused(pipeline, tmp_path) -> None:
    file = tmp_path / "other.safetensors"
    names = (f"unet.down.to_q.lora_{part}.weight" for part in "AB")
    save_file({name: torch.zeros(2, 2) for name in names}, file)
    before = weights(pipeline)
    with pytest.raises(ValueError, match="do not fit the StableDiffusion3Pipeline"), loaded_adapter(pipeline, file):
        pass
    assert weights(pipeline).keys() == before.keys()


def test_a_damaged_file_leaves_the_pipeline_alone(pipeline, adapter) -> None:
    adapter.write_bytes(adapter.read_bytes()[:-8])
    before = weights(pipeline)
    with pytest.raises(Exception, match="(?i)header|incomplete|size"), loaded_adapter(pipeline, adapter):
        pass
    assert weights(pipeline).keys() == before.keys()


def test_an_adapter_beside_another_is_refused(pipeline, adapter, tmp_path) -> None:
    random_adapter(pipeline, tmp_path / "own")
    before = weights(pipeline)
    with pytest.raises(ValueError, match=r"adapters already \(default\)"), loaded_adapter(pipeline, adapter):
        pass
    assert weights(pipeline).keys() == before.keys()


def test_no_warning_about_text_encoders_without_adapter_weights(pipeline, adapter, caplog) -> None:
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    try:
        pipeline.load_lora_weights(adapter.parent)
        assert "No LoRA keys associated" in caplog.text  # the warning of diffusers itself
        pipeline.unload_lora_weights()
        caplog.clear()
        load_adapter(pipeline, adapter)
        assert caplog.text == "" and logger.level == logging.WARNING
    finally:
        logger.propagate = False
