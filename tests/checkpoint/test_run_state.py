# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's own files: what goes in comes out, and what does not belong to the run is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from trl_marble.checkpoint.run_state import IDENTITY_FILE, STATE_FILE, base_fingerprint, load_state, save_state
from trl_marble.pipelines import add_trainable_adapter


IDENTITY = {"base_model": "abc", "rewards": ["a", "b"], "lora": {"r": 4, "lora_alpha": 8}, "world_size": 1}


def tensors() -> dict[str, dict[str, torch.Tensor]]:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return {
        "current": {"a/lora_A.weight": torch.nn.Parameter(weight), "b": weight.T},
        "old": {"a/lora_A.weight": weight[1:], "b": weight.to(torch.bfloat16)},
        "balance": {"steps": torch.tensor(3), "alpha": torch.tensor([0.25, float("nan")])},
    }


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_state(tmp_path / "checkpoint-3", tensors(), IDENTITY)
    return tmp_path / "checkpoint-3"


# ---- The fingerprint of the base model ----


def frozen(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    return transformer.requires_grad_(False)


def test_the_same_base_has_one_fingerprint_wherever_it_comes_from(tiny_sd3, tmp_path) -> None:
    transformer = frozen(tiny_sd3().transformer)
    transformer.save_pretrained(tmp_path / "here")
    loaded = frozen(SD3Transformer2DModel.from_pretrained(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = frozen(SD3Transformer2DModel.from_pretrained(tmp_path / "there"))
    assert base_fingerprint(transformer) == base_fingerprint(loaded) == base_fingerprint(moved)


@pytest.mark.parametrize("targets", [["to_q"], ["to_k", "to_out.0", "proj_in"]])
def test_an_adapter_and_its_values_leave_the_fingerprint(tiny_sd3, targets) -> None:
    pipeline = tiny_sd3()
    bare = base_fingerprint(frozen(pipeline.transformer))
    trainable = add_trainable_adapter(pipeline, LoraConfig(r=2, target_modules=targets))
    assert base_fingerprint(pipeline.transformer) == bare
    with torch.no_grad():
        for _, parameter in trainable:
            parameter.add_(1)
    assert base_fingerprint(pipeline.transformer) == bare


def test_another_base_has_another_fingerprint(tiny_sd3) -> None:
    changed = frozen(tiny_sd3().transformer)
    changed.proj_out.bias[0] += 1
    others = [
        frozen(tiny_sd3().transformer),
        frozen(tiny_sd3(seed=1).transformer),
        frozen(tiny_sd3(num_layers=1).transformer),
        frozen(tiny_sd3().transformer).to(torch.bfloat16),
        changed,
    ]
    assert len({base_fingerprint(each) for each in others}) == len(others)


# ---- Writing and reading ----


def test_what_was_saved_is_read_back_bit_for_bit(checkpoint) -> None:
    groups = load_state(checkpoint, IDENTITY)
    assert groups.keys() == tensors().keys()
    for group, members in tensors().items():
        assert groups[group].keys() == members.keys()
        for name, tensor in members.items():
            assert groups[group][name].dtype == tensor.dtype
            torch.testing.assert_close(groups[group][name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_nothing_is_pickled(checkpoint) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == [IDENTITY_FILE, STATE_FILE]
    assert STATE_FILE.endswith(".safetensors") and json.loads((checkpoint / IDENTITY_FILE).read_text())


def test_saving_again_replaces(checkpoint) -> None:
    save_state(checkpoint, {"current": {"b": torch.ones(2)}}, IDENTITY | {"rewards": ["c"]})
    groups = load_state(checkpoint, IDENTITY | {"rewards": ["c"]})
    assert groups.keys() == {"current"} and groups["current"]["b"].tolist() == [1, 1]


# ---- Refusals ----


@pytest.mark.parametrize("file", [STATE_FILE, IDENTITY_FILE])
def test_a_folder_without_a_file_is_refused(checkpoint, file) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"`{checkpoint}` has no `{file}`.*Pass the path of a"):
        load_state(checkpoint, IDENTITY)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_state_is_refused(checkpoint, kept) -> None:
    content = (checkpoint / STATE_FILE).read_bytes()
    (checkpoint / STATE_FILE).write_bytes(content[:kept])
    with pytest.raises(ValueError, match=f"`{checkpoint}` is damaged .*resume from an earlier checkpoint"):
        load_state(checkpoint, IDENTITY)


@pytest.mark.parametrize("content", [b"", b'{"format_version": 1,', b"\xff\xfe", b"3", b"[1, 2]"])
def test_an_identity_that_is_no_json_object_is_refused(checkpoint, content) -> None:
    (checkpoint / IDENTITY_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"`{checkpoint}` is damaged .*resume from an earlier checkpoint"):
        load_state(checkpoint, IDENTITY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model", "xyz"),
        ("rewards", ["b", "a"]),
        ("rewards", ["a"]),
        ("lora", {"r": 8, "lora_alpha": 8}),
        ("world_size", 2),
        ("something_new", 1),
    ],
)
def test_another_run_is_refused_with_both_values(checkpoint, name, value) -> None:
    with pytest.raises(ValueError) as caught:
        load_state(checkpoint, IDENTITY | {name: value})
    for part in (str(checkpoint), f"{name} = {IDENTITY.get(name)!r}", f"this run has {value!r}", "start anew"):
        assert part in str(caught.value)


def test_another_format_is_refused(checkpoint) -> None:
    identity = json.loads((checkpoint / IDENTITY_FILE).read_text())
    (checkpoint / IDENTITY_FILE).write_text(json.dumps(identity | {"format_version": 999}))
    with pytest.raises(ValueError, match="its format is 999, this version reads 3"):
        load_state(checkpoint, IDENTITY)
