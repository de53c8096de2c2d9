# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards on another machine: the real server and the real client, and each against what misbehaves."""

import asyncio
import base64
import email.utils
import functools
import http.client
import io
import json
import logging
import os
import pickle
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

from trl_marble.media import to_rgb
from trl_marble.rewards import RewardError, RewardScorer, server_http
from trl_marble.rewards.http_client import is_loopback
from trl_marble.rewards.remote import RemoteReward
from trl_marble.rewards.retry import Attempts, RetryPolicy, asked_delay, is_permanent
from trl_marble.rewards.server import TOKEN_VARIABLE, RewardServer, main
from trl_marble.rewards.server_messages import describe, read_request
from trl_marble.rewards.vlm_judge import VLMJudge


TOKEN = "t0ken-very-secret-9876543210"


def pictures(*levels):
    return [Image.new("RGB", (3, 2), (red, 0, 0)) for red in levels]


def red(images, prompts, trainer_state, **columns):
    return [image.getpixel((0, 0))[0] / 7 for image in images]


class Recorder:
    """A reward that keeps what it was called with and answers what it was made with, or the levels of red."""

    def __init__(self, answer=None):
        self.answer, self.calls = answer, []

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        return [0.0] * len(kwargs["images"]) if self.answer is None else self.answer


def remote(server, name="Recorder", **kwargs):
    return RemoteReward(server.url, name, **({"timeout": 10.0, "max_retries": 0} | kwargs))


# ---- What arrives, and what comes back ----


def test_remote_and_local_values_are_the_same_floats_in_the_same_order():
    images = pictures(*range(40))
    with RewardServer(red, port=0) as server:
        far = remote(server, "red", batch_size=7)(images=images, prompts=["p"] * 40, trainer_state=None)
    assert far == red(images, ["p"] * 40, None)


def gradient(mode):
    """An image whose pixels, or palette entries, all differ."""
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
        return image
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(255 - pixels))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I"])
def test_images_arrive_in_rgb_bit_for_bit(mode):
    sent = [gradient(mode), gradient(mode).crop((2, 1, 3, 2))]
    assert sent[1].size == (1, 1)
    recorder = Recorder()
    with RewardServer(recorder, port=0) as server:
        remote(server)(images=sent, prompts=["a", "b"])
    for before, after in zip(sent, recorder.calls[0]["images"], strict=True):
        assert (after.mode, after.size, after.info) == ("RGB", before.size, {})
        assert after.tobytes() == to_rgb(before).tobytes()


def test_a_png_of_any_kind_is_decoded_to_the_same_colours():
    """Also one that another client sends: the server answers what the reward says of the image in RGB."""
    deep = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 13107)
    palette = gradient("P")
    palette.info["transparency"] = 0
    for image in (deep, palette, gradient("LA")):
        file = io.BytesIO()
        image.save(file, format="PNG")
        body = {"images": [base64.b64encode(file.getvalue()).decode()], "prompts": ["p"], "columns": {}}
        images, _, _ = read_request(json.dumps(body).encode(), 1, 100)
        assert images[0].mode == "RGB" and images[0].tobytes() == to_rgb(image).tobytes()


def test_prompts_and_columns_arrive_as_they_are():
    prompts = ["", "ein Fuchs 🦊 und 漢字 و", 'a "sign\\"\n', "\ud800 alone"]
    columns = {
        "number": [1, -2, 0, 2**60],
        "weight": [0.1, 1e-300, -0.0, np.float64(2.5)],
        "tags": [["a", None, True], [], [[1]], ["ü"]],
        "box": [{"x": 1}, {}, {"": None}, None],
    }
    recorder = Recorder()
    with RewardServer(recorder, port=0) as server:
        remote(server, batch_size=3)(images=pictures(1, 2, 3, 4), prompts=prompts, trainer_state=object(), **columns)
    assert [len(call["images"]) for call in recorder.calls] == [3, 1]
    for name, values in ({"prompts": prompts} | columns).items():
        assert [value for call in recorder.calls for value in call[name]] == values
    assert all(call["trainer_state"] is None for call in recorder.calls)
    assert set(recorder.calls[0]) == {"images", "prompts", "trainer_state", "log_metric", "log_extra", *columns}


def test_only_the_columns_that_are_named_are_sent():
    recorder = Recorder()
    with RewardServer(recorder, port=0) as server:
        remote(server, columns=["a"])(images=pictures(1), prompts=["p"], a=[1], unsendable=[object()])
        with pytest.raises(ValueError, match="no column 'b', which `columns` of 'Recorder' asks for"):
            remote(server, columns=["b"])(images=pictures(1), prompts=["p"], a=[1])
    assert set(recorder.calls[0]) == {"images", "prompts", "trainer_state", "log_metric", "log_extra", "a"}


