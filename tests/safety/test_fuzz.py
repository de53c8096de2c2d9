# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Anybody's bytes in every parser: what comes out is a value or the error that is promised, never another one.

`make fuzz` tries many more examples.
"""

import base64
import contextlib
import csv
import io
import json
import math
import os
import socket
import string
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from evaluation_helpers import made_results
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from trl_marble.cli.errors import UsageError
from trl_marble.cli.parsing import ConfigParser, read_config
from trl_marble.cli.train import make_parser
from trl_marble.data import load_prompts
from trl_marble.evaluation import EvaluationResults
from trl_marble.evaluation.records import BatchRecords
from trl_marble.hub import CardInputs, GalleryItem, RewardRow, build_model_card
from trl_marble.hub.files import read_layers
from trl_marble.rewards import RewardError, load_reward
from trl_marble.rewards.remote import RemoteReward
from trl_marble.rewards.server import RewardServer
from trl_marble.rewards.server_messages import RefusedError, read_request
from trl_marble.rewards.vlm_judge import parse_score


# Of the profile: 100, or what `make fuzz` asks for. The second is for what takes longest.
EXAMPLES = settings().max_examples
fuzzed = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
briefly = settings(max_examples=max(20, EXAMPLES // 4), suppress_health_check=list(HealthCheck))

DEEP = "[" * 600 + "]" * 600  # JSON can still be read at this depth, other recursions end
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, math.inf, math.nan])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=12) | st.just("\ud800")
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def changed(tree, places):
    """A copy of nested dicts and lists in which some places have other values, or are gone."""
    copied = json.loads(json.dumps(tree))
    for path, value, remove in places:
        node = copied
        for step in path[:-1]:
            children = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
            if not children:
                break
            chosen = list(children)[step % len(list(children))]
            if not isinstance(node[chosen], dict | list):
                break
            node = node[chosen]
        if isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[path[-1] % len(keys)]
            if remove:
                del node[key]
            else:
                node[key] = value
    return copied


changes = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), values, st.booleans()), min_size=1, max_size=3
)


# ---- Messages of the reward server and its client ----


def png(size=(2, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, format="PNG")
    return file.getvalue()


REQUEST = {"images": [base64.b64encode(png()).decode()], "prompts": ["a"], "columns": {"tag": ["x"], "n": [1]}}


def read(body: bytes) -> None:
    try:
        images, prompts, columns = read_request(body, max_images=4, max_pixels=100)
    except RefusedError as refused:
        assert 400 <= refused.status < 500
        json.dumps(str(refused)).encode("ascii")
    else:
        assert len(images) == len(prompts) <= 4 and all(len(column) == len(images) for column in columns.values())


@fuzzed
@given(st.binary(max_size=200))
@example(DEEP.encode())
@example(b"[" * 100_000)
@example(b"9" * 5000)
@example(b'{"images": [], "prompts": [], "columns": {}}'.replace(b" ", b"\0"))
@example('{"images": []}'.encode("utf-16"))
def test_any_bytes_as_a_request(body):
    read(body)


@fuzzed
@given(changes)
def test_any_change_of_a_request(places):
    read(json.dumps(changed(REQUEST, places)).encode("ascii"))


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 200))
def test_any_change_of_an_image(edits, cut):
    content = bytearray(png())
    for place, byte in edits:
        content[place % len(content)] = byte
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of huge sizes, which are refused
        read(json.dumps(REQUEST | {"images": [base64.b64encode(content[: cut or None]).decode()]}).encode("ascii"))


def zeros(images, **columns):
    return [0.0] * len(images)


@pytest.fixture(scope="module")
def address():
    with RewardServer(zeros, port=0, max_bytes=2000, max_images=4, max_pixels=100, timeout=5) as server:
        yield "127.0.0.1", int(server.url.rpartition(":")[2])


header_text = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=30)


@briefly
@given(
    line=st.just("POST /score/zeros HTTP/1.1") | header_text,
    headers=st.lists(
        st.tuples(
            st.sampled_from(["Content-Length", "Content-Type", "Transfer-Encoding", "Authorization", "X"]), header_text
        ),
        max_size=4,
    ),
    content=st.just(json.dumps(REQUEST).encode()) | st.binary(max_size=50),
    say_length=st.booleans(),
)
def test_any_bytes_on_the_line(address, line, headers, content, say_length):
    if say_length:
        headers = [*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    head = "\r\n".join([line, *(f"{name}: {value}" for name, value in headers)])
    with socket.create_connection(address, timeout=20) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + content)
            connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    if answer:  # a line that is empty is no request
        head, _, told = answer.rpartition(b"\r\n\r\n")
        told = json.loads(told) if told else {"error": "to HEAD"}
        status = int(head.split()[1]) if head.startswith(b"HTTP/") else 400
        assert "values" in told if status == 200 else "error" in told and status < 500 or status in (501, 505)


@fuzzed
@given(st.integers(100, 599), st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
@example(200, DEEP.encode())
@example(200, b'{"values": [%s, 1]}' % DEEP.encode())
@example(500, b'{"error": "\\ud800"}')
def test_any_answer_of_a_server(status, content):
    reward = RemoteReward("http://127.0.0.1:1", "x", token="secret-token")
    try:
        found = reward._values(status, content, 2)
    except RewardError as error:
        assert "secret-token" not in str(error)
    else:
        assert status == 200 and len(found) == 2
        assert all(value is None or isinstance(value, RewardError) or math.isfinite(value) for value in found)


@fuzzed
@given(
    st.lists(
        st.sampled_from(["Final Score", ":", " ", "(", "1", "4.5", "/5", "**", "\n", "out of", "é", "9" * 400]),
        max_size=30,
    ).map("".join)
    | st.text(max_size=80),
)
def test_any_answer_of_a_judge(answer):
    try:
        assert 1 <= parse_score(answer, "Final Score", (1.0, 5.0)) <= 5
    except ValueError as error:
        assert "score" in str(error)


# ---- Configurations ----


@dataclass
class Options:
    """Options of every kind that the commands have."""

    name: str = field(default="x", metadata={"help": "A text."})
    steps: int = field(default=1, metadata={"help": "A number."})
    rate: float | None = field(default=None, metadata={"help": "A number or nothing."})
    fast: bool = field(default=False, metadata={"help": "Yes or no."})
    rewards: list[str] | None = field(default=None, metadata={"help": "Texts."})
    weights: list[float] | None = field(default=None, metadata={"help": "Numbers."})


def configured(file: Path, environment: pytest.MonkeyPatch) -> None:
    """Read a file as the commands do; unknown keys are theirs to refuse."""
    try:
        config, words = read_config(["--config", str(file)])
        parser = ConfigParser(Options)
        parser.take(words, config)
        (options,) = parser.build(words)
    except UsageError as error:
        assert str(error)
    else:
        assert type(options.name) is str and type(options.steps) is int and type(options.fast) is bool


yaml_words = st.sampled_from(
    [
        "name",
        "steps",
        "rate",
        "fast",
        "rewards",
        "weights",
        "env",
        "unknown",
        ": ",
        "- ",
        "\n",
        "  ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
    ]
    + [
        "!!int ",
        "!!bool ",
        "!!timestamp ",
        "!!binary ",
        "!!python/object/apply:os.getcwd ",
        "<<: ",
        "? ",
        "|\n",
        "2024-13-45",
    ]
    + [
        "0x" + "f" * 5000,
        "1:99",
        ".nan",
        ".inf",
        "~",
        "yes",
        "1e5",
        "'",
        '"',
        "#",
        "%YAML 1.1",
        "---",
        "\t",
        "\0",
        "\ufeff",
        "é",
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzzed
@given(st.lists(yaml_words, max_size=25).map("".join).map(str.encode) | st.binary(max_size=60))
@example(b"name: " + b"[" * 20_000)
@example(b"steps: 2024-13-45")
@example(b"steps: !!timestamp no")
@example(b"fast: !!bool no idea")
@example(b"steps: 0x" + b"f" * 5000)
@example(b"env:\n  1: 2\n")
@example(b"env:\n  A=B: 2\n")
@example(b'env:\n  A: "\\0"\n')
@example(b'env:\n  A: "\\ud800"\n')
@example(b"unknown: 0x" + b"f" * 5000)
def test_any_text_as_a_configuration(folder, content):
    (folder / "run.yaml").write_bytes(content)
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr("os.environ", {})
        configured(folder / "run.yaml", environment)


@fuzzed
@given(st.dictionaries(st.sampled_from([*Options.__annotations__, "unknown", "env"]), values, max_size=4))
def test_any_values_as_a_configuration(folder, config):
    try:
        text = yaml.safe_dump(config, allow_unicode=True)
        (folder / "run.yaml").write_text(text, encoding="utf-8")
    except ValueError:  # a number that is too long to be written, or half of a surrogate pair
        return
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr("os.environ", {})
        configured(folder / "run.yaml", environment)


@pytest.fixture(scope="module")
def options_of_training():
    return [action.dest for action in make_parser()._actions if action.dest not in ("help", "config")]


option_values = st.sampled_from(
    [
        0,
        -1,
        1,
        2.5,
        math.nan,
        math.inf,
        True,
        False,
        "",
        "x",
        "yes",
        "no",
        "steps",
        "1e5",
        [],
        ["a"],
        {},
        {"a": 1},
        None,
    ]
    + [10**30, "\ud800", "a\0b", [[1]]]
)


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 1000), option_values), max_size=2))
def test_any_values_as_options_of_training(options_of_training, folder, chosen):
    config = {"model": "shapeworld", "prompts": ["shapeworld"], "rewards": ["shapeworld"], "output_dir": str(folder)}
    config |= {"use_cpu": True, "report_to": "none"}
    config |= {options_of_training[number % len(options_of_training)]: value for number, value in chosen}
    parser = make_parser()
    with pytest.MonkeyPatch.context() as environment, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        environment.setattr("os.environ", dict(os.environ))
        environment.chdir(folder)
        with contextlib.suppress(UsageError):
            parser.take([], config)
            parser.build([])


@pytest.mark.parametrize(
    "option", [{"deepspeed": "x"}, {"accelerator_config": "no-such-file"}, {"save_steps": math.inf}], ids=str
)
def test_options_that_need_what_is_not_there_are_mistakes(folder, option):
    parser = make_parser()
    config = {"model": "shapeworld", "prompts": ["a"], "rewards": ["a"], "output_dir": str(folder), "use_cpu": True}
    parser.take([], config | option)
    with pytest.raises(UsageError, match="the options cannot be used|DeepSpeed is not supported"):
        parser.build([])


# Letters that no module's name starts with: nothing that exists is imported.
@fuzzed
@given(st.text(string.ascii_letters + "._-/ \0é1", max_size=20))
@example("..x")
@example("\0.x")
@example("a..b")
def test_any_text_as_the_name_of_a_reward(name):
    with pytest.raises(ValueError, match="reward"):
        load_reward(f"zzq{name}" if not name.startswith((".", "\0")) else name)


# ---- Prompts ----


def load(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prompts = load_prompts(file)["prompt"][:]
        except ValueError as error:
            assert not isinstance(error, UnicodeError) and str(error)
        else:
            assert prompts and all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)


prompt_text = st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))


@fuzzed
@given(prompt_text)
@example(b"\xef\xbb\xbfa\r\nb\r\n")
@example(b"a\0b\n=1+1\n" + b"x" * 10**6)
@example(b"\xff\xfea\0")
def test_any_text_as_prompts(folder, content):
    (folder / "a.txt").write_bytes(content)
    load(folder / "a.txt")


@fuzzed
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["prompt", "tag", "images", ""]), values, max_size=3) | values, max_size=3
    ).map(lambda records: "\n".join(map(json.dumps, records)).encode())
    | prompt_text,
    st.sampled_from(["jsonl", "json"]),
)
@example(b'{"prompt": "a", "tag": ' + DEEP.encode() + b"}", "jsonl")
@example(b"[" * 100_000, "json")
@example(b'{"prompt": "\\ud800"}', "jsonl")
@example(b'{"": null, "\\u0000": null}', "jsonl")
@example(b'{"prompt": "a", "b\\u0000c": 1}', "jsonl")
@example(b'{"prompt": "a", "n": 9223372036854775808}', "jsonl")
@example(b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "jsonl")
def test_any_json_as_prompts(folder, content, ending):
    (folder / f"a.{ending}").write_bytes(content)
    load(folder / f"a.{ending}")


@settings(max_examples=max(10, EXAMPLES // 10), suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(["prompt", ",", "\n", '"', "a", "\0", "=1+1", "\r", "é", "1"]), max_size=15).map("".join)
)
@example("prompt\na\0b\n")
@example('prompt\n"a')
def test_any_csv_as_prompts(folder, content):
    (folder / "a.csv").write_bytes(content.encode())
    load(folder / "a.csv")


# ---- Files of results, cards and adapters ----


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with an evaluation, its `evaluation.json` as it is and its `scores.csv` as it is."""
    folder = tmp_path_factory.mktemp("evaluated") / "results"
    made_results(folder, {"bright": [0.1, 0.2, 0.3, 0.4]}).save()
    return folder, json.loads((folder / "evaluation.json").read_text()), (folder / "scores.csv").read_text()


