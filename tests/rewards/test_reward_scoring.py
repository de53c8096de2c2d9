# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""When, where and with what rewards are called."""

import asyncio
import functools
import gc
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from trl_marble.rewards import InfiniteRewardError, ModelReward, RewardError, RewardScorer, Scores
from trl_marble.rewards.errors import BrokenRewardError
from trl_marble.rewards.protocol import reward_image_type, reward_scope


# A test that would wait for ever fails after this many seconds instead.
PATIENCE = 20

IMAGES = [Image.new("RGB", (2, 3), (255, 51, 0)), Image.new("RGB", (2, 3), (0, 0, 255))]
PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def scorer():
    """A factory of scorers that are closed after the test."""
    made = []

    def make(*reward_funcs, timeout=None) -> RewardScorer:
        made.append(RewardScorer(list(reward_funcs), timeout))
        return made[-1]

    yield make
    for each in made:
        each.close()


def score(scorer: RewardScorer, **columns: list) -> torch.Tensor:
    scores = scorer.collect(scorer.submit(IMAGES, PROMPTS, columns, trainer_state=None))
    assert not scores.failed.any() and not scores.errors
    return scores.rewards


def test_rewards_get_keywords_only_and_come_back_in_order(scorer) -> None:
    received = {}

    def seen(**kwargs):
        received.update(kwargs)
        return [1, None]

    async def later(images, target, **kwargs):
        await asyncio.sleep(0)
        return target

    state = object()
    both = scorer(seen, later)
    pending = both.submit(IMAGES, PROMPTS, {"target": [3, 4]}, trainer_state=state)
    scores = both.collect(pending).rewards
    assert set(received) == {"images", "prompts", "target", "trainer_state", "log_metric", "log_extra"}
    assert received["images"] == IMAGES and received["prompts"] == PROMPTS and received["target"] == [3, 4]
    assert received["trainer_state"] is state
    assert scores.shape == (2, 2)
    assert scores[0, 0] == 1 and math.isnan(scores[0, 1]) and scores[1].tolist() == [3, 4]


def test_a_reward_cannot_change_what_the_next_one_gets(scorer) -> None:
    def greedy(images, prompts, target, **kwargs):
        answer = list(target)
        for values in (images, prompts, target):
            values.clear()
        return answer

    def modest(images, prompts, target, **kwargs):
        return [len(images) + len(prompts) + len(target)] * 2

    assert score(scorer(greedy, modest), target=[1, 2]).tolist() == [[1, 2], [6, 6]]
    assert len(IMAGES) == 2 and len(PROMPTS) == 2


def test_tensor_rewards_get_one_batch_in_the_unit_interval(scorer) -> None:
    class Pixels:
        image_type = "pt"

        def __call__(self, images, **kwargs):
            assert images.shape == (2, 3, 3, 2) and images.dtype == torch.float32
            return images[:, 1].amax(dim=(1, 2))

    def pil(images, **kwargs):
        assert all(isinstance(image, Image.Image) for image in images)
        return [float(np.asarray(image)[..., 2].max()) for image in images]

    torch.testing.assert_close(score(scorer(Pixels(), pil)), torch.tensor([[0.2, 0.0], [0.0, 255.0]]))


def test_a_partial_has_the_attributes_of_the_function_in_it_or_its_own(scorer) -> None:
    def kind(images, weight, **kwargs):
        return [weight * isinstance(images, torch.Tensor)] * len(images)

    inner = functools.partial(functools.partial(kind, weight=0), weight=3)
    kind.image_type, kind.scope = "pt", "group"
    assert reward_image_type(inner) == "pt" and reward_scope(inner) == "group"
    inner.image_type, inner.scope = "pil", "image"
    assert reward_image_type(inner) == "pil" and reward_scope(inner) == "image"
    del inner.image_type
    assert score(scorer(inner)).tolist() == [[3, 3]]


def test_grey_and_transparent_images_reach_tensor_rewards_as_rgb(scorer) -> None:
    def channels(images, **kwargs):
        return [images.shape[1]] * len(images)

    channels.image_type = "pt"
    made = scorer(channels)
    pending = made.submit([Image.new("L", (4, 4)), Image.new("RGBA", (4, 4))], PROMPTS, {}, None)
    assert made.collect(pending).rewards.tolist() == [[3, 3]]