@pytest.mark.parametrize(
    "value",
    [object(), b"bytes", {1: "key"}, (1, 2), float("nan"), float("inf"), np.int64(1), [[{"deep": {1, 2}}]]],
    ids=lambda value: type(value).__name__ + str(value)[:4],  # an address in the name would differ between processes
)
def test_a_column_that_json_would_change_is_refused_by_name(value):
    recorder = Recorder()
    with RewardServer(recorder, port=0) as server:
        with pytest.raises(TypeError, match="Column 'boxes' cannot be sent"):
            remote(server)(images=pictures(1), prompts=["p"], fine=["x"], boxes=[value])
    assert recorder.calls == []


def test_an_image_whose_values_have_no_scale_is_refused():
    with RewardServer(Recorder(), port=0) as server:
        with pytest.raises(ValueError, match="mode 'F' has values from -1 to -1"):
            remote(server)(images=[Image.new("F", (1, 1), -1)], prompts=["p"])


@pytest.mark.parametrize(
    "answer",
    [
        [0.5, None, float("nan"), -1],
        np.array([0.5, np.nan, np.nan, -1], dtype=np.float32),
        torch.tensor([0.5, torch.nan, torch.nan, -1.0]),
        [torch.tensor(0.5), None, np.float32("nan"), np.int64(-1)],
        [Decimal("0.5"), None, np.array(np.nan), -np.float16(np.bool_(True))],
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_numbers_of_every_kind_come_back_and_what_does_not_apply_is_none(answer):
    with RewardServer(Recorder(answer), port=0) as server:
        values = remote(server)(images=pictures(1, 2, 3, 4), prompts=["p"] * 4)
    assert values == [0.5, None, None, -1.0]
    assert all(type(value) is float for value in values if value is not None)


def test_the_failure_of_one_image_comes_back_as_one():
    answer = [0.5, ValueError("no text on it"), None]
    with RewardServer(Recorder(answer), port=0) as server:
        first, failure, last = remote(server)(images=pictures(1, 2, 3), prompts=["p"] * 3)
        scorer = RewardScorer([remote(server)])
        scores = scorer.collect(scorer.submit(pictures(1, 2, 3), ["a", "b", "c"], {}, None))
        scorer.close()
    assert (first, last) == (0.5, None)
    assert isinstance(failure, RewardError) and str(failure) == "ValueError: no text on it"
    assert scorer.names == ["Recorder"]
    assert scores.failed.tolist() == [[False, True, False]]
    assert "ValueError: no text on it" in str(scores.errors[0]) and "'b'" in str(scores.errors[0])


def test_async_partial_nameless_and_tensor_rewards_are_served():
    async def patient(images, prompts, **_):
        await asyncio.sleep(0.01)
        return [1.0] * len(images)

    def weighted(images, weight, **_):
        return [weight] * len(images)

    def shape(images, **_):
        return [float(images.shape[0] * 100 + images.shape[2] * 10 + images.shape[3])] * len(images)

    shape.image_type = "pt"
    rewards = [patient, functools.partial(weighted, weight=2.0), lambda images, **_: [3.0] * len(images), shape]
    with RewardServer(rewards, port=0) as server:
        assert server.names == ["patient", "weighted", "<lambda>", "shape"]
        values = [remote(server, name)(images=pictures(1, 2), prompts=["p"] * 2) for name in server.names]
    assert values == [[1.0] * 2, [2.0] * 2, [3.0] * 2, [223.0] * 2]


def test_no_images_no_request():
    assert RemoteReward("http://127.0.0.1:1", "x")(images=[], prompts=[]) == []


def test_a_reward_scores_one_request_at_a_time_and_two_rewards_score_together():
    under_way, most = {"a": 0, "b": 0}, {"a": 0, "b": 0, "both": 0}
    both = threading.Barrier(2, timeout=5)

    def counting(name):
        def reward(images, **_):
            under_way[name] += 1
            most[name] = max(most[name], under_way[name])
            most["both"] = max(most["both"], sum(under_way.values()))
            both.wait()
            time.sleep(0.02)
            under_way[name] -= 1
            return [0.0] * len(images)

        async def async_reward(**kwargs):
            return await asyncio.to_thread(reward, **kwargs)

        chosen = reward if name == "a" else async_reward
        chosen.__name__ = name
        return chosen

    with RewardServer([counting("a"), counting("b")], port=0) as server, ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(remote(server, name), images=pictures(1), prompts=["p"]) for name in ("a", "b") * 4]
        assert [call.result() for call in calls] == [[0.0]] * 8
    assert most == {"a": 1, "b": 1, "both": 2}


# ---- What goes wrong in the reward ----


def test_an_error_of_the_reward_is_told_without_folders_and_logged_with_its_traceback(caplog):
    def broken(images, **_):
        raise FileNotFoundError(2, "No such file", "/home/somebody/weights/model.safetensors")

    with RewardServer(broken, port=0) as server:
        with pytest.raises(RewardError) as raised:
            remote(server, "broken", max_retries=3)(images=pictures(1), prompts=["p"])
        status, _, answer = talk(server, request("broken"))
    message = str(raised.value)
    assert (
        "answered 500: Reward `broken` raised FileNotFoundError: [Errno 2] No such file: 'model.safetensors'"
        in message
    )
    assert status == 500
    for secret in ("somebody", "Traceback", "/home", __file__):
        assert secret not in message and secret not in json.dumps(answer)
    assert "Traceback" in caplog.text and "somebody" in caplog.text
    assert caplog.text.count("Traceback") == 2  # one a request: an error is not a reason to ask again


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "1 values for 2 images"),
        (0.5, "return a list"),
        (["a", 1], "'a'"),
        ([float("inf"), 1], "finite"),
        (None, "None"),
    ],
    ids=str,
)
def test_what_is_no_reward_is_told(answer, said):
    class Odd:
        def __call__(self, **kwargs):
            return answer

    with RewardServer(Odd(), port=0) as server:
        with pytest.raises(RewardError, match="answered 500: Reward `Odd` raised (Infinite)?RewardError") as raised:
            remote(server, "Odd")(images=pictures(1, 2), prompts=["p", "q"])
    assert said in str(raised.value)