def load_results(folder: Path) -> None:
    try:
        results = EvaluationResults.load(folder)
    except ValueError as error:
        assert "is damaged" in str(error)
    else:
        assert results.summary().keys() == set(results.reward_names)
        results.to_table()


@fuzzed
@given(changes)
def test_any_change_of_a_summary_of_results(evaluated, places):
    folder, content, table = evaluated
    (folder / "evaluation.json").write_text(json.dumps(changed(content, places)))
    (folder / "scores.csv").write_text(table)
    load_results(folder)


@fuzzed
@given(
    st.integers(0, 4), st.integers(0, 6), st.text(max_size=10) | st.sampled_from(["../a.png", "/etc/passwd", "9" * 30])
)
def test_any_change_of_a_table_of_results(evaluated, row, column, cell):
    folder, content, table = evaluated
    (folder / "evaluation.json").write_text(json.dumps(content))
    rows = list(csv.reader(io.StringIO(table)))
    rows[row][column] = cell
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    load_results(folder)


@fuzzed
@given(values.map(json.dumps).map(str.encode) | st.binary(max_size=40))
@example(DEEP.encode())
@example(b'{"images": [{"file": 3}], "digest": 1}')
def test_any_record_of_a_batch(folder, content):
    (folder / "records").mkdir(exist_ok=True)
    (folder / "records" / "batch_00000.json").write_bytes(content)
    with pytest.raises(ValueError, match="The record .* is damaged"):
        BatchRecords(folder).read(0)