def test_sync_rewards_run_beside_the_caller(scorer) -> None:
    """`submit` comes back while the reward still waits for what the caller does next."""
    caller_went_on = threading.Event()
    threads = []

    def waits(images, **kwargs):
        threads.append(threading.current_thread())
        assert caller_went_on.wait(PATIENCE)
        return [0] * len(images)

    made = scorer(waits)
    pending = made.submit(IMAGES, PROMPTS, {}, None)
    assert not pending.futures[0].done()
    caller_went_on.set()
    assert made.collect(pending).rewards.tolist() == [[0, 0]]
    assert threads[0] is not threading.current_thread()


def test_different_sync_rewards_run_at_the_same_time(scorer) -> None:
    meeting = threading.Barrier(2)

    def first(images, **kwargs):
        meeting.wait(PATIENCE)
        return [1] * len(images)

    def second(images, **kwargs):
        meeting.wait(PATIENCE)
        return [2] * len(images)

    assert score(scorer(first, second)).tolist() == [[1, 1], [2, 2]]


def test_a_sync_reward_never_runs_twice_at_once_and_keeps_the_order(scorer) -> None:
    inside = threading.Lock()
    overlapped = []
    order = []

    def alone(images, number, **kwargs):
        if not inside.acquire(blocking=False):
            overlapped.append(number)
        threading.Event().wait(0.002)  # room for another call to come in
        order.append(number[0])
        inside.release()
        return number

    made = scorer(alone)
    pending = [made.submit(IMAGES, PROMPTS, {"number": [i, i]}, None) for i in range(10)]
    assert [made.collect(each).rewards[0, 0].item() for each in pending] == list(range(10))
    assert order == list(range(10)) and not overlapped


def test_async_rewards_run_together_on_one_loop_beside_the_caller(scorer) -> None:
    """Each call waits until both rewards have been entered for both batches."""
    loops, threads, entered = set(), set(), []
    everyone_in = None

    async def meet():
        nonlocal everyone_in
        everyone_in = everyone_in or asyncio.Event()
        loops.add(asyncio.get_running_loop())
        threads.add(threading.current_thread())
        entered.append(None)
        if len(entered) == 4:
            everyone_in.set()
        await asyncio.wait_for(everyone_in.wait(), PATIENCE)

    async def first(images, **kwargs):
        await meet()
        return [1] * len(images)

    class Second:
        async def __call__(self, images, **kwargs):
            await meet()
            return [2] * len(images)

    made = scorer(first, functools.partial(Second(), unused=0))
    pending = [made.submit(IMAGES, PROMPTS, {}, None) for _ in range(2)]
    assert [made.collect(each).rewards.tolist() for each in pending] == [[[1, 1], [2, 2]]] * 2
    assert len(loops) == 1
    assert len(threads) == 1 and threading.current_thread() not in threads


def ok(images, **kwargs):
    return [0] * len(images)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_raised_error_is_reported_with_the_reward_and_the_prompts(scorer, is_async) -> None:
    def broken(images, **kwargs):
        raise KeyError("no detector")

    async def broken_later(images, **kwargs):
        raise KeyError("no detector")

    func = broken_later if is_async else broken
    made = scorer(ok, func)
    scores = made.collect(made.submit(IMAGES, PROMPTS, {}, None))
    assert scores.failed.tolist() == [[False, False], [True, True]]
    assert scores.rewards[0].tolist() == [0, 0] and scores.rewards[1].isnan().all()
    (error,) = scores.errors
    for part in (f"`{func.__name__}`", "KeyError", "no detector", "2 images", "'a cat'", "'a dog'"):
        assert part in str(error)
    assert isinstance(error, RewardError) and isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39])
def test_an_infinite_number_is_a_failure_of_one_image(scorer, kind, value) -> None:
    def unbounded(images, **kwargs):
        return kind([0.5, value]) if kind is list else kind([0.5, math.copysign(math.inf, value)])

    made = scorer(ok, unbounded)
    scores = made.collect(made.submit(IMAGES, PROMPTS, {}, None))
    assert scores.failed.tolist() == [[False, False], [False, True]]
    assert scores.rewards[1, 0] == 0.5 and scores.rewards[1, 1].isnan()
    (error,) = scores.errors
    assert isinstance(error, InfiniteRewardError)
    assert "`unbounded` returned float" in str(error) and "'a dog'" in str(error)