def test_a_reward_that_exits_does_not_end_the_server():
    def leave(images, **_):
        sys.exit("enough")

    with RewardServer([leave, red], port=0) as server:
        for _ in range(2):
            with pytest.raises(RewardError, match="raised SystemExit: enough"):
                remote(server, "leave")(images=pictures(1), prompts=["p"])
        assert remote(server, "red")(images=pictures(7), prompts=["p"]) == [1.0]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("'/home/me/a b.pt' and /etc/passwd", "'a b.pt' and passwd"),
        (r"C:\Users\me\x.pt", "x.pt"),
        ("~/.cache/hub/x", "x"),
        ("1/2 and/or http://host:80/a/b, a / b", "1/2 and/or http://host:80/a/b, a / b"),
        ("x" * 1000, "x" * 497 + "..."),
    ],
    ids=lambda text: text[:20],
)
def test_folders_are_left_out_of_messages(message, told):
    assert describe(ValueError(message)) == f"ValueError: {told}"


# ---- What the server refuses ----


def png(image=None):
    file = io.BytesIO()
    (image or Image.new("RGB", (1, 1))).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def body(**changes):
    return {"images": [png()], "prompts": ["p"], "columns": {}} | changes


def request(name="Recorder", content=None, method="POST", path=None, drop=(), **headers):
    """A request as bytes. `headers` replace the usual ones; `drop` leaves some out."""
    content = (
        json.dumps(body() if content is None else content).encode() if not isinstance(content, bytes) else content
    )
    fields = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(content))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path or '/score/' + name} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields.items() if name not in drop]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def talk(server, sent):
    """Send bytes as they are; status, headers as one text, and JSON of the answer."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, str(answer.headers), json.loads(answer.read())


@pytest.fixture(scope="module")
def small_server():
    """A server with low limits and a token, and its reward."""
    recorder = Recorder()
    limits = {"max_bytes": 5000, "max_images": 2, "max_pixels": 20_000, "timeout": 5.0}
    with RewardServer(recorder, port=0, token=TOKEN, **limits) as server:
        yield server, recorder


def refusal(small_server, sent, status):
    server, recorder = small_server
    recorder.calls.clear()
    given, head, answer = talk(server, sent)
    assert given == status, answer
    assert set(answer) == {"error"} and recorder.calls == []
    assert "Python" not in head and TOKEN not in head + answer["error"]
    return answer["error"]


def authorized(*args, **kwargs):
    return request(*args, **({"Authorization": f"Bearer {TOKEN}"} | kwargs))


def test_what_the_refusals_differ_from_is_served(small_server):
    status, _, answer = talk(small_server[0], authorized())
    assert (status, answer) == (200, {"values": [0.0]})


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_other_spellings_of_the_type_are_served(small_server, content_type):
    assert talk(small_server[0], authorized(Content_Type=content_type))[0] == 200


@pytest.mark.parametrize(
    "credentials",
    [None, "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"],
)
@pytest.mark.parametrize("path", ["/score/Recorder", "/score/other"])
def test_without_the_token_nothing_is_said(small_server, credentials, path):
    headers = {} if credentials is None else {"Authorization": credentials}
    message = refusal(small_server, request(path=path, **headers), 401)
    assert message == "Unauthorized."


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/score",
        "/score/",
        "/score/other",
        "/score/Recorder/",
        "/score/../score/Recorder",
        "/score/%2e%2e/Recorder",
        "/../../etc/passwd",
        "/score//Recorder",
        "/docs",
    ],
)
def test_every_other_path_is_refused(small_server, path):
    assert refusal(small_server, authorized(path=path), 404) == "There is no such reward here. Served are: Recorder."


def test_the_address_of_another_server_is_refused(small_server):
    assert refusal(small_server, authorized(path="http://evil/score/Recorder"), 404) == "Not Found"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "post", "X" * 50])
def test_every_other_method_is_refused(small_server, method):
    assert refusal(small_server, authorized(method=method), 405) == "Method Not Allowed"


def test_what_is_not_http_is_refused(small_server):
    for sent in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"POST /score/Recorder\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", int(small_server[0].url.rpartition(":")[2])), timeout=5) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.makefile("rb").read()
        assert b'"values"' not in answer and b"Traceback" not in answer and b"error" in answer


def test_a_length_that_is_no_number_is_refused(small_server):
    for length in ("-1", "+5", "1e3", "0x10", "²", "9" * 400, "5, 6", "5\r\nContent-Length: 6"):
        sent = authorized(Content_Length=length).replace("²".encode(), b"\xb2")
        assert "Invalid HTTP request" in refusal(small_server, sent, 400)


def chunked(*parts, name="Recorder"):
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
    return authorized(name, content=b"", drop=["Content-Length"], Transfer_Encoding="chunked") + pieces


def test_a_body_that_does_not_say_its_length_is_read_up_to_the_limit(small_server):
    content = json.dumps(body()).encode()
    assert talk(small_server[0], chunked(content[:50], content[50:]))[0] == 200
    message = refusal(small_server, chunked(*[b" " * 1000] * 6), 413)
    assert message == "6000 bytes are more than 5000, the limit here."


def test_browsers_are_refused(small_server):
    assert "Browsers" in refusal(small_server, authorized(Origin="http://127.0.0.1:8100"), 403)
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
        assert "application/json" in refusal(small_server, authorized(Content_Type=content_type), 415)
    assert "application/json" in refusal(small_server, authorized(drop=["Content-Type"]), 415)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(small_server):
    head_only = authorized(content=b"", Content_Length="5001")
    assert refusal(small_server, head_only, 413) == "5001 bytes are more than 5000, the limit here."
    assert "1000000000000000 bytes" in refusal(
        small_server, authorized(content=b"", Content_Length=f"1{'0' * 15}"), 413
    )


def test_the_client_is_told_that_its_body_is_too_large(small_server):
    reward = remote(small_server[0], token=TOKEN)
    noise = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8))] * 4
    with pytest.raises(RewardError, match=r"answered 413: \d+ bytes are more than 5000.*lower `batch_size`"):
        reward(images=noise, prompts=["p"] * 4)


def test_a_refusal_can_be_read_after_everything_was_sent():
    with RewardServer(red, port=0, max_bytes=10, timeout=5) as server:
        content = bytes(5_000_000)
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as connection:
            head = request("red", content=b"", Content_Length=str(2 * len(content)))
            for part in (head + content, content[:-1]):
                connection.sendall(part)
                time.sleep(0.1)  # the refusal is on its way, and the server must not reset what still comes
            assert b" 413 " in connection.recv(1000)


def test_a_client_that_was_refused_and_stays_is_let_go():
    with RewardServer(red, port=0, max_bytes=10, timeout=0.5) as server:
        for sent in (request("red"), chunked(b" " * 20, name="red"), request(method="GET")):
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as connection:
                connection.sendall(sent)
                assert re.match(rb"HTTP/1.1 4\d\d .*\}$", connection.makefile("rb").read(), re.DOTALL)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 4999, "not JSON"),
        (b"1" * 4999, "not JSON"),
        (b'{"images": [NaN], "prompts": [], "columns": {}}', "NaN is not JSON"),
        (pickle.dumps({"images": [], "prompts": []}), "not JSON"),
        ([], "must be a JSON object"),
        ({"images": [], "prompts": []}, "must be a JSON object"),
        (body(more=1), "and no more"),
        (body(images="x"), "`images` must be a list"),
        (body(images=[]), "at least one"),
        (body(images=[1]), "base64 string"),
        (body(images=["no base64!"]), "Image 0 is not base64"),
        (body(images=["é"]), "Image 0 is not base64"),
        (body(images=[""]), "Image 0 is not a PNG file"),
        (body(images=[base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()]), "Image 0 is not a PNG file"),
        (body(images=[base64.b64encode(pickle.dumps(1)).decode()]), "Image 0 is not a PNG file"),
        (body(prompts="p"), "`prompts` must be a list of strings"),
        (body(prompts=[None]), "`prompts` must be a list of strings"),
        (body(prompts=["a", "b"]), "2 prompts for 1 images"),
        (body(columns=[]), "`columns` must be an object"),
        (body(columns={"n": 1}), "Column 'n' must be a list"),
        (body(columns={"n": [1, 2]}), "Column 'n' must be a list with one value for each of the 1 images"),
        (body(columns={"images": [1]}), "cannot have the name 'images'"),
        (body(columns={"trainer_state": [1]}), "cannot have the name 'trainer_state'"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_malformed_body_is_refused_with_the_reason(small_server, content, said):
    assert said in refusal(small_server, authorized(content=content), 400)


@pytest.mark.parametrize("format", ["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_only_png_is_decoded(small_server, format):
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format=format)
    content = body(images=[base64.b64encode(file.getvalue()).decode()])
    assert refusal(small_server, authorized(content=content), 400) == "Image 0 is not a PNG file."


def test_a_broken_png_is_refused(small_server):
    whole = base64.b64decode(png(Image.effect_noise((40, 40), 50)))
    for broken in (whole[: len(whole) // 2], whole[:60] + bytes(20) + whole[80:]):
        content = body(images=[base64.b64encode(broken).decode()])
        assert "Image 0 is a broken PNG file" in refusal(small_server, authorized(content=content), 400)


def bomb(width, height):
    """A PNG file of the header of a huge image and next to no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return base64.b64encode(content + chunk(b"IEND", b"")).decode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_images_or_pixels_are_refused(small_server):
    many = body(images=[png()] * 3, prompts=["p"] * 3)
    assert refusal(small_server, authorized(content=many), 413) == "3 images are more than 2, the limit here."
    large = [png(Image.new("L", (100, 100))), png(Image.new("L", (100, 101)))]
    both = body(images=large, prompts=["p"] * 2)
    assert "image 1 of 100 x 101 goes over" in refusal(small_server, authorized(content=both), 413)
    for size in ((20_001, 1), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        assert "pixels" in refusal(small_server, authorized(content=body(images=[bomb(*size)])), 413)


def test_a_client_that_sends_slowly_is_let_go_and_holds_up_nobody(caplog):
    with RewardServer(red, port=0, timeout=1.0) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        whole = request("red")
        silent = socket.create_connection(address, timeout=5)
        slow_head, slow_body = (socket.create_connection(address, timeout=5) for _ in range(2))
        slow_body.sendall(whole[:-10])
        start = time.monotonic()
        assert talk(server, whole)[0] == 200
        for part in whole[:100]:
            time.sleep(0.02)
            try:
                slow_head.sendall(bytes([part]))
            except ConnectionError:
                break
        else:
            pytest.fail("the slow client could go on")
        cut_short = [connection.makefile("rb").read() for connection in (silent, slow_body)]
        assert time.monotonic() - start < 4
        for connection in (silent, slow_head, slow_body):
            connection.close()
    assert all(b" 408 " in text and b"did not arrive within 1 seconds" in text for text in cut_short)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_client_that_goes_in_the_middle_of_its_body_is_no_reward_call():
    recorder = Recorder()
    with RewardServer(recorder, port=0) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(request()[:-5])
            connection.shutdown(socket.SHUT_WR)
            assert b"The request breaks off" in connection.makefile("rb").read()
        assert recorder.calls == []
        assert talk(server, request())[0] == 200


def test_connections_are_bounded_and_come_free_again(monkeypatch):
    monkeypatch.setattr(server_http, "MAX_CONNECTIONS", 3)
    with RewardServer(red, port=0, timeout=20) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        idle = [socket.create_connection(address) for _ in range(3)]
        with pytest.raises(RewardError, match="not available .* answered 503"):
            remote(server, "red")(images=pictures(7), prompts=["p"])
        for connection in idle:
            connection.close()
        # Its first tries may come before the server has seen that the others are gone.
        assert remote(server, "red", max_retries=4)(images=pictures(7), prompts=["p"]) == [1.0]


# ---- Where it listens, and how it stops ----


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_others_cannot_reach_it(host, token):
    with pytest.raises(ValueError, match="there is no `token`"):
        RewardServer(red, host=host, port=0, token=token)


def test_with_a_token_others_can():
    with RewardServer(red, host="0.0.0.0", port=0, token=TOKEN) as server:
        reward = RemoteReward(server.url.replace("0.0.0.0", "127.0.0.1"), "red", token=TOKEN)
        assert reward(images=pictures(7), prompts=["p"]) == [1.0]


def test_the_loopback_of_ipv6_is_loopback_too():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with RewardServer(red, host="::1", port=0) as server:
        assert re.fullmatch(r"http://\[::1\]:\d+", server.url)
        assert remote(server, "red")(images=pictures(7), prompts=["p"]) == [1.0]


@pytest.mark.parametrize("limit", ["max_bytes", "max_images", "max_pixels", "timeout"])
def test_limits_are_positive(limit):
    with pytest.raises(ValueError, match=f"`{limit}` is 0"):
        RewardServer(red, port=0, **{limit: 0})


def test_the_scoring_under_way_is_answered_before_the_server_stops_and_the_next_is_not():
    started, scored = threading.Event(), []

    def slow(images, **_):
        started.set()
        time.sleep(0.5)
        scored.append(len(images))
        return [1.0] * len(images)

    with ThreadPoolExecutor(2) as threads:
        with RewardServer(slow, port=0, timeout=30) as server:
            idle = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
            first = threads.submit(remote(server, "slow"), images=pictures(1), prompts=["p"])
            assert started.wait(5)
            second = threads.submit(remote(server, "slow"), images=pictures(1, 2), prompts=["p"] * 2)
            time.sleep(0.2)
            start = time.monotonic()
        assert time.monotonic() - start < 3  # the idle connection does not keep it
        assert first.result() == [1.0]
        with pytest.raises(RewardError, match="answered 503: The server stops"):
            second.result()
    idle.close()
    assert scored == [1]
    with pytest.raises(RewardError, match="failed"):
        remote(server, "slow")(images=pictures(1), prompts=["p"])


def test_a_server_can_be_closed_without_having_served():
    server = RewardServer(red, port=0)
    server.close()


@pytest.fixture
def module(tmp_path):
    """A module of the user with a reward, and the environment that finds it."""
    (tmp_path / "my_rewards.py").write_text(
        "import time\n"
        "def bright(images, prompts, **_):\n"
        "    if prompts[0] == 'slow':\n"
        "        print('scoring', flush=True)\n"
        "        time.sleep(1)\n"
        "    return [image.getpixel((0, 0))[0] / 255 for image in images]\n"
    )
    root = Path(__file__).resolve().parents[2]
    return tmp_path, os.environ | {"PYTHONPATH": str(root), TOKEN_VARIABLE: TOKEN}


@pytest.mark.slow
def test_the_command_line_serves_and_stops_when_asked(module):
    folder, environment = module
    command = [sys.executable, "-m", "trl_marble.rewards.server", "--rewards", "my_rewards.bright", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        url = re.fullmatch(r"Serving bright at (http://127\.0\.0\.1:\d+)\n", line)[1]
        with pytest.raises(RewardError, match="answered 401"):
            RemoteReward(url, "bright")(images=pictures(255), prompts=["p"])
        reward = RemoteReward(url, "bright", token=TOKEN)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(reward, images=pictures(255, 0), prompts=["slow", "p"])
            assert process.stdout.readline() == "scoring\n"
            process.send_signal(signal.SIGTERM)
            assert waiting.result() == [1.0, 0.0]
        out, errors = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    assert "scored 2 images" in errors and "401" in errors
    assert TOKEN not in errors and TOKEN not in " ".join(command)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rewards", "no_such_reward"], "There is no reward 'no_such_reward'"),
        (["--rewards", "os.path.nothing"], "has no `nothing`"),
        (["--rewards", "os.getcwd", "--host", "0.0.0.0"], "there is no `token`"),
        (["--rewards", "os.getcwd", "--max-images", "0"], "`max_images` is 0"),
        ([], "--rewards"),
    ],
    ids=str,
)
def test_the_command_line_says_what_is_wrong(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


# ---- What the client makes of servers that misbehave ----


@contextmanager
def listening(*answers):
    """
    A server that gives each connection the next answer, the last one again and again: bytes after the whole request
    has come, `None` for hanging, a function for anything else. Yields its URL and the number of connections so far.
    """
    stop, seen = threading.Event(), []

    def handle(connection, answer):
        with connection, suppress(OSError):  # the client goes away, on purpose
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(2**16)
            head, _, rest = received.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
            if callable(answer):
                return answer(connection)
            while len(rest) < length:
                rest += connection.recv(2**16)
            if answer is None:
                stop.wait(20)
            else:
                connection.sendall(answer)

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if stop.is_set():
                connection.close()
                return
            seen.append(connection)
            answer = answers[min(len(seen), len(answers)) - 1]
            threading.Thread(target=handle, args=(connection, answer), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        address = listener.getsockname()
        try:
            yield f"http://127.0.0.1:{address[1]}", seen
        finally:
            stop.set()
            socket.create_connection(address).close()  # wakes `accept`
            thread.join()


def answer(content, status="200 OK", **headers):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def ask(url, **kwargs):
    reward = RemoteReward(url, "x", **({"token": TOKEN, "timeout": 10.0, "max_retries": 0} | kwargs))
    return reward(images=pictures(1, 2), prompts=["p", "q"])


def test_a_server_that_hangs_is_a_timeout_and_not_asked_again():
    with listening(None) as (url, seen):
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"did not answer within 0\.3 seconds"):
            ask(url, timeout=0.3, max_retries=5)
        assert time.monotonic() - start < 2
        assert len(seen) == 1


def test_one_refused_request_is_a_failure_of_its_images_alone():
    refused, good = (answer({"error": "no"}, "403 Forbidden", Connection="close"), answer({"values": [0.5]}))
    with listening(refused, good) as (url, _):
        first, second = ask(url, batch_size=1)
    assert isinstance(first, RewardError) and "answered 403: no" in str(first)
    assert second == 0.5
    with listening(refused) as (url, seen), pytest.raises(RewardError, match="answered 403: no"):
        ask(url, batch_size=1)
    assert len(seen) == 2
    unauthorized = answer({"error": "no"}, "401 Unauthorized", Connection="close")
    with listening(unauthorized, good) as (url, seen), pytest.raises(RewardError, match="answered 401: no"):
        ask(url, batch_size=1)
    assert len(seen) == 1


def test_an_answer_that_comes_byte_by_byte_is_a_timeout():
    def drip(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.05)

    with listening(drip) as (url, _):
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"did not answer within 0\.5 seconds"):
            ask(url, timeout=0.5)
        assert time.monotonic() - start < 2


