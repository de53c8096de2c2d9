# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Files, messages and servers that were made to do harm."""

import base64
import gzip
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tiny
import torch
from adapter_helpers import FILE, add_trained_adapter
from evaluation_helpers import made_results
from local_hub import card_errors
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_marble.cli.errors import UsageError
from trl_marble.cli.parsing import read_config
from trl_marble.evaluation import EvaluationResults
from trl_marble.evaluation.records import BatchRecords, file_digest
from trl_marble.hub import (
    CardInputs,
    GalleryItem,
    RewardRow,
    build_model_card,
    card_from_evaluations,
    load_adapter,
    published_files,
    save_adapter,
)
from trl_marble.hub.files import read_layers
from trl_marble.rewards import RemoteReward, RewardError, VLMJudge
from trl_marble.rewards.server_messages import read_request
from trl_marble.trainer import MarbleConfig


ROOT = Path(__file__).parents[2]


# ---- Adapters ----


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    pipeline = tiny.tiny_sd3(num_layers=1)
    add_trained_adapter(pipeline)
    save_adapter(pipeline, folder)
    return folder / FILE


def with_metadata(adapter, file, **fields):
    """The same adapter with other metadata."""
    with safe_open(adapter, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    metadata |= {f"transformer.{name}": value for name, value in fields.items()}
    save_file(load_file(adapter), file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    return file


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "my_malware"},
        {"megatron_core": "my_malware"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"modules_to_save": ["proj_out"]},
        {"a_field_of_tomorrow": "x"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_metadata_that_asks_for_more_than_plain_lora_is_refused(adapter, tmp_path, fields):
    pipeline = tiny.tiny_sd3(num_layers=1)
    before = {name: weight.clone() for name, weight in pipeline.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=f"sets 'transformer.{list(fields)[0]}' to .*is not loaded"):
        load_adapter(pipeline, with_metadata(adapter, tmp_path / "a.safetensors", **fields))
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_whole_configuration_that_diffusers_writes_is_loaded(adapter, tmp_path):
    pipeline = tiny.tiny_sd3(num_layers=1)
    add_trained_adapter(pipeline)
    metadata = pipeline.transformer.peft_config["default"].to_dict()
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
    assert len(metadata) > 20 and metadata["init_lora_weights"] == "gaussian"
    fresh = tiny.tiny_sd3(num_layers=1)
    load_adapter(fresh, with_metadata(adapter, tmp_path / "a.safetensors", **metadata))
    assert fresh.get_active_adapters() == ["default"]


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", "3", "[" * 100_000, '{"transformer.lora_alpha": "x"}', '{"transformer.lora_alpha": NaN}']
    + ['{"transformer.alpha_pattern": 3}', '{"transformer.alpha_pattern": {"(": 1}}'],
)
def test_metadata_that_is_none_is_refused(adapter, tmp_path, metadata):
    save_file(load_file(adapter), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match="a.safetensors"):
        read_layers(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 3])
def test_a_header_of_impossible_length_is_refused(adapter, tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + adapter.read_bytes()[8:])
    for load in (read_layers, lambda file: load_adapter(tiny.tiny_sd3(num_layers=1), file)):
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 2, 2)])
def test_factors_of_impossible_shape_are_refused(tmp_path, shape):
    parts = {"transformer.x.lora_A.weight": torch.ones(shape), "transformer.x.lora_B.weight": torch.ones(4, shape[0])}
    save_file(parts, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a pair of LoRA factors"):
        read_layers(tmp_path / "a.safetensors")


# ---- What is published ----


@pytest.fixture
def output(adapter, tmp_path):
    """An output folder with an adapter and its card, and a secret beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / FILE).write_bytes(adapter.read_bytes())
    CardInputs("run", [RewardRow("bright")]).save(folder)
    build_model_card(CardInputs("run", [RewardRow("bright")])).save(folder / "README.md")
    (tmp_path / "id_rsa").write_text("secret")
    return folder


@pytest.mark.parametrize("name", ["pytorch_lora_weights_2.safetensors", FILE, "model_card.json", "README.md"])
def test_a_link_out_of_the_folder_is_not_published(output, name):
    (output / name).unlink(missing_ok=True)
    (output / name).symlink_to(output.parent / "id_rsa")
    with pytest.raises(ValueError, match=f"{name} is a link to a file outside"):
        published_files(output)


def test_a_card_has_nothing_but_pictures_published(output):
    (output / ".env").write_text("PASSWORD=x")
    with (output / "README.md").open("a") as card:
        card.write("\n![](.env)\n")
    with pytest.raises(ValueError, match="'.env', which is not the name of a picture"):
        published_files(output)


def test_a_picture_with_an_impossible_name_is_refused(output):
    with (output / "README.md").open("a") as card:
        card.write("\n![](a%00.png)\n")
    with pytest.raises(ValueError, match="is outside"):
        published_files(output)


# ---- Cards ----

HOSTILE = [
    "x\n---\ntags: [stolen]\n---\n# Mine",
    '"); import os; os.system("id")  #',
    "x\n```\n\n<script>alert(1)</script>\n\n```python\n",
    "](javascript:alert(1)) ![x](https://example.com/track.png) [y](https://example.com)",
    "<img src=x onerror=alert(1)>",
    "a | b | c\n| d |",
    "`code` {{ 7 * 7 }} {% raw %}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_others_is_markup_in_a_card(text):
    card = build_model_card(
        CardInputs(
            repo_name=text,
            rewards=[RewardRow(text, 0.1, 0.2), RewardRow("b", 0.1, 0.2, held_out=True)],
            base_model=text,
            dataset_name=text,
            settings={text: text, "multi_objective_aggregation": text, "note": text},
            gallery=[GalleryItem("a.png", text)],
            model_id=text,
            framework_versions={text: text},
            sources={text: [RewardRow(text, 0.1, 0.2)]},
            evaluated_on=text,
        )
    )
    assert card_errors(card.content) == [] and card.data.tags[0] == "trl_marble"
    body = card.text
    outside_code = re.sub(r"```.*?^```|`[^`\n]*`", "", body, flags=re.DOTALL | re.MULTILINE)
    for harm in ("<script", "<img", r"(?<!\\)\]\(javascript:", r"(?<!\\)\]\(https://example.com", r"\b49\b"):
        assert not re.search(harm, outside_code)
    assert not re.search(r"^(---|# Mine|<)", body, re.MULTILINE)
    blocks = re.findall(r"^```python\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        calls = [line for line in block.splitlines() if line and not line.startswith(("from ", "#", ")", " "))]
        assert len(calls) <= 4 and compile(block, "card", "exec") and not re.search(r"^import", block, re.MULTILINE)


def test_a_pipelines_class_that_is_code_is_refused():
    with pytest.raises(ValueError, match="is not the name of a class"):
        build_model_card(CardInputs("a", [RewardRow("b")], pipeline_class="X\nimport os"))


# ---- Evaluations ----


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd", "images/link.png", "images/../../secret.png"])
def test_an_image_outside_an_evaluation_is_neither_shown_nor_published(adapter, tmp_path, image):
    folder = tmp_path / "results"
    results = made_results(folder, {"bright": [0.1, 0.2]})
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    results.table.loc[1, "image"] = image
    results.save()
    with pytest.raises(ValueError, match="which is not in the folder"):
        EvaluationResults.load(folder)


def test_a_record_that_leads_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = tmp_path / "results"
    records = BatchRecords(folder)
    record = records.save_image(0, "a", Image.new("RGB", (16, 16)), torch.zeros(1), torch.zeros(1, dtype=bool))
    records.write(0, [record])
    assert records.read(0) == [record]
    records.write(
        0, [type(record)(**vars(record) | {"file": "../secret.png", "sha256": file_digest(tmp_path / "secret.png")})]
    )
    with pytest.raises(ValueError, match="names the image '../secret.png', which is not in the folder"):
        records.read(0)


def test_images_of_an_evaluation_are_decoded_as_png_only(adapter, tmp_path):
    results = made_results(tmp_path / "results", {"bright": [0.1, 0.2]}, adapter="x")
    results.settings.update(adapter_digest=None, num_inference_steps=1, guidance_scale=1.0)
    for file in results.table["image"]:
        (tmp_path / "results" / file).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / FILE).write_bytes(adapter.read_bytes())
    with pytest.raises(OSError, match="cannot identify image file"):
        card_from_evaluations(folder, {"after": results})


# ---- Configurations ----


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"`\*a0` is an alias; write the value itself"):
        read_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("env", ["env: HF_TOKEN=hf_verysecret", "env: [hf_verysecret]", "env:\n  T: [hf_verysecret]"])
def test_a_mistake_beside_a_token_does_not_show_it(tmp_path, env):
    (tmp_path / "run.yaml").write_text(env)
    with pytest.raises(UsageError) as error:
        read_config(["--config", str(tmp_path / "run.yaml")])
    assert "verysecret" not in str(error.value)


# ---- Images in requests ----


def request_of(png: bytes) -> bytes:
    content = {"images": [base64.b64encode(png).decode()], "prompts": ["p"], "columns": {}}
    return json.dumps(content).encode()


def test_nothing_but_pixels_of_an_image_is_kept():
    text = PngImagePlugin.PngInfo()
    for number in range(5):
        text.add_text(f"key {number}", "x" * 2**19, zip=True)
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(file, format="PNG", pnginfo=text)
    assert len(file.getvalue()) < 10_000
    ((image,), _, _) = read_request(request_of(file.getvalue()), 4, 100)
    assert image.getpixel((2, 1)) == (1, 2, 3) and image.info == {} and type(image) is Image.Image


def test_an_image_with_a_hundred_megabytes_of_text_is_refused():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, format="PNG")
    text = zlib.compress(bytes(2**20))
    chunks = b"".join(chunk(b"zTXt", b"key%d\0\0" % number + text) for number in range(100))
    head, data = file.getvalue()[:33], file.getvalue()[33:]
    with pytest.raises(Exception, match="is not a PNG file|is a broken PNG file"):
        read_request(request_of(head + chunks + data), 4, 100)


def test_one_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (3, 2), (level, 0, 0)) for level in range(200)]
    file = io.BytesIO()
    frames[0].save(file, format="PNG", save_all=True, append_images=frames[1:])
    ((image,), _, _) = read_request(request_of(file.getvalue()), 4, 100)
    assert getattr(image, "n_frames", 1) == 1 and image.getpixel((0, 0)) == (0, 0, 0)


# ---- Servers that mean harm ----


@contextmanager
def serving(talk):
    """A server that calls a function with each connection, after the head of a request has come."""

    def handle(connection):
        with connection, suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(2**16)
            heads.append(received.split(b"\r\n\r\n")[0].decode().lower())
            talk(connection)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):  # a reset would take the answer away
                pass

    def accept():
        with suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    heads = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heads


def dripping_head(connection):
    for _ in range(500):
        connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        time.sleep(0.02)


IMAGES = [Image.new("RGB", (2, 2))]


def test_a_head_that_never_ends_is_a_timeout():
    with serving(dripping_head) as (url, _):
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"did not answer within 0\.5 seconds"):
            RemoteReward(url, "x", timeout=0.5, max_retries=3)(images=IMAGES, prompts=["p"])
        assert time.monotonic() - start < 4


def judge(url, **options):
    import asyncio

    reward = VLMJudge("model", url, api_key="secret-key", max_retries=0, **options)
    return asyncio.run(reward(images=IMAGES, prompts=["p"]))


def test_a_judge_cannot_fill_the_memory():
    def endless(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"10000\r\n" + b" " * 2**16 + b"\r\n")

    with serving(endless) as (url, _):
        (failed,) = judge(url, timeout=20.0)
    assert isinstance(failed, RewardError) and "answered more than 4194304 bytes" in str(failed)


def test_a_compressed_answer_is_neither_asked_for_nor_unpacked():
    bomb = gzip.compress(bytes(50_000_000))

    def answer(connection):
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
        connection.sendall(head.encode() + bomb)

    with serving(answer) as (url, heads):
        (failed,) = judge(url, timeout=20.0)
        with pytest.raises(RewardError, match="is no reward server"):
            RemoteReward(url, "x", timeout=20.0, max_retries=0)(images=IMAGES, prompts=["p"])
    assert "is not a chat completion" in str(failed)
    assert all("accept-encoding: identity" in head for head in heads) and len(heads) == 2


def test_a_judges_redirect_does_not_carry_the_key_away():
    with serving(lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")) as (
        thief,
        stolen,
    ):
        location = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {thief}/\r\nContent-Length: 0\r\n\r\n".encode()
        with serving(lambda connection: connection.sendall(location)) as (url, _):
            with pytest.raises(RewardError, match="answered status 307"):
                judge(url, timeout=20.0)
        assert stolen == []


# ---- Tokens ----


def test_the_settings_of_a_run_do_not_show_its_token(tmp_path):
    config = MarbleConfig(output_dir=str(tmp_path), hub_token="hf_verysecret", report_to="none", use_cpu=True)
    for shown in (config.to_dict(), config.to_sanitized_dict(), config.to_json_string(), repr(config), str(config)):
        assert "verysecret" not in str(shown)


# ---- The source itself ----

DANGEROUS = re.compile(
    r"\bpickle\b|\bmarshal\b|\bshelve\b|allow_pickle|yaml\.(?:unsafe_|full_)?load\(|trust_remote_code|custom_pipeline"
    r"|(?<![\w.])(?:eval|exec)\(|\bos\.system\(|shell=True|verify=False|torch\.load\((?!.*weights_only=True)"
)
KNOWN = {'config = yaml.load(path.read_text(encoding="utf-8"), Loader=TextLoader)'}  # a `SafeLoader`, stricter


def test_nothing_is_unpickled_or_executed_and_no_certificate_is_passed_over():
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("trl_marble", "examples")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if DANGEROUS.search(line) and line.strip() not in KNOWN
    ]
    assert found == []
