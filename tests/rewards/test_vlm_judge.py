# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The judge with a real HTTP server, whose answers each test sets."""

import asyncio
import logging
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from chat_endpoint import (
    KEY,
    PATIENCE,
    completion,
    die,
    endpoint,
    hang,
    level,
    pictures,
    seen_image,
    seen_text,
    send,
)
from PIL import Image

from trl_marble.rewards import ARTIFACT_TEMPLATE, RewardError, RewardScorer
from trl_marble.rewards.judge_score import parse_score
from trl_marble.rewards.vlm_judge import VLMJudge


def judge(server, **kwargs):
    return VLMJudge("a-model", server.url, **({"api_key": KEY, "max_retries": 0, "timeout": PATIENCE} | kwargs))


def ask(reward, *levels, prompts=None):
    images = pictures(*levels)
    return asyncio.run(reward(images=images, prompts=prompts or ["p"] * len(images), trainer_state=None, number=[1]))


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- What is asked, and what its answer becomes ----


def test_a_request_has_the_image_the_prompt_and_the_options():
    with endpoint(lambda handler, request, number: "Final Score: 4") as server:
        assert ask(judge(server), 7, prompts=['a "red" cat']) == [0.75]
    (request,), (headers,) = server.requests, server.headers
    assert server.paths == ["/v1/chat/completions"]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert {name: request[name] for name in request if name != "messages"} == {
        "model": "a-model",
        "temperature": 0,
        "max_tokens": 512,
    }
    assert [message["role"] for message in request["messages"]] == ["user"]
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]
    image = seen_image(request)
    assert (image.format, image.mode, image.tobytes()) == ("PNG", "RGB", pictures(7)[0].tobytes())
    text = seen_text(request)
    for interface in ("1. Alignment with the Caption:", "2. Overall Image Quality:", "a score from 1 to 5 after"):
        assert interface in text
    assert text.endswith("'Final Score:'.\nYour task is provided as follows:\nText Caption: [a \"red\" cat]")


def test_values_keep_the_order_of_the_images():
    answered = [threading.Event() for _ in range(7)]
    answered[6].set()

    def answer_the_last_first(handler, request, number):
        assert answered[level(request) + 1].wait(PATIENCE)
        answered[level(request)].set()
        return f"Final Score: {level(request)}"

    with endpoint(answer_the_last_first) as server:
        assert ask(judge(server), 1, 5, 2, 4, 3) == [0.0, 1.0, 0.25, 0.75, 0.5]


@pytest.mark.parametrize(
    "prompt",
    ["", "ein Fuchs 🦊 und 漢字 و", "{prompt} {0} {x", 'a "sign\\"\n]', "Final Score: 5", "\ud800 alone"],
)
def test_any_prompt_arrives_unchanged(prompt):
    with endpoint(lambda handler, request, number: "Final Score: 1") as server:
        template = 'As JSON {"score": 1}: <{prompt}>'
        assert ask(judge(server, prompt_template=template), 1, prompts=[prompt]) == [0.0]
    assert seen_text(server.requests[0]) == f'As JSON {{"score": 1}}: <{prompt}>'


def test_transparency_is_seen_on_white_and_one_pixel_is_enough():
    images = [
        Image.new("RGBA", (1, 1), (0, 0, 0, 0)),
        Image.new("RGBA", (1, 1), (9, 8, 7, 255)),
        Image.new("1", (1, 1)),
    ]
    with endpoint(lambda handler, request, number: "Final Score: 5") as server:
        assert asyncio.run(judge(server, max_concurrency=1)(images=images, prompts=["a"] * 3)) == [1.0] * 3
    assert [seen_image(request).getpixel((0, 0)) for request in server.requests] == [
        (255, 255, 255),
        (9, 8, 7),
        (0, 0, 0),
    ]


def test_another_label_range_and_other_options():
    with endpoint(lambda handler, request, number: "Alignment Score (1-10): 10\nStyle Score (1-10): 4") as server:
        reward = judge(
            server,
            score_label="Style Score",
            score_range=(1, 10),
            request_options={"max_tokens": None, "chat_template_kwargs": {"enable_thinking": False}},
        )
        assert ask(reward, 1) == [pytest.approx(1 / 3)]
    request = server.requests[0]
    assert "max_tokens" not in request and request["temperature"] == 0
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


# ---- How many at a time, and on which loop ----