def test_an_exception_instead_of_a_number_is_a_failure_of_one_image(scorer) -> None:
    def picky(images, **kwargs):
        return [0.5, ValueError("cannot see")]

    made = scorer(picky)
    scores = made.collect(made.submit(IMAGES, PROMPTS, {}, None))
    assert scores.failed.tolist() == [[False, True]]
    assert scores.rewards[0, 0] == 0.5 and scores.rewards[0, 1].isnan()
    (error,) = scores.errors
    assert "`picky` raised ValueError: cannot see (one image for 'a dog')" in str(error)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_hangs_fails_after_the_timeout(scorer, is_async) -> None:
    wake, calls = threading.Event(), []

    def hangs(images, **kwargs):
        calls.append(None)
        assert wake.wait(PATIENCE)
        return [0] * len(images)

    async def hangs_too(images, **kwargs):
        calls.append(None)
        await asyncio.sleep(3600)

    made = scorer(ok, hangs_too if is_async else hangs, timeout=0.1)
    pending = [made.submit(IMAGES, PROMPTS, {}, None) for _ in range(3)]
    scores = Scores.concatenate([made.collect(each) for each in pending])
    assert scores.failed.tolist() == [[False] * 6, [True] * 6]
    assert len(scores.errors) == 3 and "TimeoutError: no answer after 0.1 seconds" in str(scores.errors[0])
    made.close()
    wake.set()
    assert len(calls) == (3 if is_async else 1)  # one after the other, and those that waited were dropped


def test_a_reward_may_raise_a_timeout_of_its_own(scorer) -> None:
    def gives_up(images, **kwargs):
        raise TimeoutError("the server said nothing")

    made = scorer(gives_up, timeout=PATIENCE)
    scores = made.collect(made.submit(IMAGES, PROMPTS, {}, None))
    assert "the server said nothing" in str(scores.errors[0])


@pytest.mark.parametrize("calls_are_async", [False, True])
def test_an_update_runs_on_the_rewards_thread_and_an_async_one_on_the_loop(scorer, calls_are_async) -> None:
    ran_on = []

    class Learns:
        def __call__(self, images, **kwargs):
            return [0.0] * len(images)

        def update(self, images, rewards, trainer_state):
            ran_on.append(threading.current_thread().name)

        def state_dict(self):
            return {}

        def load_state_dict(self, state_dict): ...

    class UpdatesLater(Learns):
        async def update(self, images, rewards, trainer_state):
            ran_on.append(threading.current_thread().name)

    class CallsLater(Learns):
        async def __call__(self, images, **kwargs):
            return [0.0] * len(images)

    class AllLater(UpdatesLater, CallsLater): ...

    for kind in (CallsLater, AllLater) if calls_are_async else (Learns, UpdatesLater):
        made = scorer(kind())
        score(made)
        made.update(0, IMAGES, {}, PROMPTS, {}, None)
    assert ran_on == [f"reward-{'CallsLater' if calls_are_async else 'Learns'}", "async-rewards"]


def test_models_move_to_the_device_and_back(scorer) -> None:
    class Constant(ModelReward):
        def load(self):
            return torch.nn.Linear(1, 1)

        def score(self, images, prompts, **columns):
            return [float(self.model.weight.dtype == torch.bfloat16)] * len(images)

    reward = Constant(offload=True)
    made = scorer(reward, ok)
    made.to(torch.device("cpu"), torch.bfloat16)
    assert score(made).tolist() == [[1, 1], [0, 0]]
    moves = []
    reward.model.to = moves.append
    made.release()
    assert moves == ["cpu"]
    made = scorer(functools.partial(Constant()))
    made.to(torch.device("cpu"), torch.bfloat16)
    assert score(made).tolist() == [[1, 1]]


def test_a_wrong_answer_names_the_reward(scorer) -> None:
    def short(images, **kwargs):
        return [0.0]

    with pytest.raises(RewardError, match="`short` returned 1 values for 2 images"):
        score(scorer(short))


def test_close_ends_every_thread_and_scoring_starts_again(scorer) -> None:
    def sync(images, **kwargs):
        return [1] * len(images)

    async def later(images, **kwargs):
        return [2] * len(images)

    before = set(threading.enumerate())
    made = scorer(sync, later)
    made.close()  # nothing to do yet
    for _ in range(2):
        assert score(made).tolist() == [[1, 1], [2, 2]]
        assert set(threading.enumerate()) - before
        made.close()
        assert set(threading.enumerate()) - before == set()