def test_a_connection_that_fails_is_tried_again_with_a_new_one():
    values = answer({"values": [0.5, None]})
    with listening(values[:-5], b"", lambda connection: None, values) as (url, seen):
        assert ask(url, max_retries=3) == [0.5, None]
        assert len(seen) == 4


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520])
def test_every_status_that_means_later_is_tried_again(status, caplog):
    later = answer(b"<html>Bad gateway</html>", f"{status} Later")
    with listening(later, later, answer({"values": [0.5, None]})) as (url, seen):
        assert ask(url, max_retries=None) == [0.5, None]
        assert len(seen) == 3
        (warning,) = [record.message for record in caplog.records]  # not one for each attempt
        assert (
            f"{url}: answered {status}: '<html>Bad gateway</html>'. It is asked again, for up to 10 seconds" in warning
        )


@pytest.mark.parametrize(
    ("status", "content"),
    [(400, b"no"), (403, b"no"), (404, b"no"), (422, b"no"), (501, b"no"), (500, {"error": "Reward `x` raised"})],
    ids=str,
)
def test_what_will_not_change_is_not_asked_again(status, content):
    with listening(answer(content, f"{status} No")) as (url, seen):
        with pytest.raises(RewardError, match=f"answered {status}"):
            ask(url, max_retries=None)
        assert len(seen) == 1