def test_concurrency_is_bounded_over_overlapping_calls():
    three_at_once = threading.Barrier(3)

    def wait(handler, request, number):
        three_at_once.wait(PATIENCE)
        return "Final Score: 3"

    async def two_calls(reward):
        one, two = [reward(images=pictures(*range(9)), prompts=["p"] * 9) for _ in range(2)]
        return await asyncio.gather(one, two)

    with endpoint(wait) as server:
        assert asyncio.run(two_calls(judge(server, max_concurrency=3))) == [[0.5] * 9] * 2
    assert len(server.requests) == 18
    assert server.most_under_way == 3


def test_a_judge_outlives_event_loops_and_serves_two_at_once():
    both_loops = threading.Barrier(2)

    def wait(handler, request, number):
        if number >= 10 and level(request) == 1:
            both_loops.wait(PATIENCE)
        return "Final Score: 3"

    with endpoint(wait) as server:
        reward = judge(server, max_concurrency=2)
        for _ in range(2):
            assert ask(reward, 1, 2, 3, 4, 5) == [0.5] * 5
        with ThreadPoolExecutor() as threads:
            assert list(threads.map(lambda _: ask(reward, 1, 2, 3, 4, 5), range(2))) == [[0.5] * 5] * 2


def test_with_a_scorer_one_failure_is_one_image():
    with endpoint(lambda handler, request, number: "no idea" if level(request) == 2 else "Final Score: 5") as server:
        scorer = RewardScorer([judge(server)])
        for _ in range(2):  # after `close` there is another event loop
            scores = scorer.collect(scorer.submit(pictures(1, 2, 3), ["a", "b", "c"], {"number": [1, 2, 3]}, None))
            assert scorer.names == ["VLMJudge"]
            assert scores.rewards.isnan().tolist() == scores.failed.tolist() == [[False, True, False]]
            assert torch.equal(scores.rewards[~scores.failed], torch.ones(2))
            assert "'b'" in str(scores.errors[0]) and "no idea" in str(scores.errors[0])
            scorer.close()


def test_a_scorer_can_be_closed_while_the_judge_hangs():
    asked = threading.Event()

    def asked_then_hang(handler, request, number):
        asked.set()
        hang(server)

    with endpoint(asked_then_hang) as server:
        scorer = RewardScorer([judge(server)])
        scorer.submit(pictures(1, 2), ["a", "b"], {}, None)
        assert asked.wait(PATIENCE)
        start = time.monotonic()
        scorer.close()
        assert time.monotonic() - start < PATIENCE / 2


# ---- What goes wrong and passes ----


def test_too_many_requests_then_an_answer_after_the_time_that_was_asked_for():
    def busy_first(handler, request, number):
        if number == 0:
            return send(handler, 429, {"error": "slow down"}, Retry_After="1")
        return "Final Score: 2"

    with endpoint(busy_first) as server:
        start = time.monotonic()
        assert ask(judge(server, max_retries=1), 1) == [0.25]
        assert time.monotonic() - start >= 1
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 529])
def test_every_status_that_means_later_is_tried_again(status):
    with endpoint(
        lambda handler, request, number: "Final Score: 2" if number else send(handler, status, b"<html>later</html>")
    ) as server:
        assert ask(judge(server, max_retries=None), 1) == [0.25]
    assert len(server.requests) == 2


def test_it_is_tried_again_until_the_time_is_over():
    with endpoint(lambda handler, request, number: send(handler, 503, b"loading")) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match=r"attempts: \d; the last: status 503: 'loading'"):
            ask(judge(server, max_retries=None, timeout=1.0), 1)
        assert 0.7 < time.monotonic() - start < PATIENCE
    assert len(server.requests) >= 2


def test_a_longer_wait_than_there_is_time_for_is_no_wait():
    with endpoint(lambda handler, request, number: send(handler, 429, b"slow", Retry_After="3600")) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match="it asks to wait 3600 seconds, more than are left of 60"):
            ask(judge(server, max_retries=None), 1)
        assert time.monotonic() - start < PATIENCE / 2
    assert len(server.requests) == 1


def test_a_server_that_hangs_after_it_was_busy_is_a_timeout_that_says_so():
    with endpoint(lambda handler, request, number: hang(server) if number else send(handler, 503, b"busy")) as server:
        with pytest.raises(RewardError, match=r"within 0\.6 seconds \(attempts: 1; the last: status 503: 'busy'\)"):
            ask(judge(server, max_retries=None, timeout=0.6), 1)


def test_a_server_error_then_a_dead_connection_then_an_answer():
    def recover(handler, request, number):
        if number == 0:
            return send(handler, 503, b"loading")
        if number == 1:
            return die(handler)
        return "Final Score: 2"

    with endpoint(recover) as server:
        assert ask(judge(server, max_retries=2), 1) == [0.25]
    assert len(server.requests) == 3