CARD = CardInputs(
    "run",
    [RewardRow("bright", 0.1, 0.2, 0.01, 0.01, held_out=True)],
    base_model="me/base",
    settings={"guidance_scale": 1.0, "note": "a"},
    gallery=[GalleryItem("images/a.png", "a dog")],
    framework_versions={"torch": "2"},
    sources={"signs": [RewardRow("bright")]},
)


@fuzzed
@given(changes)
@example([([1], 10**400, False)])
def test_any_change_of_a_cards_inputs(folder, places):
    CARD.save(folder)
    file = folder / "model_card.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), places)))
    try:
        inputs = CardInputs.load(folder)
    except ValueError as error:
        assert "model_card.json cannot be read" in str(error)
        return
    with contextlib.suppress(ValueError):  # says what is wrong: an absolute path, no rewards
        build_model_card(inputs).save(folder / "README.md")


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 500))
def test_any_change_of_an_adapters_file(folder, edits, cut):
    import torch
    from safetensors.torch import save

    content = bytearray(
        save(
            {"transformer.x.lora_A.weight": torch.ones(2, 3), "transformer.x.lora_B.weight": torch.ones(3, 2)},
            metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"x": 3}}'},
        )
    )
    for place, byte in edits:
        content[place % len(content)] = byte
    (folder / "a.safetensors").write_bytes(content[: cut or None])
    try:
        (layer,) = read_layers(folder / "a.safetensors").values()
    except ValueError as error:
        assert str(error)
    else:
        assert math.isfinite(layer.scale)