def test_a_status_that_stays_is_an_error_when_the_time_is_over():
    with listening(answer(b"Bad gateway", "502 Bad Gateway")) as (url, seen):
        start = time.monotonic()
        with pytest.raises(
            RewardError, match=r"not available \(attempts: \d; the last: answered 502: 'Bad gateway'\)"
        ):
            ask(url, timeout=1.0, max_retries=None)
        assert 0.7 < time.monotonic() - start < 1.5
        assert len(seen) >= 4


def test_the_wait_that_a_server_asks_for_is_kept_within_the_time_there_is():
    values = answer({"values": [0.5, None]})
    with listening(answer(b"", "503 Later", Retry_After="1"), values) as (url, _):
        start = time.monotonic()
        assert ask(url, max_retries=None) == [0.5, None]
        assert time.monotonic() - start >= 1
    with listening(answer(b"", "503 Later", Retry_After="60"), values) as (url, seen):
        with pytest.raises(RewardError, match="asks to wait 60 seconds, more than are left of 10"):
            ask(url, max_retries=None)
        assert len(seen) == 1


def test_a_server_that_starts_late_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(
            RemoteReward(f"http://127.0.0.1:{port}", "red", timeout=20), images=pictures(7), prompts=["p"]
        )
        time.sleep(0.5)
        assert not waiting.done()
        with RewardServer(red, port=port):
            assert waiting.result() == [1.0]