# ---- What goes wrong for one image ----


def thought(text, thoughts, field="reasoning_content", **choice):
    """The answer of a server that sends thoughts apart."""
    message = {"role": "assistant", "content": text, field: thoughts}
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}]}


def failure_of(server_answer, **kwargs):
    """What a judge gives for the second of three images, which goes wrong; the others have a value."""

    def behave(handler, request, number):
        return server_answer(handler) if level(request) == 2 else "Final Score: 5"

    with endpoint(behave) as server:
        first, failure, last = ask(judge(server, **kwargs), 1, 2, 3)
    assert (first, last) == (1.0, 1.0)
    assert isinstance(failure, RewardError)
    assert KEY not in str(failure)
    return str(failure), len(server.requests)


def test_an_answer_without_a_score_is_quoted():
    message, requests = failure_of(lambda handler: "I cannot rate this " + "x" * 1000, max_retries=3)
    assert "expected 'Final Score: ' and a number from 1 to 5" in message
    assert "'I cannot rate this xxx" in message and len(message) < 400
    assert requests == 3  # an answer is an answer: it is not asked again


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>404", "'<html>404'"),
        (b"", "not a chat completion: ''"),
        (b"\xff\xfe\x00", "not a chat completion"),
        (b"[" * 100_000, "not a chat completion"),
        ({"choices": []}, "not a chat completion"),
        ({"choices": [{"message": {"content": ["Final Score: 5"]}}]}, "not a chat completion"),
        ({"choices": [{"message": {"content": {"text": "Final Score: 5"}}}]}, "not a chat completion"),
        ({"choices": [{"message": {"content": [{"type": "text"}]}}]}, "not a chat completion"),
        (completion([]), "has no score"),
        (completion([{"type": "thinking", "thinking": "Final Score: 5"}]), "has no score"),
        (completion([{"type": "text", "text": "Final Score: 4"}, {"type": "text", "text": ".5"}]), "different scores"),
        (completion([{"type": "text", "text": "Final Score: 4"}, {"type": "text", "text": "/10"}]), "one out of 10"),
        (completion("<think>Final Score: 5"), "has no score"),
        (completion("Final Score: 4\nThe cat is", finish_reason="length"), "cut off: it ended by 'length' (raise"),
        (completion("<think>Final Score: 2 would be", finish_reason="length"), "cut off: it ended by 'length' (raise"),
        (completion("<think>Final Score: 2", finish_reason="length"), "in the middle of the model's thoughts, before"),
        (
            completion("<think>a cat</think>Final Sc", finish_reason="length"),
            "(raise `max_tokens` in `request_options`).",
        ),
        (thought(None, "Final Score: 2", finish_reason="length"), "in the middle of the model's thoughts, before"),
        (thought("", "Final Score: 2", "reasoning", finish_reason="length"), '{"enable_thinking": False}'),
        (thought(None, "Final Score: 2"), "has no score"),
        (completion("Final Score: 4", finish_reason="content_filter"), "cut off: it ended by 'content_filter'. The"),
        (completion("Final Score: 4", finish_reason="abort"), "cut off: it ended by 'abort'. The"),
        ([1, 2], "not a chat completion"),
        (completion(None), "has no score"),
        (completion("Final Score: 7"), "7 is not from 1 to 5"),
        (completion("Final Score: 4", finish_reason="length"), "raise `max_tokens` in `request_options`"),
    ],
    ids=str,
)
def test_an_answer_that_is_not_a_judgement_is_a_failure_of_that_image(body, said):
    assert said in failure_of(lambda handler: send(handler, 200, body))[0]


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos_token", "", None])
def test_an_answer_that_the_model_ended_counts(reason):
    answer = completion("Final Score: 3", finish_reason=reason)
    with endpoint(lambda handler, request, number: send(handler, 200, answer)) as server:
        assert ask(judge(server), 1) == [0.5]


@pytest.mark.parametrize(
    "parts",
    [
        [("text", "Final Score: 3")],
        [("thinking", "Final Score: 1"), ("text", "Final Score: 3")],
        [("reasoning", "Final Score: 1"), ("output_text", "The cat is blue."), ("text", "Final Score: 3")],
        [("text", "Final "), ("text", "Score: "), ("text", "3")],
        [("text", "<think>Final Score: 1"), ("text", "</think>Final Score: 3")],
    ],
    ids=str,
)
def test_the_text_of_an_answer_in_parts_counts(parts):
    answer = completion([{"type": kind, "text" if "text" in kind else kind: text} for kind, text in parts])
    with endpoint(lambda handler, request, number: send(handler, 200, answer)) as server:
        assert ask(judge(server), 1) == [0.5]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_that_come_apart_do_not_count(field):
    answer = thought("Final Score: 3", "Final Score: 5, no, 1", field)
    with endpoint(lambda handler, request, number: send(handler, 200, answer)) as server:
        assert ask(judge(server), 1) == [0.5]


