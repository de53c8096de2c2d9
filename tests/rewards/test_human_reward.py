# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""People as a reward: what votes become, what survives, and the page in a real server and a real browser."""

import asyncio
import errno
import functools
import io
import json
import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
import torch
from browser import CHROMIUM, Browser
from datasets import load_dataset
from PIL import Image
from trainer_helpers import bright, small_trainer

from trl_marble.cli import main as cli
from trl_marble.rewards import HumanReward, RewardScorer, votes
from trl_marble.rewards.vote_server import VoteServer
from trl_marble.rewards.votes import Vote, VoteFolder, group_id, read_vote


TOKEN = "t0ken-very-secret"
PATIENCE = 60


def pictures(*levels, size=(3, 2)):
    return [Image.new("RGB", size, (red, 0, 0)) for red in levels]


class Call:
    """A call of a reward on a thread, as the trainer makes it."""

    def __init__(self, reward, images, prompts, groups, step=7):
        arguments = {"images": images, "prompts": prompts, "groups": groups, "tag": ["x"] * len(images)}
        state = SimpleNamespace(global_step=step)
        self.scores = None

        def run():
            self.scores = asyncio.run(reward(trainer_state=state, **arguments))

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return self.scores


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shown_for(folder, prompt):
    """The id of the group with a prompt, once it is shown."""
    wait_for(lambda: folder.exists and any(content["prompt"] == prompt for content in folder.shown().values()))
    return next(group for group, content in folder.shown().items() if content["prompt"] == prompt)


@pytest.fixture
def folder(tmp_path):
    folder = VoteFolder(tmp_path / "votes of people")
    folder.create()
    return folder


def ask(folder, *prompts, num_images=4):
    """Show groups as a run does; returns their ids."""
    ids = []
    for number, prompt in enumerate(prompts):
        images = pictures(*range(10 * number, 10 * number + num_images))
        ids.append(group_id(images, prompt))
        folder.ask(ids[-1], images, prompt, step=3)
    return ids


# ---- What a vote is, and what it becomes ----


@pytest.mark.parametrize(
    ("vote", "scores"),
    [
        ({"best": 2, "worst": 0}, [-1, 0, 1, 0]),
        ({"best": 1, "worst": None}, [0, 1, 0, 0]),
        ({"best": None, "worst": 3}, [0, 0, 0, -1]),
        ({"stars": [1, None, 3, 5]}, [-1, None, 0, 1]),
        ({"stars": [2, 4, None, None]}, [-0.5, 0.5, None, None]),
        ({"skip": True}, [None] * 4),
    ],
)
def test_a_vote_becomes_one_score_per_image(vote, scores):
    assert read_vote(vote, 4).scores(4) == scores


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"skip": False},
        {"best": 1},
        {"best": None, "worst": None},
        {"best": 1, "worst": 1},
        {"best": 4, "worst": 1},
        {"best": -1, "worst": 1},
        {"best": True, "worst": 0},
        {"best": 1.0, "worst": 0},
        {"best": "1", "worst": 0},
        {"best": 1, "worst": 0, "skip": True},
        {"stars": [1, 2, 3]},
        {"stars": [None] * 4},
        {"stars": [0, 1, 2, 3]},
        {"stars": [6, 1, 2, 3]},
        {"stars": "1234"},
    ],
    ids=str,
)
def test_what_is_no_vote_is_refused(content):
    with pytest.raises(ValueError, match="A vote on 4 images is"):
        read_vote(content, 4)


# ---- The reward ----


def test_scores_have_the_order_of_the_images(folder):
    images = pictures(1, 2, 3, 4, 5, 6)
    call = Call(HumanReward(folder.folder), images, ["a", "b", "a", "b", "a", "b"], [4, 9, 4, 9, 4, 9])
    one, other = shown_for(folder, "a"), shown_for(folder, "b")
    assert Image.open(io.BytesIO(folder.image(one, 1))).getpixel((0, 0)) == (3, 0, 0)
    folder.keep(one, {"best": 2, "worst": 0})
    folder.keep(other, {"stars": [None, 5, 1]})
    assert call.result() == [-1, None, 0, 1, 1, -1]
    assert folder.shown() == {}


