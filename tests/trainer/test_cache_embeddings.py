# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run whose prompts were encoded before, without text encoders."""

import pytest
import torch
from trainer_helpers import prompt_set, small_trainer

from trl_marble.trainer.construction import pipeline


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "EMBEDDINGS", tmp_path / "embeddings")
    return tmp_path / "embeddings"


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: weight.detach().clone() for name, weight in trainer.weights.trained.items()}


def test_training_and_evaluation_need_no_text_encoders(tmp_path, folder):
    adapters = []
    for run in range(2):
        settings = {"cache_embeddings": True, "eval_dataset": prompt_set(), "eval_height": 16, "eval_width": 16}
        trainer = small_trainer(tmp_path / f"{run}", **settings)
        assert all(trainer.pipeline.components[f"text_encoder{end}"] is None for end in ("", "_2", "_3"))
        written = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
        adapters.append(adapter_of(trainer))
        assert trainer.evaluate()
        assert written == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert len(written) == len(set(prompt_set()["prompt"])) + 1  # and the empty one
    usual = adapter_of(small_trainer(tmp_path / "usual"))
    for name, weight in usual.items():
        assert torch.equal(adapters[0][name], adapters[1][name])
        torch.testing.assert_close(adapters[0][name], weight, rtol=0.02, atol=1e-4)
    other = prompt_set().map(lambda row: {"prompt": "another " + row["prompt"]})
    with pytest.raises(ValueError, match="not in the cache of embeddings"):
        trainer.evaluate(other)