@pytest.mark.parametrize("status", [400, 403, 406, 413, 415, 422, 451])
def test_a_request_that_is_refused_is_a_failure_of_that_image(status):
    message, requests = failure_of(lambda handler: send(handler, status, {"error": "context length"}), max_retries=3)
    assert f"refused a request with status {status}" in message and "context length" in message
    assert requests == 3


def test_many_refusals_are_failures_as_long_as_one_image_is_scored():
    def refuse(handler, request, number):
        return "Final Score: 5" if level(request) == 30 else send(handler, 403, b"content policy")

    with endpoint(refuse) as server:
        values = ask(judge(server), *range(40))
    assert [value for value in values if not isinstance(value, RewardError)] == [1.0]


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "byte by byte"])
def test_an_answer_that_does_not_come_is_a_failure_of_that_image(drip):
    given_up = threading.Event()

    def slow(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
        while not given_up.wait(0.05):
            if drip:
                handler.wfile.write(b" ")

    message, requests = failure_of(slow, timeout=0.5, max_retries=3)
    given_up.set()
    assert "did not answer within 0.5 seconds" in message
    assert requests == 3  # not asked again: the model may still be at work


def test_a_connection_that_always_dies_is_a_failure_of_that_image():
    message, requests = failure_of(die, max_retries=1)
    assert "did not answer (attempts: 2; the last: RemoteProtocolError" in message
    assert requests == 4


def test_a_server_error_that_stays_is_a_failure_of_that_image():
    message, _ = failure_of(lambda handler: send(handler, 500, f"worker died of {KEY}".encode()))
    assert "attempts: 1; the last: status 500: 'worker died of [secret]'" in message


# ---- What goes wrong for all ----


def test_a_dead_server_raises():
    reward = VLMJudge("m", f"http://127.0.0.1:{closed_port()}/v1", api_key=KEY, max_retries=1)
    with pytest.raises(RewardError, match=r"did not answer \(attempts: 2; the last: ConnectError"):
        ask(reward, 1, 2, 3)


def test_a_server_that_hangs_raises_before_every_image_has_waited():
    with endpoint(lambda handler, request, number: hang(server)) as server:
        with pytest.raises(RewardError, match=r"did not answer within 0\.3 seconds"):
            ask(judge(server, timeout=0.3, max_concurrency=2), *range(100))
    assert len(server.requests) <= 10


def test_a_server_that_dies_in_the_middle_raises():
    with endpoint(lambda handler, request, number: "Final Score: 5" if number < 5 else die(handler)) as server:
        with pytest.raises(RewardError, match="did not answer"):
            ask(judge(server, max_concurrency=2), *range(100))
    assert len(server.requests) < 20


def test_failures_with_answers_in_between_are_not_consecutive():
    with endpoint(lambda handler, request, number: die(handler) if level(request) % 2 else "Final Score: 5") as server:
        values = ask(judge(server, max_concurrency=1), *range(20))
    assert [isinstance(value, RewardError) for value in values] == [False, True] * 10


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "Check `api_key`"), (404, "Check `base_url` and the model"), (302, "302")]
)
def test_a_refusal_of_everything_raises_and_hides_the_key(status, fix, caplog):
    caplog.set_level(logging.DEBUG)
    with endpoint(lambda handler, request, number: send(handler, status, {"error": f"wrong key {KEY}"})) as server:
        with pytest.raises(RewardError, match=fix) as raised:
            ask(judge(server, max_retries=3, max_concurrency=1), 1, 2, 3)
    assert f"answered status {status}" in str(raised.value) and "wrong key [secret]" in str(raised.value)
    assert len(server.requests) == 1
    for text in (caplog.text, repr(raised.value), repr(raised.value.__cause__)):
        assert KEY not in text


def test_a_refusal_of_each_image_raises():
    with endpoint(lambda handler, request, number: send(handler, 403, {"error": f"wrong key {KEY}"})) as server:
        with pytest.raises(
            RewardError, match=r"refused every image.*403.*wrong key \[secret\].*Check `api_key`"
        ) as raised:
            ask(judge(server), 1, 2, 3)
    assert len(server.requests) == 3
    assert KEY not in str(raised.value) and KEY not in repr(raised.value.__cause__)


