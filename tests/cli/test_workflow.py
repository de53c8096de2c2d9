# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""From training to the Hub with nothing but commands, in the order in which a user runs them."""

import json

import pytest
from local_hub import TOKEN, local_hub
from PIL import Image


WORKFLOW = """
import json, sys
from trl_marble.cli.main import main

for command in json.loads(sys.argv[1]):
    print("STATUS", main(command))
"""
TASK = ["--model", "base", "--prompts", "prompts.txt", "--rewards", "my_rewards.bright", "my_rewards.blue"]
SMALL = ["--num_generations", "2", "--num_inference_steps", "2", "--max_sequence_length", "16"]
COMMANDS = [
    ["train", "--config", "run.yaml", "--push_to_hub", "--hub_model_id", "me/trained"],
    ["eval", *TASK, *SMALL, "--output_dir", "evals/base"],
    ["eval", *TASK, *SMALL, "--output_dir", "evals/marble", "--adapter", "run"],
    ["compare", "evals/base", "ours=evals/marble", "--output_dir", "evals/compare"],
    ["card", "run", "--before", "evals/base", "--after", "evals/marble", "--base_model", "me/tiny-sd3"],
    ["push", "run", "me/mine", "--private"],
    ["push", "run", "mine"],
]


@pytest.fixture
def finished(workplace):
    with local_hub() as hub:
        done = hub.run(WORKFLOW, json.dumps(COMMANDS), home=workplace / "home")
        yield hub, done, workplace


@pytest.mark.slow
def test_every_step_leaves_what_the_next_one_needs(finished):
    hub, done, folder = finished
    statuses = [line for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert statuses == ["STATUS 0"] * 6 + ["STATUS 2"], done.stderr
    assert "'mine' is not a repository id" in done.stderr
    assert "They are on the Hub: me/trained" in done.stdout and f"{hub.url}/me/mine" in done.stdout
    assert "Compared with base" in done.stdout and "ours" in done.stdout

    comparison = json.loads((folder / "evals" / "compare" / "comparison.json").read_text())
    assert comparison["gains"]["ours"]["kl"]["mean"] > comparison["gains"]["base"]["kl"]["mean"] == 0
    assert Image.open(folder / "evals" / "compare" / "gain_against_kl.png").width > 1000
    assert "Gains against KL to the base model" in done.stdout
    for evaluation in ("base", "marble"):
        assert len(list((folder / "evals" / evaluation / "images").iterdir())) == 12
        assert (folder / "evals" / evaluation / "contact_sheet.html").is_file()

    weights = (folder / "run" / "pytorch_lora_weights.safetensors").read_bytes()
    assert hub.private == {"me/trained": False, "me/mine": True}
    for repository in hub.files:
        assert hub.files[repository]["pytorch_lora_weights.safetensors"] == weights
    card = hub.text("me/mine", "README.md")
    assert (
        "base_model: me/tiny-sd3" in card and "before_after.png" in card and "before_after.png" in hub.files["me/mine"]
    )
    assert Image.open(folder / "run" / "before_after.png").width > 100
    assert TOKEN not in done.stdout + done.stderr + card