def test_a_port_where_nobody_listens_is_tried_until_the_time_is_over():
    with listening() as (url, _):
        pass
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"failed \(attempts: \d; the last: ConnectError"):
        ask(url, timeout=1.0, max_retries=None)
    assert 0.7 < time.monotonic() - start < 1.5


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_proxies_do_not_catch_this_machine(no_proxies, monkeypatch, name, proxy, host):
    monkeypatch.setenv(name, proxy)
    with RewardServer(red, port=0) as server:
        reward = RemoteReward(server.url.replace("127.0.0.1", host), "red", timeout=10, max_retries=0)
        assert reward(images=pictures(7), prompts=["p"]) == [1.0]
        with asyncio.Runner() as runner:
            # Not a judge, which is what it says: it was asked, and no proxy was.
            with pytest.raises(RewardError, match="answered status 404"):
                runner.run(
                    VLMJudge("m", server.url.replace("127.0.0.1", host), max_retries=0)(
                        images=pictures(1), prompts=["p"]
                    )
                )


def test_proxies_are_used_for_other_machines(no_proxies, monkeypatch):
    with listening(answer({"values": [0.5, None]})) as (url, seen):
        monkeypatch.setenv("HTTP_PROXY", url)
        assert ask("http://rewards.invalid:8100") == [0.5, None]
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST.")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")),
    ],
)
def test_what_is_loopback(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("", 0), ("3", 3), ("0.5", 0.5), ("-1", 0), ("nan", 0), ("inf", 0), ("soon", 0), ("1 s", 0)],
)
def test_how_long_a_server_asks_to_wait(header, seconds):
    assert asked_delay(header) == seconds