@pytest.mark.filterwarnings("error")  # an unclosed loop or a destroyed task would warn
def test_close_ends_async_rewards_that_still_run(scorer) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def endless(images, **kwargs):
        started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    made = scorer(endless)
    pending = made.submit(IMAGES, PROMPTS, {}, None)
    assert started.wait(PATIENCE)
    made.close()
    gc.collect()
    assert cancelled.is_set() and pending.futures[0].cancelled()


def test_close_drops_waiting_batches_and_does_not_wait_for_running_ones(scorer) -> None:
    started, release, calls = threading.Event(), threading.Event(), []

    def slow(images, **kwargs):
        calls.append(None)
        started.set()
        assert release.wait(PATIENCE)
        return [0] * len(images)

    made = scorer(slow)
    pending = [made.submit(IMAGES, PROMPTS, {}, None) for _ in range(3)]
    assert started.wait(PATIENCE)
    made.close()  # does not wait: what runs ends after `release`
    for each in pending[1:]:
        assert each.futures[0].cancelled()
    release.set()
    pending[0].futures[0].result(PATIENCE)
    assert len(calls) == 1


def test_close_does_not_wait_for_async_rewards_that_block_their_loop(scorer) -> None:
    started, release = threading.Event(), threading.Event()

    async def blocks(images, **kwargs):
        started.set()
        release.wait(PATIENCE)  # not awaited, as a client for sync code does
        return [0] * len(images)

    made = scorer(blocks)
    made.submit(IMAGES, PROMPTS, {}, None)
    assert started.wait(PATIENCE)
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < 5
    release.set()


def test_one_deadline_is_for_all_rewards_and_batches(scorer) -> None:
    wake = threading.Event()

    def hangs(images, **kwargs):
        assert wake.wait(PATIENCE)
        return [0] * len(images)

    made = scorer(*[hangs] * 8, timeout=PATIENCE)
    pending = [made.submit(IMAGES, PROMPTS, {}, None) for _ in range(4)]
    begin = time.monotonic()
    scores = Scores.concatenate([made.collect(each, begin + 0.3) for each in pending])
    assert 0.3 <= time.monotonic() - begin < PATIENCE / 2 and scores.failed.all() and len(scores.errors) == 32
    # Without one, a batch takes `timeout` for all its rewards together.
    made = scorer(*[hangs] * 8, timeout=1)
    begin = time.monotonic()
    assert made.collect(made.submit(IMAGES, PROMPTS, {}, None)).failed.all()
    assert 1 <= time.monotonic() - begin < 6  # 8 s where they add up
    wake.set()


def test_scores_from_before_the_deadline_count_after_it(scorer) -> None:
    made = scorer(ok, timeout=PATIENCE)
    pending = made.submit(IMAGES, PROMPTS, {}, None)
    pending.futures[0].result(PATIENCE)
    assert made.collect(pending, time.monotonic() - 1).rewards.tolist() == [[0, 0]]


def test_failures_are_reported_without_waiting(scorer) -> None:
    release = threading.Event()

    def slow(images, **kwargs):
        assert release.wait(PATIENCE)
        return [0] * len(images)

    def broken(images, number, **kwargs):
        if number[0] == 1:
            raise OSError("went away")
        return [0] * len(images) if number[0] == 0 else [0]

    made = scorer(slow, broken)
    pending = [made.submit(IMAGES, PROMPTS, {"number": [i, i]}, None) for i in range(3)]
    for each in pending:
        each.futures[1].exception(PATIENCE)
    assert made.failures(pending[0]) == [] and not pending[0].done
    (error,) = made.failures(pending[1])
    assert "`broken` raised OSError: went away" in str(error)
    with pytest.raises(RewardError, match="`broken` returned 1 values for 2 images"):
        made.failures(pending[2])
    release.set()


def raising(error, after=0):
    """A reward that raises from some call on."""
    calls = []

    def reward(images, **kwargs):
        calls.append(None)
        if len(calls) > after:
            raise error
        return [0] * len(images)

    return reward