def test_what_is_not_http_raises():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 mail.example.org ESMTP\r\n")
                connection.shutdown(socket.SHUT_WR)
                # Closing with something unread would reset the connection, perhaps before the greeting is read.
                while connection.recv(2**16):
                    pass

        thread = threading.Thread(target=greet)
        thread.start()
        reward = VLMJudge("m", f"http://127.0.0.1:{listener.getsockname()[1]}", max_retries=0, timeout=5)
        with pytest.raises(RewardError, match="RemoteProtocolError"):
            ask(reward, 1)
        thread.join()


# ---- The probability of yes ----


def tokens(*words, **top):
    """Log-probabilities as vLLM sends them; `at` has the most probable words at a place, other tokens are certain."""

    def one(token, alternatives):
        listed = [{"token": word, "logprob": math.log(p), "bytes": list(word.encode())} for word, p in alternatives]
        return {"token": token, "logprob": listed[0]["logprob"], "bytes": None, "top_logprobs": listed}

    return {"content": [one(word, top.get("at", {}).get(place, [(word, 1.0)])) for place, word in enumerate(words)]}


YES = [("Yes", 0.6), ("No", 0.2), (" yes", 0.05), ("YES", 0.05), ("NO", 0.05), ("Maybe", 0.05)]
SURE = [("Yes", 1.0), (" the", 1e-9)]
P_YES = 0.7 / 0.95


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (completion("Yes", logprobs=tokens("Yes", at={0: YES})), P_YES),
        (completion("Yes", logprobs=tokens("Yes", at={0: SURE})), 1.0),
        (completion("No.", logprobs=tokens("No", ".", at={0: [("No", 0.75), ("Yes", 0.25)]})), 0.25),
        (completion(" Yes", logprobs=tokens(" Yes", "<|im_end|>", at={0: YES})), P_YES),
        (completion("**Yes**", logprobs=tokens("**", "Yes", "**", at={1: YES})), P_YES),
        # What comes after the first word may be cut off.
        (completion("Yes, the", finish_reason="length", logprobs=tokens("Yes", ",", " the", at={0: YES})), P_YES),
        # Thoughts, in the answer and apart from it, with the log-probabilities of their tokens or without.
        (
            completion(
                "<think>No. Yes? No</think>\n\nYes",
                logprobs=tokens("<think>", "No", ". Yes", "? No", "</think>", "\n\n", "Yes", at={6: YES}),
            ),
            P_YES,
        ),
        (thought("Yes", "Yes? No", logprobs=tokens("Yes", "? No", "</think>", "\n\n", "Yes", at={4: YES})), P_YES),
        (thought("\n\nYes", "No", "reasoning", logprobs=tokens("Yes", "", at={0: YES})), P_YES),
        # Tokens that are written in another way than the answer.
        (completion("Yes ✅", logprobs=tokens("Yes", " \ufffd", "\ufffd", at={0: YES})), P_YES),
        (completion("✅ Yes", logprobs=tokens("\ufffd", "\ufffd", "▁Yes", at={2: YES})), P_YES),
        (completion("Yes, it does", logprobs=tokens("▁Yes", ",", "▁it", "▁does", at={0: YES})), P_YES),
        (completion("Yes, a &amp; b", logprobs=tokens("Yes", ", a", " &", "amp;", " b", at={0: YES})), P_YES),
        (thought("Yes ✅", "Yes", logprobs=tokens("Yes", "</think>", "Yes", "\ufffd", at={2: YES})), P_YES),
        # The answer is found as a whole: its first word may come again.
        (completion("Yes ✅ Yes", logprobs=tokens("Yes", "\ufffd", "\ufffd", " Yes", at={0: YES})), P_YES),
    ],
)
def test_the_probability_of_yes_is_that_of_the_first_word(answer, expected):
    with endpoint(lambda handler, request, number: send(handler, 200, answer)) as server:
        reward = judge(server, score="p_yes")
        assert ask(reward, 1, prompts=["a cat"]) == [pytest.approx(expected)]
    (request,) = server.requests
    assert request["logprobs"] is True and request["top_logprobs"] == 20
    assert "[a cat]" in seen_text(request) and seen_text(request).endswith("Answer with one word, Yes or No.")
    assert reward.value_range == "0 to 1, the probability of yes"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (completion("Yes"), "sent no log-probabilities"),
        (completion("Yes", logprobs=None), "sent no log-probabilities"),
        (completion("Yes", logprobs={"content": []}), "sent no log-probabilities"),
        (completion("A cat", logprobs=tokens("A", " cat", at={0: [("A", 0.7), ("Yes", 0.2)]})), "of 0.200 only"),
        (completion("Yes", logprobs=tokens("Oui")), "of another text than the answer"),
        (completion("Yes", logprobs={"content": [{"token": "Yes"}]}), "not as OpenAI's interface has them"),
        (completion("Yes", logprobs={"content": [{"token": 3}]}), "not as OpenAI's interface has them"),
        (completion("Yes", logprobs=[1]), "not a chat completion"),
        (completion("Yes", logprobs=tokens("Yes", at={0: [("Yes", 9.0), ("No", 1.0)]})), "of 10.000 only"),
        (completion("Yes, it does", logprobs=tokens("Yes", ", it")), "of another text than the answer"),
        (completion("", logprobs=tokens("Yes")), "The answer is empty"),
        (completion("是", logprobs=tokens("是")), "does not begin with Yes or No"),
        (
            completion("<think>Yes", finish_reason="length", logprobs=tokens("<think>", "Yes")),
            "in the middle of the model's thoughts",
        ),
        (
            thought(None, "Yes", finish_reason="length", logprobs=tokens("Yes")),
            "in the middle of the model's thoughts",
        ),
        (completion("Yes", finish_reason="content_filter", logprobs=tokens("Yes")), "ended by 'content_filter'"),
    ],
    ids=range(15),
)
def test_an_answer_without_a_probability_of_yes_is_a_failure_of_that_image(answer, said):
    with endpoint(lambda handler, request, number: send(handler, 200, answer)) as server:
        (failure,) = ask(judge(server, score="p_yes"), 1)
    assert isinstance(failure, RewardError) and said in str(failure)