def test_training_goes_on_after_the_time_limit_without_the_votes_that_are_missing(folder, caplog):
    reward = HumanReward(folder.folder, timeout=1.5)
    call = Call(reward, pictures(1, 2, 3, 4), ["a", "a", "b", "b"], [0, 0, 1, 1])
    folder.keep(shown_for(folder, "b"), {"best": 0, "worst": 1})
    assert call.result() == [None, None, 1, -1]
    assert folder.shown() == {}
    with pytest.raises(FileNotFoundError):
        folder.keep(group_id(pictures(1, 2), "a"), {"skip": True})


def test_equal_groups_get_the_same_vote(folder):
    call = Call(HumanReward(folder.folder), pictures(1, 2, 1, 2), ["a"] * 4, [0, 0, 1, 1])
    folder.keep(shown_for(folder, "a"), {"best": 1, "worst": 0})
    assert call.result() == [-1, 1, -1, 1]


def test_a_resumed_run_does_not_ask_again_for_the_same_images(folder, monkeypatch):
    call = Call(HumanReward(folder.folder), pictures(1, 2, 3, 4), ["a", "a", "b", "b"], [0, 0, 1, 1])
    folder.keep(shown_for(folder, "a"), {"best": 1, "worst": 0})
    folder.keep(shown_for(folder, "b"), {"skip": True})
    assert call.result() == [-1, 1, None, None]

    resumed = HumanReward(folder.folder)
    monkeypatch.setattr(VoteFolder, "ask", lambda *_: pytest.fail("people are asked again"))
    scores = Call(resumed, pictures(3, 4, 1, 2), ["b", "b", "a", "a"], [0, 0, 1, 1]).result()
    assert scores == [None, None, -1, 1]
    monkeypatch.undo()
    for images, prompt in ((pictures(1, 3), "a"), (pictures(1, 2), "A"), (pictures(1, 2, size=(2, 3)), "a")):
        call = Call(resumed, images, [prompt] * 2, [0, 0])
        folder.keep(shown_for(folder, prompt), {"best": 0, "worst": 1})
        assert call.result() == [1, -1]


def test_groups_that_a_killed_run_asked_about_are_withdrawn_but_not_those_of_other_processes(folder):
    ask(folder, "of a killed run")
    time.sleep(0.01)
    reward = HumanReward(folder.folder)
    time.sleep(0.01)
    ask(folder, "of another process")
    call = Call(reward, pictures(1, 2), ["a", "a"], [0, 0])
    group = shown_for(folder, "a")
    assert sorted(content["prompt"] for content in folder.shown().values()) == ["a", "of another process"]
    folder.keep(group, {"skip": True})
    assert call.result() == [None, None]


def test_a_group_that_somebody_removed_is_shown_again(folder):
    call = Call(HumanReward(folder.folder), pictures(1, 2), ["a", "a"], [0, 0])
    folder.withdraw(shown_for(folder, "a"))
    folder.keep(shown_for(folder, "a"), {"best": 0, "worst": 1})
    assert call.result() == [1, -1]


def test_a_call_that_is_cancelled_shows_nothing_any_more(folder):
    async def cancel():
        reward = HumanReward(folder.folder)
        task = asyncio.create_task(reward(images=pictures(1, 2), prompts=["a", "a"], groups=[0, 0]))
        while not folder.shown():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancel())
    assert folder.shown() == {}


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_time_limit_that_makes_no_sense_is_refused(timeout, tmp_path):
    with pytest.raises(ValueError, match="`timeout` is"):
        HumanReward(tmp_path, timeout=timeout)


