# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Comparing and combining adapters, checked against dense weight changes and images."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from adapter_helpers import FILE, add_trained_adapter, images, quiet
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_marble.hub import combine_adapters, compare_adapters, load_adapter, save_adapter
from trl_marble.hub.files import read_layers


def saved(folder: Path, seed: int = 0, **config) -> Path:
    """A folder with an adapter of `tiny_sd3`."""
    pipeline = tiny.tiny_sd3()
    add_trained_adapter(pipeline, seed=seed, **config)
    save_adapter(pipeline, folder)
    return folder


def dense(adapter: Path) -> dict[str, Tensor]:
    """The change of each layer's weight, as peft computes it in a pipeline that has loaded the adapter."""
    pipeline = tiny.tiny_sd3()
    pipeline.load_lora_weights(adapter)
    return {
        f"transformer.{name}": layer.get_delta_weight("default_0").detach().double()
        for name, layer in pipeline.transformer.named_modules()
        if isinstance(layer, LoraLayer)
    }


def images_with(adapter: Path) -> np.ndarray:
    return images(load_adapter(quiet(tiny.tiny_sd3()), adapter))


# Everything that changes how a layer's scale is found.
VARIANTS = {
    "plain": {},
    "other rank and alpha": {"r": 2, "lora_alpha": 1},
    "other layers": {"target_modules": ["to_q", "ff.net.2"]},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"to_q": 2, "transformer_blocks.1.attn.to_k": 3},
        "alpha_pattern": {"to_k": 5, "0.attn.to_v": 7},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_interpolation_is_the_weighted_sum_of_the_weight_changes(tmp_path, variant, share):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=1, **VARIANTS[variant])
    file = combine_adapters({a: 1 - share, b: share}, tmp_path / "new" / "between")
    assert file == tmp_path / "new" / "between" / FILE
    found, dense_a, dense_b = dense(file.parent), dense(a), dense(b)
    expected = {
        name: (1 - share) * dense_a.get(name, torch.zeros(())) + share * dense_b.get(name, torch.zeros(()))
        for name in dense_a.keys() | dense_b.keys()
    }
    assert found.keys() <= expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(change)), change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shares_0_and_1_make_the_images_of_the_two_adapters(tmp_path, variant):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=1, **VARIANTS[variant])
    for share, end in ((0.0, a), (1.0, b)):
        combine_adapters({a: 1 - share, b: share}, tmp_path / str(share))
        np.testing.assert_allclose(images_with(tmp_path / str(share)), images_with(end), atol=1e-4)
    assert np.abs(images_with(a) - images_with(b)).max() > 0.01


def test_the_file_has_its_ranks_and_also_works_without_metadata(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=1, r=2, target_modules=["to_q"])
    file = combine_adapters({a: 0.75, b: 0.25}, tmp_path / "between")
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    assert set(config["transformer.rank_pattern"].values()) == {6}
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(load_file(file), bare / FILE)
    np.testing.assert_allclose(images_with(bare), images_with(file.parent), atol=1e-6)
    assert combine_adapters({a: 0.75, b: 0.25}, tmp_path / "again").read_bytes() == file.read_bytes()


def test_an_adapter_compared_with_itself(tmp_path):
    a = saved(tmp_path / "a")
    comparison = compare_adapters(a, a / FILE)
    assert comparison.overall.cosine == pytest.approx(1, abs=1e-12) and comparison.overall.relative_norm == 1
    assert comparison.layers.keys() == dense(a).keys()
    assert all(layer.cosine == pytest.approx(1, abs=1e-12) for layer in comparison.layers.values())


@pytest.mark.parametrize("factor", [2.5, -0.5])
def test_a_multiple_differs_in_norm_and_sign_alone(tmp_path, factor):
    a = saved(tmp_path / "a")
    state = load_file(a / FILE)
    with safe_open(a / FILE, "pt") as opened:
        metadata = opened.metadata()
    scaled = {key: factor * value if "lora_B" in key else value for key, value in state.items()}
    save_file(scaled, tmp_path / "b.safetensors", metadata=metadata)
    overall = compare_adapters(a, tmp_path / "b.safetensors").overall
    assert overall.cosine == pytest.approx(math.copysign(1, factor))
    assert overall.relative_norm == pytest.approx(abs(factor))


