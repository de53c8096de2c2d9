# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Judges that compare images, with a real HTTP server, and the scores that their answers become."""

import asyncio
import time

import numpy as np
import pytest
import scipy.optimize
from chat_endpoint import KEY, PATIENCE, completion, endpoint, level, levels, pictures, seen_text, send
from scipy.special import expit

from trl_marble.rewards import PairwiseJudge, RankingJudge, RewardError, bradley_terry
from trl_marble.rewards.group_judges import add_wins
from trl_marble.rewards.judge_choices import parse_choice, parse_ranking


# ---- Bradley-Terry ----


@pytest.mark.parametrize("prior", [0.01, 1.0, 10.0])
def test_strengths_are_those_of_an_independent_solver(prior):
    wins = np.random.default_rng(1).poisson(1.5, (7, 7)).astype(float)

    def negative(strengths):
        lead = strengths[:, None] - strengths[None, :]
        off_diagonal = ~np.eye(7, dtype=bool)
        return -(wins * np.log(expit(lead)))[off_diagonal].sum() + prior / 2 * (strengths**2).sum()

    found = scipy.optimize.minimize(negative, np.zeros(7), method="Powell", options={"xtol": 1e-9, "ftol": 1e-14})
    found = scipy.optimize.minimize(negative, found.x, method="BFGS", options={"gtol": 1e-9})
    assert bradley_terry(wins, prior) == pytest.approx(found.x, abs=1e-6)


def test_of_two_items_the_difference_is_the_log_of_the_odds():
    strengths = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=1e-9)
    assert strengths[0] - strengths[1] == pytest.approx(np.log(3), abs=1e-6)
    assert strengths.sum() == pytest.approx(0, abs=1e-9)


def test_strengths_are_finite_centred_and_follow_their_items():
    wins = np.triu(np.full((5, 5), 1000.0), 1)  # each item won against all behind it
    strengths = bradley_terry(wins)
    assert np.isfinite(strengths).all() and (np.diff(strengths) < 0).all()
    assert strengths.sum() == pytest.approx(0, abs=1e-6)
    order = [3, 0, 4, 1, 2]
    assert bradley_terry(wins[np.ix_(order, order)]) == pytest.approx(strengths[order], abs=1e-6)
    assert bradley_terry(np.zeros((3, 3))).tolist() == [0, 0, 0]
    assert bradley_terry(np.zeros((0, 0))).tolist() == []


@pytest.mark.parametrize(
    ("wins", "prior", "message"),
    [
        (np.zeros((2, 3)), 1.0, "must be"),
        (-np.ones((2, 2)), 1.0, "negative"),
        (np.full((2, 2), np.nan), 1.0, "not finite"),
        (np.zeros((2, 2)), 0.0, "`prior` is 0.0"),
    ],
)
def test_wins_that_make_no_sense_are_refused(wins, prior, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins, prior)


def test_an_order_is_wins_against_all_behind_and_half_among_equals():
    wins = np.zeros((4, 4))
    add_wins(wins, [[2], [0, 3]])
    assert wins.tolist() == [[0, 0, 0, 0.5], [0, 0, 0, 0], [1, 0, 0, 1], [0.5, 0, 0, 0]]


