# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the page for users of `GRPOTrainer` says of both trainers is what they have."""

import dataclasses
import fnmatch
import inspect
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from trl_marble import MarbleConfig, MarbleNFTTrainer


PAGE = (Path(__file__).parents[2] / "docs" / "from_grpo.md").read_text(encoding="utf-8")
SECTIONS = ("Arguments of `GRPOTrainer`", "Sampling", "Rewards and advantages", "Loss", "Logging")


def rows_of(title):
    """The rows of the table below a title, as lists of cells."""
    section = re.split(r"\n#{2,3} ", PAGE.split(f" {title}\n", maxsplit=1)[1])[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names_in(cell):
    return re.findall(r"`([\w*]+)`", cell)


def default_of(config, name):
    (found,) = (field.default for field in dataclasses.fields(config) if field.name == name)
    return found


def names_of(config, trainer):
    return {field.name for field in dataclasses.fields(config)} | set(inspect.signature(trainer.__init__).parameters)


ROWS = [row for title in SECTIONS for row in rows_of(title)]


def test_every_argument_that_is_special_to_grpo_is_on_the_page():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    special = names_of(GRPOConfig, GRPOTrainer) - inherited - {"self"}
    named = {name for row in ROWS for name in names_in(row[0])} | {"reward_processing_classes"}
    assert len(special) > 70
    # Kept for old code, and without a line of its own.
    special -= {"vllm_importance_sampling_cap"}
    assert [name for name in sorted(special) if not any(fnmatch.fnmatchcase(name, pattern) for pattern in named)] == []


@pytest.mark.parametrize(
    "column, config, trainer", [(0, GRPOConfig, GRPOTrainer), (1, MarbleConfig, MarbleNFTTrainer)]
)
def test_arguments_that_the_page_names_exist(column, config, trainer):
    known = names_of(config, trainer)
    named = {name for row in ROWS for name in names_in(row[column])}
    assert len(named) >= 15
    assert [name for name in sorted(named) if not fnmatch.filter(known, name)] == []


def test_what_is_said_of_arguments_is_about_ones_that_exist():
    known = (
        names_of(GRPOConfig, GRPOTrainer)
        | names_of(MarbleConfig, MarbleNFTTrainer)
        | {"mix_prompts", "target_modules"}
    )
    named = {name for row in ROWS for name in names_in(row[2]) if "_" in name}
    assert len(named) >= 10 and named <= known


def test_defaults_are_those_of_both():
    compared = 0
    for row in ROWS:
        if found := re.search(r"default (\S+) \(there ([^) ]+)\)", row[2]):
            (name,) = names_in(row[0])
            for shown, config in zip(found.groups(), (MarbleConfig, GRPOConfig), strict=True):
                assert shown.strip('`"') == str(default_of(config, name)), name
            compared += 1
    assert compared >= 4
    for name, ours, theirs in rows_of("Inherited arguments with another default"):
        for shown, config in ((ours, MarbleConfig), (theirs, GRPOConfig)):
            default = default_of(config, name.strip("`"))
            assert default == (shown if isinstance(default, str) else float(shown)), name
