# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The modules of the `evaluate` library: alone, combined, batch by batch, and without files."""

import math
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from PIL import Image

from trl_marble.evaluation import PromptDiversity, RewardMean, WinRate, measures, thumbnails
from trl_marble.rollout.diversity import group_diversity


def test_mean_of_a_reward() -> None:
    measured = RewardMean().compute(data=[1.0, 3.0, 5.0, None], groups=[0, 0, 1, 1])
    assert measured == {"mean": 3.0, "standard_error": pytest.approx(4 / 3), "num_valid": 3}


def test_batches_add_up() -> None:
    module = RewardMean()
    module.add_batch(data=[1.0, math.nan], groups=[0, 0])
    module.add(data=4.0, groups=1)
    assert module.compute() == RewardMean().compute(data=[1.0, None, 4.0], groups=[0, 0, 1])


def test_win_rate() -> None:
    counted = WinRate().compute(predictions1=[0.1, 0.5, 0.4], predictions2=[0.2, 0.5, 0.3], groups=[0, 0, 1])
    assert (counted["wins"], counted["ties"], counted["losses"]) == (1, 1, 1)
    assert counted["win_rate"] == 0.5 and counted["p_value"] == 1


def test_images_without_features_do_not_count_for_the_diversity() -> None:
    features = torch.tensor([[0.0, 0.0], [0.6, 0.8], [torch.nan, torch.nan], [0.3, 0.1], [torch.nan, torch.nan]])
    groups = torch.tensor([0, 0, 0, 1, 1])
    diversity = group_diversity(features, groups)
    assert diversity[0].item() == pytest.approx(0.5**0.5) and diversity[1].isnan()


def test_diversity_shows_a_collapse() -> None:
    black, white = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), "white")
    features = thumbnails([black, white, black, black, white])
    measured = PromptDiversity().compute(features=features.numpy(), groups=[0, 0, 1, 1, 2])
    assert measured["per_group"][:2] == [1, 0] and math.isnan(measured["per_group"][2])
    assert measured["diversity"] == 0.5 and measured["standard_error"] == pytest.approx(0.5)


def test_modules_combine() -> None:
    both = evaluate.combine({"reader": RewardMean(), "diversity": PromptDiversity()}, force_prefix=True)
    both.add_batch(data=[1.0, 2.0], groups=[0, 0], features=[[0.0, 1.0], [1.0, 0.0]])
    measured = both.compute()
    assert measured["reader_mean"] == 1.5 and measured["diversity_diversity"] == 1


def test_values_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="could not convert|don't match"):
        RewardMean().compute(data=["good"], groups=[0])
    with pytest.raises(ValueError, match="Mismatch in the number of data"):
        RewardMean().compute(data=[1.0, 2.0], groups=[0])


def test_no_files_are_written_by_default(tmp_path) -> None:
    RewardMean(cache_dir=str(tmp_path / "kept in memory")).compute(data=[1.0], groups=[0])
    assert list(tmp_path.iterdir()) == []
    module = RewardMean(keep_in_memory=False, cache_dir=str(tmp_path))
    module.add_batch(data=[1.0, 2.0], groups=[0, 1])
    assert list(tmp_path.rglob("*.arrow"))
    assert module.compute()["mean"] == 1.5


@pytest.fixture
def load(monkeypatch, tmp_path):
    """`evaluate.load` of a measure's file, with its cache in a temporary folder."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = Path(measures.__file__).parent
    return lambda name: evaluate.load(str(folder / f"{name}.py"), cache_dir=str(tmp_path))


def test_others_load_them_by_path(load) -> None:
    assert load("reward_mean").compute(data=[1.0, 3.0], groups=[0, 1])["mean"] == 2
    diversity = load("prompt_diversity").compute(features=[[0.0, 0.0], [0.6, 0.8]], groups=[0, 0])
    assert diversity["diversity"] == pytest.approx(0.5**0.5)
    assert load("win_rate").compute(predictions1=[0.1, None], predictions2=[0.2, 0.5], groups=[0, 1])["wins"] == 1