def test_the_artifact_rubric_asks_for_faults_only():
    with endpoint(lambda handler, request, number: "Six fingers.\nFinal Score: 2") as server:
        assert ask(judge(server, prompt_template=ARTIFACT_TEMPLATE), 1, prompts=["a hand"]) == [0.25]
    text = seen_text(server.requests[0])
    assert "for the caption [a hand]" in text and "hands and fingers" in text and "after 'Final Score:'" in text


# ---- The key ----


def test_the_key_is_from_the_environment_unless_it_is_passed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    with endpoint(lambda handler, request, number: "Final Score: 5") as server:
        for given in (None, "sk-given", ""):
            ask(judge(server, api_key=given), 1)
    assert [headers["Authorization"] for headers in server.headers] == [
        "Bearer sk-environment",
        "Bearer sk-given",
        None,
    ]


@pytest.mark.parametrize("key", [KEY + "\n", " " + KEY, KEY + "é"])
def test_a_key_that_no_header_can_carry_is_refused_unquoted(key, monkeypatch):
    with pytest.raises(ValueError, match="`api_key` has characters") as raised:
        VLMJudge("m", "http://127.0.0.1", api_key=key)
    assert KEY not in str(raised.value)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="`OPENAI_API_KEY` has characters") as raised:
        VLMJudge("m", "http://127.0.0.1")
    assert KEY not in str(raised.value)


# ---- Arguments and scores ----


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base_url": "127.0.0.1:8000/v1"}, "expected 'http://host:port'"),
        ({"base_url": "ftp://host"}, "expected 'http://host:port'"),
        ({"base_url": "http://host:port"}, "is not a URL"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "no user, password or query"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "no user, password or query"),
        ({"prompt_template": "rate this"}, "`prompt_template` has no {prompt}"),
        ({"score_label": " "}, "`score_label` is empty"),
        ({"score_range": (5, 1)}, r"`score_range` is \(5, 1\)"),
        ({"max_concurrency": 0}, "`max_concurrency` must be at least 1, got 0"),
        ({"timeout": 0}, "`timeout` is 0"),
        ({"timeout": float("nan")}, "`timeout` is nan"),
        ({"max_retries": -1}, "`max_retries` must be at least 0, got -1"),
        ({"score": "p_no"}, "`score` is 'p_no'; it must be 'number' or 'p_yes'"),
        ({"score": "p_yes", "score_label": "Style Score"}, "have no effect with `score='p_yes'`"),
        ({"request_options": {"stream": True}}, r"`request_options` sets \['stream'\]"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message) as raised:
        VLMJudge(**({"model": "m", "base_url": "http://127.0.0.1:8000/v1"} | kwargs))
    assert KEY not in str(raised.value)