# ---- What answers say ----


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Better image: 1", 1),
        ("The first has no cat.\n**Better image:** 2", 2),
        ("**Better Image: Image 2**.", 2),
        ("- 1 has six fingers\n- 2 has none\n\n### Better image: **2**\n```\n", 2),
        ('{"better_image": 1}', 1),
        ('{\n  "reason": "image 1 has six fingers",\n  "better_image": "2"\n}', 2),
        ("Better image is 1.", 1),
        ("Better image: tie", None),
        ("<think>Better image: 1</think>Better image: 2", 2),
        ("Better image: 2\n\nSo it is:\nbetter image: 2", 2),
        ("<answer>Better image: <b>1</b></answer>", 1),
        ("Does image 1 show a hat? No\nBetter image: 2", 2),
        ("The better image is 1? Its hat is blue, so no.\r\nBetter image：2\r\n", 2),
    ],
)
def test_a_choice_is_the_last_line(answer, choice):
    assert parse_choice(answer) == choice


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Image 1",
        "Better image: 3",
        "Better image: 12",
        "Better image: 1.5",
        "Better image: -1",
        "Better image: not 1",
        "Better image: 1\nBetter image: 2",
        "<think>Better image: 1",
        # More on its line, or after it: a reason, or what takes it back.
        *("Better image: 1 or 2", "Better image: 1/2", "Better image: 1 = 2", "Better image: 1-2", "Better image: 2%"),
        *("Better image: 1?", "Better image: 1? No, 2.", "Better image: 1, no, 2", "Better image: 1, maybe"),
        *("Better image: 1 because of the hat", "Better image: 1. Wait, no: image 2 is better."),
        *("Better image: 1\nCorrection: 2", "Better image: 1\n\nActually, the second", "Better image:\n1. A cat"),
        *("Better image: 1. Image 2.", "Better image: 1. Both are equally good.", "Better image: 1 (it is a tie)"),
        # Before it.
        "Neither is the better image: 1",
        "I can't say which is the better image: 1",
        # As long answers as there are.
        "Better image: 1" + " " * 100_000 + "x",
        "Better image: 1. " * 20_000 + "so 2.",
        "Better image" + " * " * 50_000 + "1",
        "Better image: 1\n" * 20_000 + "so 2.",
    ],
    ids=lambda answer: answer[:50],
)
def test_any_other_answer_is_refused(answer):
    start = time.monotonic()
    with pytest.raises(ValueError, match="The answer"):
        parse_choice(answer)
    assert time.monotonic() - start < 10  # minutes where the time grows with the square of the length


@pytest.mark.parametrize(
    ("answer", "order"),
    [
        ("Ranking: 2 > 3 > 1", [[1], [2], [0]]),
        ("All are good.\n**Ranking:** Image 3 > Image 1 > Image 2.", [[2], [0], [1]]),
        ('{"ranking": [1, 2, 3]}', [[0], [1], [2]]),
        ("Ranking: 3 > 2 = 1", [[2], [0, 1]]),
        ("Ranking: 1 > 2 > 3\nThe first shows 2 cats.\nRanking: 1, 2, 3", [[0], [1], [2]]),
        ("<think>Ranking: 1 > 2 > 3</think>Ranking: 3>2>1", [[2], [1], [0]]),
    ],
)
def test_a_ranking_is_the_last_line(answer, order):
    assert parse_ranking(answer, 3) == order


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "2 > 3 > 1",
        "Ranking: 2 > 1",
        "Ranking: 2 > 2 > 1",
        "Ranking: 2 > 3 > 1 > 4",
        "Ranking: 2 > 3 > 1 > none",
        "Ranking: 1 > 2 > 3\nRanking: 3 > 2 > 1",
        "Ranking: 0 > 1 > 2",
        "Ranking: 1 > 2 > 13",
        *("Ranking: 1 > 2 > 3 or 3 > 2 > 1", "Ranking: 1 > 2 > 3; 3 > 2 > 1", "Ranking: 1 > 2 > 3 / 3 > 2 > 1"),
        *("Ranking: 1 > 2 > 3 (from worst to best)", "Ranking: 1 > 2 > 3, reversed", "Ranking (reversed): 1 > 2 > 3"),
        *("Ranking: 1 > 2 > 3. Wait: 3 > 2 > 1", "Ranking: 1 > 2 > 3\nActually 3 > 2 > 1"),
        *("Ranking: 1 > 2 > 3?", "Ranking: 1 > 2 > 3, maybe", "Ranking: 1 > 2 > 3 ~ 3", "No ranking: 1 = 2 = 3"),
    ],
)
def test_an_uncertain_ranking_is_refused(answer):
    with pytest.raises(ValueError, match="order"):
        parse_ranking(answer, 3)