def test_orthogonal_changes_have_cosine_zero(tmp_path):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    down = torch.eye(4, 32)
    up = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    for name, columns in (("a", down), ("b", down.roll(4, dims=1))):  # B is the same, the rows of A are orthogonal
        save_file(
            {f"{layer}.lora_A.weight": columns.contiguous(), f"{layer}.lora_B.weight": up},
            tmp_path / f"{name}.safetensors",
        )
    overall = compare_adapters(tmp_path / "a.safetensors", tmp_path / "b.safetensors").overall
    assert (overall.cosine, overall.relative_norm) == (0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_comparison_agrees_with_dense_matrices(tmp_path, variant):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=1, **VARIANTS[variant])
    comparison, dense_a, dense_b = compare_adapters(a, b), dense(a), dense(b)
    names = sorted(dense_a.keys() | dense_b.keys())
    assert list(comparison.layers) == names

    def flat(changes: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
        """All changes as one vector, with zeros for the layers of the other adapter alone."""
        return torch.cat([(changes[n] if n in changes else torch.zeros_like(other[n])).flatten() for n in names])

    vector_a, vector_b = flat(dense_a, dense_b), flat(dense_b, dense_a)
    expected = torch.nn.functional.cosine_similarity(vector_a, vector_b, dim=0).item()
    assert comparison.overall.cosine == pytest.approx(expected, abs=1e-6)
    assert comparison.overall.relative_norm == pytest.approx((vector_b.norm() / vector_a.norm()).item(), rel=1e-6)
    for name in dense_a.keys() & dense_b.keys():
        cosine = torch.nn.functional.cosine_similarity(dense_a[name].flatten(), dense_b[name].flatten(), dim=0)
        assert comparison.layers[name].cosine == pytest.approx(cosine.item(), abs=1e-6)


def test_a_layer_of_one_adapter_and_an_untrained_adapter(tmp_path):
    a = saved(tmp_path / "a", target_modules=["to_q"])
    b = saved(tmp_path / "b", target_modules=["to_q", "to_k"])
    only_b = compare_adapters(a, b).layers["transformer.transformer_blocks.0.attn.to_k"]
    assert only_b.norm_a == 0 and only_b.relative_norm == math.inf and math.isnan(only_b.cosine)
    untrained = compare_adapters(saved(tmp_path / "zero", std=0.0), a).overall
    assert untrained.relative_norm == math.inf and math.isnan(untrained.cosine)


def test_a_convolution(tmp_path):
    generator = torch.Generator().manual_seed(0)
    layer = "transformer.pos_embed.proj"
    for name, rank in (("a", 2), ("b", 3)):
        save_file(
            {
                f"{layer}.lora_A.weight": torch.randn(rank, 4, 2, 2, generator=generator),
                f"{layer}.lora_B.weight": torch.randn(8, rank, 1, 1, generator=generator),
            },
            tmp_path / f"{name}.safetensors",
        )
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    file = combine_adapters(dict.fromkeys(paths, 0.5), tmp_path / "between")
    a, b, between = (
        (lora := read_layers(path)[layer]).lora_B.flatten(1) @ lora.lora_A.flatten(1) * lora.scale
        for path in (*paths, file)
    )
    torch.testing.assert_close(between, (a + b) / 2)


# ---- What is refused ----


def test_adapters_of_different_models(tmp_path):
    a = saved(tmp_path / "a")
    flux = tiny.tiny_flux()
    add_trained_adapter(flux, target_modules=["proj_mlp"])
    save_adapter(flux, tmp_path / "flux")
    state = load_file(a / FILE)
    save_file(
        {key: value.repeat(2, 1) for key, value in state.items() if "lora_B" in key}
        | {key: value for key, value in state.items() if "lora_A" in key},
        tmp_path / "wide.safetensors",
    )
    for call in (compare_adapters, lambda a, b: combine_adapters({a: 0.5, b: 0.5}, tmp_path / "out")):
        with pytest.raises(ValueError, match="no layer in common .*same base model"):
            call(a, tmp_path / "flux")
        with pytest.raises(ValueError, match=r"has the shape \(32, 32\) in the first adapter and \(64, 32\)"):
            call(a, tmp_path / "wide.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("weight", "message"), [(math.nan, "is nan; pass a finite"), (0.0, "differs from 0")])
def test_refuses_weights_that_make_no_adapter(tmp_path, weight, message):
    with pytest.raises(ValueError, match=message):
        combine_adapters({saved(tmp_path / "a"): weight}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_number_of_adapters_with_any_weights(tmp_path):
    weights = {saved(tmp_path / str(seed), seed=seed): weight for seed, weight in enumerate((0.5, -0.25, 2.0))}
    found = dense(combine_adapters(weights, tmp_path / "all").parent)
    parts = {adapter: dense(adapter) for adapter in weights}
    for name, change in found.items():
        expected = sum(weight * parts[adapter][name] for adapter, weight in weights.items())
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_is_not_replaced_by_its_mixture(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=1)
    before = (b / FILE).read_bytes()
    with pytest.raises(ValueError, match="is the folder of one of the adapters"):
        combine_adapters({a: 0.5, b / FILE: 0.5}, b)
    assert (b / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_blocks_0.lora_down.weight", "not plain LoRA"),
        ("transformer.x.lora_magnitude_vector", "DoRA and biases"),
        ("base_model.model.x.lora_A.weight", "not plain LoRA"),
        ("transformer.x.lora_A.weight", "not a pair of LoRA factors"),
    ],
)
def test_refuses_files_that_are_not_plain_lora(tmp_path, key, message):
    a = saved(tmp_path / "a")
    save_file(load_file(a / FILE) | {key: torch.ones(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=message):
        compare_adapters(a, tmp_path / "b.safetensors")


def test_dora_is_refused(tmp_path):
    a, dora = saved(tmp_path / "a"), saved(tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        combine_adapters({a: 0.5, dora: 0.5}, tmp_path / "out")


def test_empty_damaged_and_broken_files(tmp_path):
    a = saved(tmp_path / "a")
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes((a / FILE).read_bytes()[:100])
    state = load_file(a / FILE)
    key = sorted(state)[0]
    save_file(state | {key: state[key] / 0}, tmp_path / "infinite.safetensors")
    for name, message in (("empty", "no tensors"), ("damaged", "is damaged"), ("infinite", "are not finite")):
        with pytest.raises(ValueError, match=message):
            compare_adapters(a, tmp_path / f"{name}.safetensors")
