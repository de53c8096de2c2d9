# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Micro-steps of the published sizes on fake tensors of a GPU. Run by test_without_a_gpu.py, in its own process."""

import json
from pathlib import Path

import pytest
import torch
from published import BATCH, DEVICE, NUM_REWARDS, micro_step, published


LEVELS = Path(__file__).parents[2] / "docs" / "_tools" / "verified_levels.json"


def test_the_docs_name_these_families():
    assert set(json.loads(LEVELS.read_text())["published size"]) <= set(published())


@pytest.mark.parametrize("name", list(published()))
def test_a_micro_step_of_the_published_size(name):
    model = published()[name]
    report = micro_step(model)
    assert report.billions == pytest.approx(model.billions, rel=0.05)

    results = report.results
    assert {each.device for key, each in results.items()} == {DEVICE}
    assert results["velocity"].shape == results["first"].shape == (BATCH, *model.latents)
    assert len(results["gradients"]) == 2 * NUM_REWARDS + 1
    assert results["gradients"].dtype == torch.float32 and results["gram"].dtype == torch.float64

    # In bf16, but for what is meant to be in fp32: sums over samples of gradients, and inner products of the sums.
    for part, operations in report.parts.items():
        dtypes = {dtypes for _, *dtypes in map(list, operations.products) for dtypes in [tuple(dtypes)]}
        meant = {"backward": {("bfloat16",), ("float32",)}, "balance": {("float64",)}, "loss": set()}
        assert dtypes == meant.get(part, {("bfloat16",)}), part
    # Qwen-Image's pipeline asks whether its mask has padding. What is recorded of the call does not.
    reads = {part: operations.reads for part, operations in report.parts.items() if operations.reads}
    assert reads == ({"pipeline": 1} if name == "QwenImagePipeline" else {})
    # Nothing leaves the GPU, and nothing comes to it once the pipeline has been called.
    copies = {part: dict(operations.copies) for part, operations in report.parts.items() if operations.copies}
    assert set(copies) <= {"pipeline"} and all(
        source in ("cpu", "meta")
        for source, _ in copies.get("pipeline", {})  # tables beside the weights
    )