def test_a_time_limit_that_would_lose_votes_is_refused(tmp_path):
    for timeout in (1, 3):
        reward = functools.partial(HumanReward(tmp_path, timeout=timeout))
        with pytest.raises(ValueError, match=rf"`HumanReward` waits {timeout} seconds .* and `reward_timeout` is 1: "):
            RewardScorer([reward], timeout=1)
    RewardScorer([HumanReward(tmp_path, timeout=0.5)], timeout=1)
    RewardScorer([HumanReward(tmp_path, timeout=3)])


# ---- What is kept ----


def test_votes_are_a_dataset_with_the_images(folder, tmp_path):
    first, second, third = ask(folder, "a cat", "half a \ud800 pair", "a dog")
    folder.keep(first, {"best": 2, "worst": 0})
    folder.keep(second, {"stars": [1, None, 3, 5]})
    folder.keep(third, {"skip": True})
    dataset = load_dataset(str(folder.folder / "votes"), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.features == votes.FEATURES
    rows = {row["prompt"]: row for row in dataset}
    assert rows.keys() == {"a cat", "half a ? pair", "a dog"}
    cat = rows["a cat"]
    assert (cat["best"], cat["worst"], cat["stars"], cat["step"]) == (2, 0, None, 3)
    assert [image.convert("RGB").tobytes() for image in cat["images"]] == [
        image.tobytes() for image in pictures(0, 1, 2, 3)
    ]
    assert abs(time.time() - cat["time"].timestamp()) < PATIENCE
    assert rows["half a ? pair"]["stars"] == [1, None, 3, 5]
    assert [rows["a dog"][name] for name in ("best", "worst", "stars")] == [None] * 3


def test_a_kill_in_the_middle_of_a_vote_loses_no_other_and_asks_for_this_one_again(folder, tmp_path):
    first, second = ask(folder, "a cat", "a dog")
    folder.keep(first, {"best": 2, "worst": 0})
    child = os.fork()
    if child == 0:
        votes.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        folder.keep(second, {"best": 0, "worst": 1})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((folder.folder / "votes").glob(".*.tmp"))  # what it had written
    assert [content["voted"] for content in folder.shown().values()] == [True, False]
    assert folder.vote_on(first) == Vote(best=2, worst=0) and folder.vote_on(second) is None
    dataset = load_dataset(str(folder.folder / "votes"), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["prompt"][:] == ["a cat"]
    folder.keep(second, {"best": 1, "worst": 0})
    assert folder.vote_on(second) == Vote(best=1, worst=0)


@pytest.fixture
def slow_disk(monkeypatch):
    """Both of two votes have seen that there is none, and are written, before one of them is kept."""
    both, fsync = threading.Barrier(2), os.fsync

    def wait(file):
        both.wait(PATIENCE)
        fsync(file)

    monkeypatch.setattr(votes.os, "fsync", wait)


def test_of_two_processes_that_write_a_vote_only_one_is_told_that_it_is_kept(folder, slow_disk):
    (group,) = ask(folder, "a cat")
    told = {}

    def vote(place):
        try:
            VoteFolder(folder.folder).keep(group, {"best": place, "worst": None})
            told[place] = "kept"
        except FileExistsError:
            told[place] = "too late"

    threads = [threading.Thread(target=vote, args=(place,)) for place in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told.values()) == ["kept", "too late"]
    assert told[folder.vote_on(group).best] == "kept"
    assert [path.name for path in (folder.folder / "votes").iterdir()] == [f"{group}.parquet"]


def test_votes_are_kept_where_there_are_no_hard_links(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(votes.os, "link", refuse)
    (group,) = ask(folder, "a cat")
    folder.keep(group, {"best": 2, "worst": 0})
    with pytest.raises(FileExistsError):
        folder.keep(group, {"best": 1, "worst": 0})
    assert folder.vote_on(group) == Vote(best=2, worst=0)
    assert [path.name for path in (folder.folder / "votes").iterdir()] == [f"{group}.parquet"]


# ---- The server of the page ----


@pytest.fixture
def server(folder):
    with VoteServer(folder, TOKEN, port=0) as server:
        yield server


def request(server, method, path, token=TOKEN, **kwargs):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with httpx2.Client(trust_env=False) as client:
        return client.request(method, f"{server.url}/{path}", headers=headers, **kwargs)


def test_the_page_holds_no_token_and_loads_nothing_from_elsewhere(server):
    assert server.page == f"{server.url}/#token={TOKEN}"
    for name in ("", "page.css", "page.js"):
        answer = request(server, "GET", name, token=None)
        assert answer.status_code == 200 and TOKEN not in answer.text and "//" not in answer.text.replace("// ", "")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Referrer-Policy"] == "no-referrer"
    for name in ("page.py", "../votes.py", "%2e%2e/votes.py", "docs", "openapi.json"):
        assert request(server, "GET", name).status_code == 404


@pytest.mark.parametrize("token", [None, "x", TOKEN[:-1], TOKEN + "x", "é"])
def test_without_the_token_nothing_is_said_or_kept(server, folder, token, caplog):
    caplog.set_level(logging.DEBUG)
    (group,) = ask(folder, "a cat")
    header = {} if token is None else {"Authorization": f"Bearer {token}".encode("latin-1")}
    with httpx2.Client(trust_env=False) as client:
        for method, path in (("GET", "next"), ("GET", f"groups/{group}/0"), ("POST", f"groups/{group}")):
            answer = client.request(method, f"{server.url}/{path}", headers=header)
            assert answer.status_code == 401 and "cat" not in answer.text
    assert folder.vote_on(group) is None
    assert TOKEN not in caplog.text


def test_a_group_its_images_and_a_vote(server, folder):
    assert request(server, "GET", "next").json() == {"done": 0, "total": 0, "group": None}
    first, second = ask(folder, "a <b>cat</b>", "a dog")
    about = {"id": first, "prompt": "a <b>cat</b>", "num_images": 4}
    assert request(server, "GET", "next").json() == {"done": 0, "total": 2, "group": about}
    image = request(server, "GET", f"groups/{first}/3")
    assert image.headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(image.content)).getpixel((0, 0)) == (3, 0, 0)
    assert request(server, "POST", f"groups/{first}", json={"best": 3, "worst": 0}).json() == {"kept": first}
    assert folder.vote_on(first) == Vote(best=3, worst=0)
    after = request(server, "GET", "next").json()
    assert (after["done"], after["total"], after["group"]["id"]) == (1, 2, second)


def test_any_prompt_can_be_shown(server, folder):
    ask(folder, "half a \ud800 pair")
    assert request(server, "GET", "next").json()["group"]["prompt"] == "half a ? pair"


def test_several_people_get_different_groups_as_long_as_there_are(server, folder):
    groups = ask(folder, "a", "b", "c")
    given = [request(server, "GET", "next").json()["group"]["id"] for _ in range(6)]
    assert given == groups + groups


def test_the_first_vote_on_a_group_counts(server, folder):
    (group,) = ask(folder, "a cat")
    answers = []

    def send(place):
        answers.append(request(server, "POST", f"groups/{group}", json={"best": place, "worst": None}))

    threads = [threading.Thread(target=send, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    before = folder.vote_on(group)
    assert request(server, "POST", f"groups/{group}", json={"skip": True}).status_code == 409
    assert folder.vote_on(group) == before


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("groups/{group}", b'{"best": 9, "worst": 0}', 400, "A vote on 4 images is"),
        ("groups/{group}", b"\xff", 400, "utf-8"),
        ("groups/{group}", b"[" * 50_000, 400, ""),
        ("groups/{group}", b" " * 70_000, 413, "more than 65536"),
        ("groups/" + "0" * 64, b'{"skip": true}', 404, "does not wait"),
        ("groups/..", b'{"skip": true}', 405, ""),
        ("groups/%2e%2e%2fvotes", b'{"skip": true}', 405, ""),
        ("groups/abc", b'{"skip": true}', 404, "no such group"),
    ],
)
def test_what_is_no_vote_is_not_kept(server, folder, path, body, status, said):
    (group,) = ask(folder, "a cat")
    answer = request(server, "POST", path.format(group=group), content=body)
    assert answer.status_code == status and said in answer.text
    assert list((folder.folder / "votes").iterdir()) == []


def test_images_that_are_not_there_are_not_found(server, folder):
    (group,) = ask(folder, "a cat")
    for path in (f"groups/{group}/4", f"groups/{'0' * 64}/0", f"groups/{group[:-1]}/0", f"groups/.{group}/0"):
        assert request(server, "GET", path).status_code == 404
    for place in ("-1", "9" * 300, "9" * 4000):
        assert request(server, "GET", f"groups/{group}/{place}").status_code == 404
    assert request(server, "GET", f"groups/{group}/{'9' * 5000}").status_code in (404, 422)
    assert request(server, "GET", f"groups/{group}/group.json").status_code == 422


# ---- The command ----


def vote(capsys, *words):
    status = cli.main(["vote", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def served_once(monkeypatch):
    """The server ends at once, as by Ctrl-C."""
    monkeypatch.setattr(VoteServer, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))


def test_a_terminal_shows_the_address_with_a_new_token(folder, served_once, capsys, monkeypatch):
    monkeypatch.delenv("TRL_MARBLE_VOTE_TOKEN", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    status, first, _ = vote(capsys, folder.folder, "--port", 0)
    second = vote(capsys, folder.folder, "--port", 0)[1]
    assert status == 0 and first.startswith("Serving the page for votes at http://127.0.0.1:")
    token, other = [text.strip().partition("/#token=")[2] for text in (first, second)]
    assert len(token) >= 20 and token != other


def test_a_log_never_has_the_token(folder, served_once, capsys, monkeypatch):
    monkeypatch.delenv("TRL_MARBLE_VOTE_TOKEN", raising=False)
    status, out, error = vote(capsys, folder.folder, "--port", 0)
    assert status == 2 and "set the environment variable TRL_MARBLE_VOTE_TOKEN" in error and out == ""
    monkeypatch.setenv("TRL_MARBLE_VOTE_TOKEN", TOKEN)
    status, out, error = vote(capsys, folder.folder, "--port", 0)
    assert status == 0 and "/#token=TOKEN, with the value of TRL_MARBLE_VOTE_TOKEN" in out
    assert TOKEN not in out + error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "`nowhere` is not the folder of a `HumanReward`"),
        ([".", "--port", "99999"], "cannot listen on 127.0.0.1, port 99999"),
        ([".", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1, port 8200"),
    ],
)
def test_a_command_that_cannot_be_run_says_why(words, message, tmp_path, capsys, monkeypatch):
    HumanReward(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_MARBLE_VOTE_TOKEN", TOKEN)
    status, _, error = vote(capsys, *words)
    assert status == 2 and message in error and TOKEN not in error


# ---- The page in a browser ----


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_people_vote_by_mouse_and_by_keyboard(server, folder, tmp_path):
    reward = HumanReward(folder.folder)
    prompts = ["a cat", "<img src=x onerror=alert(1)>", "a dog", "a boat"]
    images = pictures(*range(0, 240, 15), size=(64, 64))
    call = Call(reward, images, [prompt for prompt in prompts for _ in range(4)], [k // 4 for k in range(16)])
    shown_for(folder, "a boat")
    with Browser() as browser:

        def expect(prompt, done):
            browser.wait_for(f"prompt.textContent === {json.dumps(prompt)}")
            browser.wait_for("document.querySelectorAll('figure').length === 4")
            assert browser.run("progress.value") == f"{done} of 4 groups"

        browser.open(server.page)
        expect("a cat", 0)
        assert TOKEN not in browser.run("location.href")  # nor in the history
        assert browser.run("send.disabled") and browser.run("hint.textContent") == "Choose the best image."
        browser.click("figure:nth-child(3) .picture")
        browser.click("figure:nth-child(2) .picture")
        browser.click("figure:nth-child(2) .picture")  # takes it back
        browser.click("figure:nth-child(1) .picture")
        marks = browser.run("[...document.querySelectorAll('.mark')].map((mark) => mark.textContent)")
        assert marks == ["worst", "", "best", ""]
        browser.click("#send")

        expect("<img src=x onerror=alert(1)>", 1)  # as text
        browser.press("ArrowRight", "b", "ArrowRight", "ArrowRight", "w", "z")
        assert browser.run("zoom.open && !zoom.querySelector('img').src.startsWith('http')")
        browser.press("z", "Enter")

        expect("a dog", 2)
        browser.press("Enter")  # nothing is chosen: nothing is sent
        browser.press("m", "5", "1", "4", "0")
        rows = "[...document.querySelectorAll('.stars')]"
        assert browser.run(f"{rows}.map((row) => row.querySelectorAll('.full').length)") == [5, 1, 4, 0]
        browser.press("Enter")

        expect("a boat", 3)
        browser.press("s")
        browser.wait_for("prompt.textContent === 'Nothing to vote on'")
        browser.screenshot(tmp_path / "page.png")
        assert Image.open(tmp_path / "page.png").size == (1000, 720)
    assert call.result() == [-1, 0, 1, 0, 0, 1, 0, -1, 1, -1, 0.5, None] + [None] * 4


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_says_what_is_wrong(folder):
    with Browser() as browser, VoteServer(folder, TOKEN, port=0) as server:
        browser.open(f"{server.url}/#token=another")
        browser.wait_for("hint.textContent.includes('needs the address that `trl-marble vote` printed')")
        browser.open("about:blank")
        (group,) = ask(folder, "a cat")
        browser.open(server.page)
        browser.wait_for("prompt.textContent === 'a cat'")
        folder.withdraw(group)
        browser.press("b", "Enter")
        browser.wait_for("hint.textContent.startsWith('The run did not wait for the last vote.')")
        server.close()
        browser.wait_for("hint.textContent.includes('Is `trl-marble vote` running?')")


# ---- A run ----


@pytest.mark.slow
def test_a_run_learns_from_votes_and_its_repetition_asks_nobody(folder, tmp_path, monkeypatch):
    ended = threading.Event()

    def vote_for_the_last_image():
        while not ended.wait(0.05):
            for group, content in folder.shown().items():
                if not content["voted"]:
                    folder.keep(group, {"best": content["num_images"] - 1, "worst": 0})

    person = threading.Thread(target=vote_for_the_last_image)
    person.start()
    try:
        first = small_trainer(tmp_path / "first", (bright, HumanReward(folder.folder)), logging_steps=1)
        first.train()
    finally:
        ended.set()
        person.join()
    logs = [log for log in first.state.log_history if "rewards/HumanReward/mean" in log]
    assert [log["rewards/HumanReward/mean"] for log in logs] == [0, 0]
    assert [log["rewards/HumanReward/std"] for log in logs] == pytest.approx([1, 1], rel=0.2)
    assert len(list((folder.folder / "votes").iterdir())) == 4  # two steps with two prompts
    assert folder.shown() == {}

    monkeypatch.setattr(VoteFolder, "ask", lambda *_: pytest.fail("people are asked again"))
    second = small_trainer(tmp_path / "second", (bright, HumanReward(folder.folder)), logging_steps=1)
    second.train()
    trained = [dict(trainer.model.named_parameters()) for trainer in (first, second)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