@pytest.mark.parametrize(
    ("reward", "is_broken"),
    [
        (raising(OSError("went away")), True),  # never answered
        (raising(OSError("went away"), after=1), False),
        (raising(TypeError("takes no tag"), after=1), True),
        (raising(ImportError("no such package"), after=1), True),
        (raising(SystemExit(3)), True),
        (lambda images, **kwargs: [0, OSError("cannot see")], False),
        (lambda images, **kwargs: [0, math.inf], False),
    ],
)
def test_broken_rewards_are_distinguished_from_failures(scorer, reward, is_broken) -> None:
    made = scorer(reward)
    (error,) = [each for _ in range(2) for each in made.collect(made.submit(IMAGES, PROMPTS, {}, None)).errors][:1]
    assert isinstance(error, BrokenRewardError) == is_broken
    is_a_mistake = isinstance(error.__cause__, TypeError | ImportError)
    assert ("has not scored any image so far" in str(error)) == (is_broken and not is_a_mistake)


def test_an_async_reward_with_wrong_parameters_has_failed(scorer) -> None:
    async def narrow(images):
        return [0] * len(images)

    made = scorer(ok, narrow)
    (error,) = made.collect(made.submit(IMAGES, PROMPTS, {}, None)).errors
    assert "`narrow` raised TypeError" in str(error)


def test_every_thread_has_the_trainers_device(scorer, monkeypatch) -> None:
    """The current device is one of each thread: a reward on the second process would use the first one's."""
    chosen = {}

    def choose(index):
        chosen[threading.current_thread().name] = index

    monkeypatch.setattr(torch.accelerator, "set_device_index", choose)

    async def later(images, **kwargs):
        return await asyncio.to_thread(ok, images)

    made = scorer(ok, later)
    made.to(torch.device("xpu", 1), torch.float32)
    assert score(made).tolist() == [[0, 0], [0, 0]]
    assert chosen == {"reward-ok": 1, "async-rewards": 1, "async-rewards-thread": 1}
    made.close()
    chosen.clear()
    made.to(torch.device("cpu"), torch.float32)
    score(made)
    assert not chosen


def test_a_device_that_a_thread_cannot_use_is_an_error_of_its_reward(scorer, monkeypatch) -> None:
    """It is no silent end of the thread, which would be waited for without end."""

    def refuse(index):
        raise RuntimeError("out of memory on device 1")

    monkeypatch.setattr(torch.accelerator, "set_device_index", refuse)

    async def later(images, **kwargs):
        return ok(images)

    made = scorer(ok, later)
    made.to(torch.device("xpu", 1), torch.float32)
    errors = made.collect(made.submit(IMAGES, PROMPTS, {}, None)).errors
    assert len(errors) == 2 and all("out of memory on device 1" in str(error) for error in errors)


HANGING = """
import asyncio, sys, threading, time
from PIL import Image
from trl_marble.rewards import RewardScorer

entered = threading.Barrier(4)

def hangs(images, **kwargs):
    entered.wait()
    threading.Event().wait()

async def blocks(images, **kwargs):
    entered.wait()
    threading.Event().wait()

async def on_a_thread(images, **kwargs):
    await asyncio.to_thread(hangs, images)

images = [Image.new("RGB", (2, 2))]
for func in (hangs, blocks, on_a_thread):
    scorer = RewardScorer(func)
    scorer.submit(images, ["a"], {}, None)
    if func is hangs:
        kept = scorer  # never closed
entered.wait()
scorer.close()
print("the end", flush=True)
"""


BUSY = """
import threading, torch
from PIL import Image
from trl_marble.rewards import RewardScorer

started = threading.Event()

def busy(images, **kwargs):
    model = torch.nn.Linear(300, 300)
    while True:
        model(torch.randn(300, 300)).sum().backward()
        started.set()

scorer = RewardScorer(busy)
scorer.submit([Image.new("RGB", (2, 2))], ["a"], {}, None)
started.wait()
scorer.close()
print("the end", flush=True)
"""


@pytest.mark.slow
def test_a_running_model_does_not_abort_the_interpreter_at_its_end() -> None:
    ran = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "the end\n" and ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_a_hanging_reward_does_not_prevent_the_interpreter_from_ending() -> None:
    ran = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "the end\n" and ran.returncode == 0, ran.stderr


def test_the_number_of_rewards_and_their_names(scorer) -> None:
    def same(images, **kwargs):
        return [0] * len(images)

    made = scorer(same, same)
    assert len(made) == 2 and made.names == ["same", "same_1"]
