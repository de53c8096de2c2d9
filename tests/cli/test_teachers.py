# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Distillation from the command line: the adapter of one run teaches the next."""

import json

import pytest
import yaml

from trl_marble.cli.main import main
from trl_marble.cli.sources import read_teachers


def test_an_adapter_of_a_run_teaches_the_next_one(workplace, capsys):
    assert main(["train", "--config", "run.yaml", "--learning_rate", "1e-2"]) == 0
    settings = yaml.safe_load((workplace / "run.yaml").read_text())
    del settings["rewards"]
    settings |= {"prompts": ["few=prompts.txt"], "teachers": ["few=run", "all:style=run"], "output_dir": "student"}
    (workplace / "student.yaml").write_text(yaml.safe_dump(settings))
    assert main(["estimate", "--config", "student.yaml", "--seconds_per_pass", "1"]) == 0
    # 4 images at one time: both teachers, and a backward pass for each of them and one for the KL.
    assert "base model 4, teachers 8, forward 4, backward 12)" in capsys.readouterr().out
    assert main(["train", "--config", "student.yaml"]) == 0
    inputs = json.loads((workplace / "student" / "model_card.json").read_text())
    assert inputs["teachers"] == {"few": "run", "all:style": "run"} and inputs["rewards"] == []


def test_teachers_of_words():
    assert read_teachers(["a=me/x", "all:b=folder/y=1"]) == {"a": "me/x", "all:b": "folder/y=1"}
    for word in ("a", "=x", "a="):
        with pytest.raises(ValueError, match="not of the form `source=adapter`"):
            read_teachers([word])
    with pytest.raises(ValueError, match="Two teachers are named 'a'"):
        read_teachers(["a=x", "a=y"])
