# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards that no call could succeed for are refused by their parameters."""

import functools

import pytest
import torch

from trl_marble.rewards import FrameReward, ModelReward, RemoteReward
from trl_marble.rewards.parameters import accepts_certainly
from trl_marble.rewards.protocol import reward_names
from trl_marble.rewards.signatures import check_signatures
from trl_marble.shapeworld.rewards import composition


def check(func, output="image", columns=("prompt", "tag"), dataset="train_dataset"):
    check_signatures([func], reward_names([func]), output, columns, dataset)


def takes_the_rest(images, **kwargs): ...


def needs_a_column(images, tag, **kwargs): ...


def lists_all(images, prompts, tag, trainer_state): ...


def logs(images, log_metric, log_extra, **kwargs): ...


def has_a_default(images, target=None, **kwargs): ...


def needs_no_images(prompts, **kwargs): ...


class Later:
    async def __call__(self, images, **kwargs): ...


def variadic(*args, **kwargs): ...


class Scale(ModelReward):
    value_range = "0 to 1"

    def load(self):
        return torch.nn.Linear(1, 1)

    def score(self, images, prompts, tag, **columns): ...


def drop_keywords(func):
    @functools.wraps(func)
    def wrapper(images, **kwargs):
        return func(images)

    return wrapper


@drop_keywords
def decorated(images): ...


@pytest.mark.parametrize(
    "func",
    [
        takes_the_rest,
        needs_a_column,
        lists_all,
        logs,
        has_a_default,
        needs_no_images,
        Later(),
        variadic,
        Scale(),
        decorated,  # what is called is the decorator's function
        functools.partial(needs_a_column, extra=1),
        functools.partial(lambda images, target, **kwargs: [], target=[1]),
        RemoteReward("http://127.0.0.1:1", "far", columns=["tag"]),
        min,  # cannot be inspected
    ],
    ids=lambda func: reward_names([func])[0],
)
def test_what_can_be_called_is_let_pass(func):
    check(func)


@pytest.mark.parametrize(
    ("func", "parts"),
    [
        (lambda images: [], ["does not accept `prompts`, `trainer_state`, `tag`", "Add `**kwargs`", "(images)"]),
        (
            lambda images, prompts, trainer_state: [],
            ["does not accept `tag`", "the columns of `train_dataset` (`tag`)"],
        ),
        (lambda image, **kwargs: [], ["nothing gives it `image`", "Did you mean `images` instead of `image`"]),
        (lambda images, tags, **kwargs: [], ["`tags`", "`tag` instead of `tags`", "add a column of that name"]),
        (lambda images, zzz, qqq, **kwargs: [], ["nothing gives it `zzz`, `qqq`. Rename"]),
        (lambda images, *, target, **kwargs: [], ["nothing gives it `target`"]),
        (lambda images, /, **kwargs: [], ["`images` cannot be passed by keyword. Remove the `/`"]),
        (lambda *images: [], ["does not accept `images`, `prompts`"]),
        (functools.partial(lambda images, a, b, **kwargs: [], a=1), ["nothing gives it `b`"]),
        (Later, ["Reward `Later` is a class", "Pass `Later()`"]),
        (composition, ["nothing gives it `include`"]),
        (RemoteReward("http://127.0.0.1:1", "far", columns=["tags"]), ["`far` asks for `tags`", "Did you mean `tag`"]),
        (FrameReward(lambda images: []), ["does not accept `prompts`"]),
    ],
)
def test_what_cannot_be_called_is_refused_with_its_parameters_and_what_there_is(func, parts):
    with pytest.raises(ValueError) as caught:
        check(func)
    for part in [*parts, "`train_dataset`" if not isinstance(func, type) else ""]:
        assert part in str(caught.value)


def test_a_model_reward_says_which_of_its_methods_is_wrong():
    class Narrow(Scale):
        def score(self, images, prompts): ...

    class Picky(Scale):
        def applies(self, prompts, include, **columns): ...

    with pytest.raises(ValueError, match=r"`Narrow.score` has the parameters \(\) and does not accept `tag`"):
        check(Narrow())
    with pytest.raises(ValueError, match="`Picky.applies` .*nothing gives it `include`"):
        check(Picky())
    check(Narrow(), columns=["prompt"])


def test_videos_take_the_place_of_images():
    check(lambda videos, **kwargs: [], output="video")
    check(FrameReward(takes_the_rest), output="video")
    with pytest.raises(ValueError, match="nothing gives it `images`"):
        check(takes_the_rest, output="video")


def test_without_columns_the_message_says_so():
    with pytest.raises(ValueError, match=r"columns of `prompts` \(there are none but `prompt`\)"):
        check(needs_a_column, columns=["prompt"], dataset="prompts")


def test_only_what_a_reward_and_its_decorators_take_is_passed_to_be_logged_with():
    assert accepts_certainly(logs, "log_metric") and accepts_certainly(takes_the_rest, "log_extra")
    assert accepts_certainly(Later(), "log_extra") and accepts_certainly(variadic, "log_extra")
    assert not accepts_certainly(lists_all, "log_metric") and not accepts_certainly(min, "log_metric")
    # `no_grad` takes anything, and hands it on.
    assert not accepts_certainly(torch.no_grad()(lists_all), "log_metric")
    assert accepts_certainly(torch.no_grad()(logs), "log_metric")