# ---- Judges of groups ----


def make(kind, server, **kwargs):
    return kind("a-model", server.url, **({"api_key": KEY, "max_retries": 0, "timeout": PATIENCE} | kwargs))


def ask(reward, reds, groups, prompts=None):
    prompts = prompts or ["p"] * len(reds)
    return asyncio.run(reward(images=pictures(*reds), prompts=prompts, groups=groups, trainer_state=None, tag=[1]))


def prefer_red(handler, request, number):
    first, second = levels(request)
    return f"I compare.\nBetter image: {'tie' if first == second else 1 if first > second else 2}"


def rank_by_red(handler, request, number):
    reds = levels(request)
    order = sorted(range(len(reds)), key=lambda k: -reds[k])
    return "Ranking: " + " > ".join(str(k + 1) for k in order)


def test_pairs_of_groups_become_scores_in_the_order_of_the_images():
    reds, groups = [10, 200, 30, 40, 100, 60, 70], [5, 2, 5, 5, 2, 5, 5]
    prompts = ["a cat" if group == 5 else "a dog" for group in groups]
    with endpoint(prefer_red) as server:
        scores = ask(make(PairwiseJudge, server, rounds=1), reds, groups, prompts)
    assert PairwiseJudge.scope == "group"
    first = [0, 2, 3, 5, 6]
    wins = np.zeros((5, 5))
    for k in range(5):  # each with its next neighbour
        other = (k + 1) % 5
        better, worse = (k, other) if reds[first[k]] > reds[first[other]] else (other, k)
        wins[better, worse] += 1
    assert [scores[k] for k in first] == pytest.approx(bradley_terry(wins).tolist())
    assert [scores[1], scores[4]] == pytest.approx(bradley_terry(np.array([[0, 2], [0, 0]])).tolist())
    assert len(server.requests) == 5 + 2
    for request in server.requests:
        kinds = [part["type"] for part in request["messages"][0]["content"]]
        assert kinds == ["text", "image_url", "text", "image_url", "text"]
        assert f"[{'a dog' if max(levels(request)) >= 100 else 'a cat'}]" in seen_text(request)


