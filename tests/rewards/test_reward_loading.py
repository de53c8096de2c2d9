# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards by name and by dotted path."""

import inspect
import sys

import pytest

from trl_marble.rewards import KNOWN_REWARDS, RewardScorer, load_reward
from trl_marble.shapeworld.rewards import calm


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def brightness(images, **kwargs):\n    return [1.0] * len(images)\n"
        "class Sharp:\n    def __call__(self, images, **kwargs):\n        return [2.0] * len(images)\n"
        "number = 3\n"
    )
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def test_dotted_paths_of_functions_and_classes(own_module):
    assert load_reward("trl_marble.shapeworld.rewards.calm") is calm
    assert load_reward("my_rewards.brightness")(images=[None]) == [1.0]
    assert load_reward("my_rewards.Sharp")(images=[None]) == [2.0]
    scorer = RewardScorer(["my_rewards.brightness", calm, "my_rewards.Sharp"])
    assert scorer.names == ["brightness", "calm", "Sharp"]
    assert RewardScorer("my_rewards.brightness").names == ["brightness"]


@pytest.mark.parametrize("name", KNOWN_REWARDS)
def test_every_known_name_gives_a_reward_without_loading_a_model(name):
    for spelling in (name, name.upper()):
        reward = load_reward(spelling)
        assert inspect.signature(reward).parameters.keys() >= {"images"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickscor", r"no reward 'pickscor'. Did you mean 'pickscore'\?"),
        ("zzz", "no reward 'zzz'. Known names: aesthetic, clipscore"),
        ("no_such_module.reward", "no module `no_such_module`"),
        ("trl_marble.no_such.reward", "no module `trl_marble.no_such`"),
        ("my_rewards.darkness", "the module `my_rewards` has no `darkness`"),
        ("my_rewards.number", "is 3, which is not callable"),
    ],
)
def test_refuses_names_that_cannot_be_loaded(own_module, name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def test_an_import_that_fails_inside_the_module_is_not_hidden(own_module):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_reward("needs_more.reward")