THINKING = "Final Score: 2 is too low"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 4),
        ("Final Score: 3.8125", 3.8125),
        ("cat (object): 1\nred (attribute): 0\nFinal Score: 2.5\n", 2.5),
        ("**Final Score:** 4", 4),
        ("**Final Score**: **4.5**", 4.5),
        ("final score:\n\n5", 5),
        ("FINAL SCORE = 1", 1),
        ("Final Score：3", 3),
        ("Final Score: [2]", 2),
        ("Final Score: 4/5", 4),
        ("Final Score: 4 out of 5.", 4),
        ("Final Score (1-5): 3", 3),
        ("The final score is 3. The cat is blue.", 3),
        ('{"final_score": 4, "why": "5 cats"}', 4),
        ("Final Score: 4\nThe Final Score weighs 2 criteria.", 4),
        ("Final Score: 4. 3 objects are missing.", 4),
        ("Final Score: 5, 2 cats as asked", 5),
        # Markdown, LaTeX, HTML, tables, JSON.
        ("**Final Score: 4/5**", 4),
        ("### Final **Score**: 4", 4),
        ("Final Score: **4**/5", 4),
        ("> *Final Score:* 4.", 4),
        ("Final Score: $\\boxed{4}$", 4),
        ("\\boxed{Final Score: 4/5}", 4),
        ("\\[ \\text{Final Score: } 4 \\]", 4),
        ("<answer>Final Score: <b>4</b></answer>", 4),
        ("<|begin_of_box|>Final Score: 4<|end_of_box|>", 4),
        ("Final Score: <4>", 4),
        ("| Final Score | 4 |", 4),
        ('```json\n{"final_score": "4"}\n```', 4),
        # The judge's own scale.
        ("Final Score (out of 5): 4", 4),
        ("Final Score [1–5]: 4.0", 4),
        ("Final Score: 4 (out of 5)", 4),
        ("Final Score: 4.0/5.0 points", 4),
        ("Final Score: 4 stars (1 to 5)", 4),
        ("On a scale from one to five: Final Score: 4", 4),
        # What says nothing about the score.
        ("Final Score (overall): 4", 4),
        ("Final Score: 4 (the sign is blurry)", 4),
        ("Final Score: 4 - good, but blurry", 4),
        ("Final Score: 4 - all 3 cats are shown", 4),
        ("Final Score: 4 (all 3 cats are shown), 2 dogs as well", 4),
        ("Final Score: 4\n\n(Alignment Score: 3)", 4),
        ("Final Score: 4 because the sign is blurry. 2 of 3 letters are right.", 4),
        ("Final Score: 4\n1. The cat\n2. The dog", 4),
        ("3 out of 4 cats, in front of a 1:10 scale model.\nFinal Score: 4", 4),
        ("I will give the Final Score:\nFinal Score: 4\nFinal Score: 4", 4),
        # What was thought.
        (f"<think>{THINKING}</think>\n\nFinal Score: 4", 4),
        ("analysisPerhaps Final Score: 2.assistantfinalFinal Score: 4", 4),
        ("<|START_THINKING|>Final Score: 2<|END_THINKING|>Final Score: 4", 4),
        ("Final Score: 4 on a scale of 1 to 5.", 4),
        ("Final Score: 4 on a 5-point scale", 4),
        ("Final Score: 4 (1 = worst, 5 = best)", 4),
        ("Final Score: 4\n\nThe final score of 4 reflects how well it fits.", 4),
        ("| **Final Score** | **4** | Good alignment overall |", 4),
        ("__Final Score__: 4分", 4),
        (f"{THINKING}\n</think>\n\nFinal Score: 4", 4),
        (f"<thinking>a <think>b</think> {THINKING}</thinking> Final Score: 4", 4),
        (f"<Reasoning effort='low'>{THINKING}</Reasoning>\n<score>Final Score: 4</score>", 4),
        (f"[THINK]{THINKING}[/THINK]Final Score: 4", 4),
        (f"◁think▷{THINKING}◁/think▷Final Score: 4", 4),
        (f"<seed:think>{THINKING}</seed:think>Final Score: 4", 4),
        (f"<|begin_of_thought|>{THINKING}<|end_of_thought|>Final Score: 4", 4),
        (f"<|channel|>analysis<|message|>{THINKING}<|end|><|channel|>final<|message|>Final Score: 4", 4),
    ],
)
def test_scores_are_found(answer, score):
    assert parse_score(answer, "Final Score", (1.0, 5.0)) == score


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "4",
        "Final Score:",
        "Final Score: N/A",
        "Final Score: four",
        "Final Score: 3-4",
        "Final Score: 3 to 4",
        "Final Score: 4,5",
        "Final Score: 4.5.6",
        "Final Score: 80%",
        "Final Score: 0",
        "Final Score: -3",
        "Final Score: 45",
        "Final Score: 5.01",
        "Final Score: 4/10",
        *("Semifinal Score: 4", "Semi-Final Score: 4", "Final Scores 4"),
        # Thoughts, finished or not.
        *(f"<think>{THINKING}", f"<think>{THINKING}</think>I cannot rate this.", f"{THINKING}</think>"),
        *("<reasoning>Final Score: 4</reasoning>", "<|channel|>analysis<|message|>Final Score: 4"),
        *(
            "<|START_THINKING|>Final Score: 4",
            "<|channel>thought\nFinal Score: 4",
            "<unused94>thought\nFinal Score: 4",
        ),
        *(
            "<inner_thoughts>Final Score: 4</inner_thoughts>",
            "<cot>Final Score: 4</cot>",
            "&lt;think&gt;Final Score: 4",
        ),
        "<details><summary>Thinking</summary>Final Score: 4</details>",
        *(
            '{"scale": 10, "final_score": 4}',
            '{"final_score": 4, "scale": "1-10"}',
            '{"final_score": 4, "out_of": 10}',
        ),
        *('{"score_range": [0, 10], "final_score": 4}', "Ratings are from 1 to 10.\nFinal Score: 4"),
        *("Final Score: 4, on a ten-point scale", "Final Score: 4. (10 is perfect)", "Final Score: 4 on a 1-10 scale"),
        *("Final Score: 4, i.e. 8/10", "Final Score: 4‰", "Final Score: 4\nThe final score of 3 reflects that."),
        *("Final Score: <think>4</think>", "<think>a<think>b</think>Final Score: 4"),
        # Other scales.
        *(
            "Final Score (out of 10): 4",
            "Final Score (1-10): 4",
            "Final Score [0 to 5]: 4",
            "Final Score out of 10: 4",
        ),
        *("Final Score: 4 (out of 10)", "Final Score: 4 of 10", "Final Score: 4 (1–10)", "Final Score: 4 points / 10"),
        *(
            "Final Score: 4\n/10",
            "Final Score: 4 out of ten",
            "Final Score: 4 out of a possible 10",
            "Final Score: 4:10",
        ),
        *("Final Score: 4 %", "Final Score: 4 percent", "Final Score (%): 4", "Final Score: $4\\%$"),
        *(
            "On a scale of 1 to 10, Final Score: 4",
            "Final Score: 4\nScale: 1-10",
            "Final Score: 4 on a 10-point scale",
        ),
        *(
            "All scores are out of 10.\nFinal Score: 4",
            '{"final_score": 4, "max_score": 10}',
            "| Final Score | 4 | 10 |",
        ),
        # Sums and shares.
        *("Final Score: (4 + 3) / 2 = 3.5", "Final Score: 3 + 1 = 4", "Final Score: 4 - 1", "Final Score: 4 minus 1"),
        *(
            "Final Score: 3 * 1.2 = 3.6",
            "Final Score: 7/2 = 3.5",
            "Final Score: 4/5 = 0.8",
            "Final Score: 5 - 1 (blur)",
        ),
        *("Final Score: \\boxed{\\frac{4}{5}}", "Final Score: 4 1/2", "Final Score: 4½", "Final Score: 4 (3 + 1)"),
        # Several scores, and those that are taken back.
        *("Final Score: 3\nFinal Score: 4", "I must write 'Final Score: 1' at the end.\nFinal Score: 5"),
        *(
            "Final Score: 4, 3",
            "Final Score: 4; 3 for style",
            "Final Score: 4, or maybe 3",
            "Final Score: 4. Wait, 3.",
            "Final Score: 4\nWait, no: 3.",
            "Final Score: 4\nCorrection: 3",
            "Final Score: 4. The cat is nice. Actually, I say 3.",
        ),
        *("Final Score: 4 or 5", "Final Score: 4 → 3", "Final Score: 2? No, higher", "Final Score: 2 would be harsh"),
        *("Final Score: ~4", "Final Score: <4", "Final Score: 4+", "Final Score: 4 ± 0.5", "Final Score: 4th"),
        # A list, not a score.
        *("Final Score:\n1. The cat is blue.\n2. The dog is not.", "Final Score\n2 cats are there"),
        "Final Score" + " " * 200_000 + "4",
        "Final Score: " + "9" * 90_000,
        "Final Score: 4. " * 6_000 + "Final Score: 3",
        "<think>" * 100_000 + "Final Score: 4",
        "Final Score: (" * 6_000,
        "1-" * 40_000 + "scale",
    ],
    ids=lambda answer: answer[:30],
)
def test_answers_without_a_certain_score_are_refused(answer):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"score|scale"):
        parse_score(answer, "Final Score", (1.0, 5.0))
    assert time.monotonic() - start < 10  # minutes and more where the time grows with the square of the length