@pytest.mark.parametrize("num_images", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_each_image_is_shown_first_as_often_as_second(num_images, rounds):
    pairs = PairwiseJudge("m", "http://127.0.0.1:1", rounds=rounds).subsets(num_images)
    times = min(rounds, num_images // 2)
    for place in (0, 1):
        assert [sum(pair[place] == k for pair in pairs) for k in range(num_images)] == [times] * num_images
    if rounds == 9:
        assert {frozenset(pair) for pair in pairs} == {frozenset((a, b)) for a in range(num_images) for b in range(a)}


def test_a_judge_that_prefers_a_place_favours_no_image():
    with endpoint(lambda handler, request, number: "Better image: 1") as server:
        assert ask(make(PairwiseJudge, server), range(6), [0] * 6) == pytest.approx([0] * 6, abs=1e-9)


@pytest.mark.parametrize("num_images", [2, 3, 6, 7, 8, 13])
def test_a_judge_that_prefers_places_in_a_ranking_favours_no_image(num_images):
    def keep_the_order(handler, request, number):
        return "Ranking: " + " > ".join(str(k + 1) for k in range(len(levels(request))))

    with endpoint(keep_the_order) as server:
        scores = ask(make(RankingJudge, server), range(num_images), [0] * num_images)
    assert scores == pytest.approx([0] * num_images, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_each_image_of_a_large_group_is_in_two_or_three_questions_each_asked_twice(size):
    for num_images in range(size + 1, 4 * size):
        asked = RankingJudge("m", "http://127.0.0.1:1", images_per_question=size).subsets(num_images)
        assert len(asked) == 2 * -(-num_images // (size // 2))
        assert asked[1::2] == [subset[::-1] for subset in asked[::2]]
        times = {sum(k in subset for subset in asked[::2]) for k in range(num_images)}
        assert times <= {2, 3} and all(len(set(subset)) == size for subset in asked)


def test_an_image_alone_is_not_compared():
    with endpoint(prefer_red) as server:
        assert ask(make(PairwiseJudge, server), [1, 2, 3], [0, 1, 2]) == [None] * 3
        assert ask(make(RankingJudge, server), [1], [0]) == [None]
    assert server.requests == []


def test_a_ranking_orders_a_group():
    with endpoint(rank_by_red) as server:
        scores = ask(make(RankingJudge, server), [30, 10, 20], [0, 0, 0])
    assert sorted(levels(request) for request in server.requests) == [[20, 10, 30], [30, 10, 20]]
    for request in server.requests:
        assert "You see 3 images" in seen_text(request) and "[p]" in seen_text(request)
    wins = np.array([[0, 2, 2], [0, 0, 0], [0, 2, 0]])
    assert scores == pytest.approx(bradley_terry(wins).tolist())


def test_a_large_group_is_ranked_in_parts_that_overlap():
    reds = np.random.default_rng(0).permutation(24).tolist()
    with endpoint(rank_by_red) as server:
        scores = ask(make(RankingJudge, server, images_per_question=6), reds, [0] * 24)
    asked = [levels(request) for request in server.requests]
    assert len(asked) == 16 and all(len(reds) == 6 for reds in asked)
    assert all(sum(red in reds for reds in asked) == 4 for red in range(24))
    assert np.corrcoef(scores, reds)[0, 1] > 0.75


def test_what_fails_leaves_its_comparison_out():
    def fail_for_image_two(handler, request, number):
        return "no idea" if 2 in levels(request) else prefer_red(handler, request, number)

    with endpoint(fail_for_image_two) as server:
        scores = ask(make(PairwiseJudge, server, rounds=2), [1, 2, 3, 4, 5], [0] * 5)
    assert isinstance(scores[1], RewardError) and "no idea" in str(scores[1]) and KEY not in str(scores[1])
    others = [scores[0], *scores[2:]]
    assert others == sorted(others) and others[0] < others[-1]


@pytest.mark.parametrize("kind", [PairwiseJudge, RankingJudge])
def test_an_order_that_was_cut_off_in_its_thoughts_says_so(kind):
    answer = completion("<think>Better image: 1. Ranking: 1 > 2", finish_reason="length")
    with endpoint(lambda handler, request, number: send(handler, 200, answer)) as server:
        scores = ask(make(kind, server), [1, 2], [0, 0])
    assert all("in the middle of the model's thoughts" in str(score) for score in scores)


def test_a_dead_server_raises():
    with pytest.raises(RewardError, match="did not answer"):
        ask(PairwiseJudge("m", "http://127.0.0.1:1", max_retries=0), [1, 2], [0, 0])


def test_the_same_images_have_the_same_scores_whatever_the_order_of_the_groups():
    with endpoint(prefer_red) as server:
        judge = make(PairwiseJudge, server, rounds=1)
        together = ask(judge, [1, 2, 3, 9, 8, 7], [0, 0, 0, 1, 1, 1])
        swapped = ask(judge, [9, 8, 7, 1, 2, 3], [4, 4, 4, 3, 3, 3])
        assert level(server.requests[0]) in (1, 2, 3)
    assert swapped == together[3:] + together[:3]


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (PairwiseJudge, {"rounds": 0}, "`rounds` is 0"),
        (PairwiseJudge, {"prompt_template": "which?"}, "`prompt_template` has no {prompt}"),
        (PairwiseJudge, {"prior": 0}, "`prior` is 0"),
        (RankingJudge, {"images_per_question": 1}, "`images_per_question` is 1"),
        (RankingJudge, {"max_concurrency": 0}, "`max_concurrency` must be at least 1"),
        (RankingJudge, {"base_url": "host"}, "expected 'http://host:port'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kind, kwargs, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"model": "m", "base_url": "http://127.0.0.1:8000/v1"} | kwargs))