def test_a_date_to_wait_for():
    then = datetime.now(UTC) + timedelta(seconds=100)
    assert asked_delay(email.utils.format_datetime(then, usegmt=True)) == pytest.approx(100, abs=2)
    assert asked_delay(email.utils.format_datetime(then - timedelta(hours=1))) == 0


def test_a_certificate_that_is_refused_is_refused_at_once():
    refused = httpx2.ConnectError("certificate verify failed")
    refused.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")
    assert is_permanent(refused) and not is_permanent(httpx2.ConnectError("refused"))
    assert Attempts("It", RetryPolicy(10)).pause("certificate", permanent=True) is None


def test_pauses_double_up_to_eight_seconds_and_shorten_towards_the_end():
    attempts = Attempts("It", RetryPolicy(300))
    pauses = [attempts.pause("busy") for _ in range(20)]
    for number, pause in enumerate(pauses):
        longest = min(8.0, 0.25 * 2**number)
        assert longest / 2 <= pause <= longest
    attempts.deadline = time.monotonic() + 2
    assert 0.9 <= attempts.pause("busy") <= 1
    attempts.deadline = time.monotonic() + 0.01
    assert attempts.pause("busy") is None
    assert attempts.summary == "attempts: 22; the last: busy"


def test_a_connection_that_always_fails_is_an_error_with_its_cause():
    with listening(answer({"values": [0.5, None]})[:-5]) as (url, seen):
        with pytest.raises(RewardError, match=r"failed \(attempts: 2; the last: RemoteProtocolError: .*Does it run"):
            ask(url, max_retries=1)
        assert len(seen) == 2
    with pytest.raises(RewardError, match=r"failed \(attempts: 1; the last: ConnectError"):
        ask(url)  # nobody listens any more


