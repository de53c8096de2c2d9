# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""YAML files and command lines, with an eye on what users get wrong."""

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from trl_marble.cli.errors import UsageError
from trl_marble.cli.parsing import ConfigParser, read_config


@dataclass
class Inherited:
    name: str = field(metadata={"help": "Needed."})


@dataclass
class Options(Inherited):
    number: int = 3
    rate: float = 0.5
    places: list[str] | None = None
    kind: Literal["one", "two"] = "one"
    fast: bool = False
    limit: int | None = None
    extra: dict | str | None = None
    tools: None | str | list[str] = None


@pytest.fixture
def parse(tmp_path):
    def parse(text, *words):
        (tmp_path / "run.yaml").write_text(text)
        config, words = read_config(["--config", str(tmp_path / "run.yaml"), *words])
        parser = ConfigParser(Options)
        others = parser.take(words, config)
        (options,) = parser.build(words)
        return options, others

    return parse


def test_the_command_line_comes_before_the_file_and_the_file_before_the_defaults(parse):
    options, others = parse("name: a\nnumber: 4\nrate: 1e-3\nplaces: [x, y]\n", "--number", "5", "--fast")
    assert options == Options("a", number=5, rate=1e-3, places=["x", "y"], fast=True)
    assert others == []


def test_values_of_a_file_are_those_of_the_command_line(parse):
    options, _ = parse("name: 7\nplaces: here\nkind: two\nfast: yes\nlimit:\nextra: {a: 1}\ntools: [x]\n")
    assert options == Options("7", places=["here"], kind="two", fast=True, extra={"a": 1}, tools=["x"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number: 1.5", "argument --number: invalid int value: '1.5'"),
        ("number: many", "argument --number: invalid int value: 'many'"),
        ("number: true", "argument --number: invalid int value: 'true'"),
        ("number: [1, 2]", "`number` is [1, 2]; it takes one value"),
        ("limit: {a: 1}", "`limit` is {'a': 1}; it takes one value"),
        ("places: {a: 1}", "`places` is {'a': 1}; it takes a list"),
        ("places: [[a]]", "`places` is [['a']]; it takes a list of single values"),
        ("number:", "`number` has no value; leave it out to keep 3"),
        ("kind: three", "argument --kind: invalid choice: 'three' (choose from 'one', 'two')"),
        ("fast: perhaps", "argument --fast: Truthy value expected: got perhaps"),
    ],
)
def test_a_bad_value_in_a_file_is_refused(parse, text, message):
    with pytest.raises(UsageError) as caught:
        parse(f"name: a\n{text}\n")
    assert message in str(caught.value)


def test_what_is_not_for_the_parser_is_given_back_in_words(parse):
    _, others = parse("name: a\nprocesses: 2\ncpu: true\ndebug: false\n", "--nodes", "3", "--quick")
    assert others == ["--processes", "2", "--cpu", "--nodes", "3", "--quick"]


def test_a_missing_option_is_named(parse):
    with pytest.raises(UsageError, match="required: --name"):
        parse("number: 1\n")


def test_abbreviations_are_not_options(parse):
    assert parse("name: a\n", "--numb", "4")[1] == ["--numb", "4"]


def test_the_help_shows_what_a_dataclass_adds_before_what_it_inherits():
    shown = ConfigParser(Options, usage="x").format_help()
    places = [
        shown.index(text)
        for text in ("--config", "options of Options", "--kind", "options of Inherited", "--name NAME  ")
    ]
    assert places == sorted(places)


def test_environment_variables_of_the_file_are_set(parse, monkeypatch):
    monkeypatch.setenv("TRL_MARBLE_TEST", "old")
    parse("name: a\nenv: {TRL_MARBLE_TEST: 3}\n")
    assert os.environ["TRL_MARBLE_TEST"] == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [a\n", "is not YAML: while parsing a flow sequence"),
        ("", "holds no settings"),
        ("- name\n", "holds no settings"),
        ("name: a\nenv: 3\n", "`env` in .* is no mapping; write variables"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(parse, text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UsageError, match="`--config nowhere.yaml`: there is no such file"):
        read_config(["--number", "3", "--config=nowhere.yaml"])
    with pytest.raises(UsageError, match="`--config` needs the path of a YAML file"):
        read_config(["--config"])
