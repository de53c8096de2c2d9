# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The files of examples/configs: the command line takes them, and they say what they cost."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from trl_marble.cli import train
from trl_marble.cli.estimate import describe, read_settings
from trl_marble.cli.parsing import read_config
from trl_marble.cli.sources import GENERATORS
from trl_marble.rewards import KNOWN_REWARDS


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
RECOMMENDED = {
    "multi_objective_aggregation": "progress",
    "scale_rewards": "group",
    "old_policy_preset": 0,
    "beta": 0.2,
    "num_inference_steps": 10,
}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "docs" / "_tools" / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_first_one_for_every_recipe():
    names = {path.stem for path in RECIPES}
    longs = {name for name in names if not name.endswith("_first")}
    assert len(longs) == 3 and names == longs | {f"{name}_first" for name in longs}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_training_takes_it_and_it_says_what_it_costs(recipe, tool):
    words = ["--config", str(recipe)]
    config, rest = read_config(words)
    assert train.make_parser().take(rest, config) in (
        [],
        ["--num_processes", "8"],
    )  # the latter for `accelerate launch`
    _, script_args, args, num_processes = read_settings(words)
    assert num_processes == (8 if "8gpus" in recipe.stem else 1)
    train.check_evaluation(script_args, args)
    assert set(script_args.rewards) <= set(KNOWN_REWARDS)
    assert tool.updated(recipe) == recipe.read_text(), "run: python docs/_tools/recipes.py"

    settings = yaml.safe_load(recipe.read_text())
    differing = {name for name, value in RECOMMENDED.items() if settings[name] != value}
    memory = re.search(r"Peak memory of one GPU: ([\d.]+) GB", recipe.read_text())[1]
    # Beside CUDA's own; scorers of 6 GB leave the small card while the update runs.
    assert float(memory) + 7 < (24 if "24gb" in recipe.stem else 80)
    if recipe.stem.endswith("_first"):
        assert differing <= {"num_inference_steps"}
        assert args.max_steps == 20 and args.prompts_per_generation == 6
        sources = [source.partition("=")[2].split(":") for source in script_args.prompts]
        assert all(kind in GENERATORS for kind, _ in sources) and sum(int(number) for _, number in sources) == 6
        minutes = re.search(r"([\d.]+) minutes in all", recipe.read_text())[1]
        assert float(minutes) <= 45, "an hour with loading and evaluations"
    else:
        assert not differing and len(script_args.rewards) == 5


def test_the_readme_says_what_its_example_costs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    common = {
        "model": "stabilityai/stable-diffusion-3.5-medium",
        "prompts": ["ocr:2000", "compositional:2000"],
        "rewards": ["pickscore", "clipscore", "ocr", "geneval", "my_rewards.brightness"],
        **{"height": 512, "width": 512, "bf16": True, "activation_checkpointing": True},
    }
    assert 'MarbleConfig("sd3.5m-marble", height=512, width=512, bf16=True, activation_checkpointing=True)' in readme
    for settings in ({}, RECOMMENDED):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(common | settings))
        shown = "\n".join(describe(*read_settings(["--config", str(tmp_path / "run.yaml"), "--gpu", "h100"])))
        assert re.search(r"Passes per step: ([\d,]+)", shown)[1] + " passes" in readme
        assert "about " + re.search(r"[\d.]+ minutes", shown)[0] in readme