def test_retries_end_with_the_timeout():
    with listening(b"") as (url, seen):
        start = time.monotonic()
        with pytest.raises(RewardError, match="failed"):
            ask(url, timeout=1.0, max_retries=None)
        assert time.monotonic() - start < 1.5
        assert 2 <= len(seen) <= 6  # about 1/4 + 1/2 seconds of waiting: it does not hammer


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>It works!</html>", "is no reward server; it said '<html>It works!</html>'"),
        (b"", "is no reward server; it said ''"),
        (b"\xff\xfe\x80", "is no reward server"),
        (b"[" * 100_000, "is no reward server"),
        ([1, 2], "is no reward server"),
        ({"values": {"0": 1}}, "is no reward server"),
        (b'{"values": [0.5, NaN]}', "is no reward server"),
        (b'{"values": [0.5, Infinity]}', "is no reward server"),
        (b'{"values": [0.5, 1e999]}', "answered 'Infinity' for an image"),
        (b'{"values": [0.5, 1' + b"0" * 400 + b"]}", "for an image; a value is a finite number"),
        ({"values": [0.5]}, "answered 1 values for 2 images"),
        ({"values": []}, "answered 0 values for 2 images"),
        ({"values": [0.5, "0.5"]}, "a value is a finite number, or null"),
        ({"values": [0.5, True]}, "answered 'true' for an image"),
        ({"values": [0.5, [0.5]]}, "answered '[0.5]' for an image"),
        ({"values": [0.5, {"error": 5}]}, "for an image"),
        (b" " * (2**24 + 1), "more than 16777216 bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_answer_that_is_none_is_refused(content, said):
    with listening(answer(content)) as (url, seen):
        with pytest.raises(RewardError) as raised:
            ask(url, max_retries=3)
        assert said in str(raised.value)
        assert len(seen) == 1  # the answer would be the same


def test_what_is_not_http_is_an_error():
    with listening(b"220 mail.example.org ESMTP\r\n") as (url, _):
        with pytest.raises(RewardError, match="RemoteProtocolError"):
            ask(url)


def test_a_redirect_is_not_followed():
    with listening(answer(b"", "307 Temporary Redirect", Location="http://127.0.0.1:1/")) as (url, seen):
        with pytest.raises(RewardError, match="answered 307"):
            ask(url)
        assert len(seen) == 1


def test_a_wrong_name_is_told_with_the_right_ones():
    with RewardServer([red, Recorder()], port=0) as server:
        with pytest.raises(RewardError, match="answered 404: There is no such reward here. Served are: red, Recorder"):
            remote(server, "rad")(images=pictures(1), prompts=["p"])


def test_the_token_is_in_no_error_and_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    raised = []
    with RewardServer(red, port=0, token=TOKEN) as server:
        assert remote(server, "red", token=TOKEN)(images=pictures(7), prompts=["p"]) == [1.0]
        for reward in (
            remote(server, "red", token="wrong-" + TOKEN),
            remote(server, "red"),
            remote(server, "other", token=TOKEN),
        ):
            with pytest.raises(RewardError) as error:
                reward(images=pictures(1), prompts=["p"])
            raised.append(error.value)
    assert "answered 401: Unauthorized. Is `token` the token" in str(raised[0])
    echoes = [
        answer({"error": f"I know {TOKEN}"}, "500 Oops"),
        answer(f"I know {TOKEN}".encode(), "500 Oops"),
        answer(f"I know {TOKEN}".encode()),
        answer({"values": [1, [TOKEN]]}),
        f"I know {TOKEN}\r\n".encode(),
    ]
    for echo in echoes:
        with listening(echo) as (url, _):
            with pytest.raises(RewardError) as error:
                ask(url)
            raised.append(error.value)
    with listening(answer({"values": [1, {"error": f"I know {TOKEN}"}]})) as (url, _):
        raised.append(ask(url)[1])
    assert sum("[secret]" in str(error) for error in raised) >= 5
    for error in raised:
        assert TOKEN not in str(error) and TOKEN not in str(error.__cause__)
    assert TOKEN not in caplog.text and "Refused a request" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"url": "127.0.0.1:8100"}, "expected 'http://host:port'"),
        ({"url": f"http://{TOKEN}@host"}, "no user, password or query"),
        ({"name": ""}, "`name` is empty"),
        ({"token": TOKEN + "\n"}, "`token` has characters"),
        ({"timeout": -1}, "`timeout` is -1"),
        ({"max_retries": -1}, "`max_retries` must be at least 0, got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as raised:
        RemoteReward(**({"url": "http://127.0.0.1:8100", "name": "x"} | kwargs))
    assert TOKEN not in str(raised.value)
