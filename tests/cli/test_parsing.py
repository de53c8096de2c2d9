# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""YAML files and command lines, with an eye on what users get wrong."""

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from trl_marble import MarbleConfig
from trl_marble.cli.errors import UsageError
from trl_marble.cli.parsing import ConfigParser, read_config
from trl_marble.cli.yaml_settings import Plain


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
    "written", ["007", "0123457", "1_0", "1:30", "1e3", "2026-01-02", "1.10", "no", "on", "True", "0x1F"]
)
def test_a_text_is_what_is_written(parse, written):
    options, _ = parse(f"name: {written}\nplaces: [{written}, '{written}']\ntools: {written}\n")
    assert options.name == written and options.places == [written, written]


def test_quotes_say_that_a_null_is_a_text(parse):
    assert parse("name: 'null'\ntools: ~\n")[0].name == "null"
    with pytest.raises(UsageError, match="required: --name|`name` has no value"):
        parse("name: null\n")


@pytest.mark.parametrize(("written", "value"), [("0512", 512), ("-3", -3), ("'4'", 4)])
def test_a_whole_number_is_read_in_tens(parse, written, value):
    assert parse(f"name: a\nnumber: {written}\n")[0].number == value


@pytest.mark.parametrize(
    ("written", "value"), [("yes", True), ("Off", False), ("on", True), ("no", False), ("1", True)]
)
def test_a_truth_value_has_many_words(parse, written, value):
    assert parse(f"name: a\nfast: {written}\n")[0].fast is value


def test_a_choice_may_be_a_word_that_yaml_takes_for_something_else(parse):
    @dataclass
    class Choice:
        when: Literal["no", "on"] = "on"

    parser = ConfigParser(Choice)
    parser.take([], {"when": Plain("no")})
    assert parser.build([])[0].when == "no"


def test_inside_a_mapping_values_are_what_they_look_like(parse):
    text = (
        "extra: {rate: 1e-5, steps: 3, old: 007, fast: false, slow: no, name: 'no', text: '3', many: [1, a], none: }"
    )
    extra = {"rate": 1e-5, "steps": 3, "old": "007", "fast": False, "slow": False, "name": "no"}
    extra |= {"text": "3", "many": [1, "a"]}
    assert parse(f"name: a\n{text}\n")[0].extra == extra | {"none": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number: 3\nnumber: 4", "`number` appears twice"),
        ("extra: {a: 1, a: 2}", "`a` appears twice"),
        ("number: !!int 3", "the tag `tag:yaml.org,2002:int` is not read; write the value itself"),
        ("[a, b]: 3", "a key is not a single word"),
    ],
)
def test_what_would_be_lost_or_changed_is_refused(parse, text, message):
    with pytest.raises(UsageError) as caught:
        parse(f"name: a\n{text}\n")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number: 1:30", "argument --number: invalid int value: '1:30'"),
        ("number: 0x200", "argument --number: invalid int value: '0x200'"),
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


def test_options_of_accelerate_launch_are_switches_or_have_values(parse):
    text = "name: a\nmixed_precision: no\nmulti_gpu: on\ndebug: off\nmain_process_port: 0123\n"
    assert parse(text)[1] == ["--mixed_precision", "no", "--multi_gpu", "--main_process_port", "0123"]
    with pytest.raises(UsageError, match="`cpu` is 'maybe'; it takes `true` or `false`"):
        parse("name: a\ncpu: maybe\n")


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
        ("", "has no settings"),
        ("- name\n", "has no settings"),
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


def test_a_list_of_numbers_may_have_places_without_one(tmp_path):
    file = tmp_path / "run.yaml"

    def targets(written):
        file.write_text(
            f"output_dir: x\nuse_cpu: yes\nmulti_objective_aggregation: progress\nreward_targets: {written}\n"
        )
        config, words = read_config(["--config", str(file)])
        parser = ConfigParser(MarbleConfig)
        parser.take(words, config)
        return parser.build(words)[0].reward_targets

    assert targets("[0.9, null, ~, -1, none]") == [0.9, None, None, -1.0, None]
    assert targets("") is None
    with pytest.raises(UsageError, match="reward_targets.*'high'"):
        targets("[0.9, high]")
