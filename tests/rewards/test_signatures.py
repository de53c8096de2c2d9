# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards whose every call would fail are refused by their parameters."""

import functools

import pytest
import torch

from trl_marble.rewards import FrameReward, LearningReward, ModelReward, RemoteReward, SetReward
from trl_marble.rewards.parameters import accepts_log_function
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
def test_callables_that_accept_the_keywords_pass(func):
    check(func)


@pytest.mark.parametrize(
    ("func", "parts"),
    [
        (lambda images: [], ["does not accept `prompts`, `trainer_state`, `tag`", "Add `**kwargs`", "(images)"]),
        (
            lambda images, prompts, trainer_state: [],
            ["does not accept `tag`", "the columns of `train_dataset` (`tag`)"],
        ),
        (lambda image, **kwargs: [], ["no value for `image`", "Did you mean `images` instead of `image`"]),
        (lambda images, tags, **kwargs: [], ["`tags`", "`tag` instead of `tags`", "add a column of that name"]),
        (lambda images, zzz, qqq, **kwargs: [], ["no value for `zzz`, `qqq`. Rename"]),
        (lambda images, *, target, **kwargs: [], ["no value for `target`"]),
        (lambda images, /, **kwargs: [], ["`images` cannot be passed by keyword. Remove the `/`"]),
        (lambda *images: [], ["does not accept `images`, `prompts`"]),
        (functools.partial(lambda images, a, b, **kwargs: [], a=1), ["no value for `b`"]),
        (Later, ["Reward `Later` is a class", "Pass `Later()`"]),
        (composition, ["no value for `include`"]),
        (RemoteReward("http://127.0.0.1:1", "far", columns=["tags"]), ["`far` asks for `tags`", "Did you mean `tag`"]),
        (FrameReward(lambda images: []), ["does not accept `prompts`"]),
    ],
)
def test_refuses_callables_with_their_parameters_and_the_keywords(func, parts):
    with pytest.raises(ValueError) as caught:
        check(func)
    for part in [*parts, "`train_dataset`" if not isinstance(func, type) else ""]:
        assert part in str(caught.value)


def test_refuses_a_model_reward_and_names_the_wrong_method():
    class Narrow(Scale):
        def score(self, images, prompts): ...

    class Picky(Scale):
        def applies(self, prompts, include, **columns): ...

    with pytest.raises(ValueError, match=r"`Narrow.score` has the parameters \(\) and does not accept `tag`"):
        check(Narrow())
    with pytest.raises(ValueError, match="`Picky.applies` .*no value for `include`"):
        check(Picky())
    check(Narrow(), columns=["prompt"])

    class NoPrompts(Scale):
        def score(self, images, **columns): ...

    with pytest.raises(ValueError, match=r"`NoPrompts.score` .* with `images`, `prompts` by position"):
        check(NoPrompts())


class Set(SetReward):
    scope = "group"

    def features(self, images, prompts, **kwargs): ...

    def credit(self, features, groups): ...


class Learning(LearningReward):
    def features(self, images, prompts, log_metric, **kwargs): ...

    def score(self, features): ...

    def update(self, features, rewards, trainer_state): ...

    def state_dict(self): ...

    def load_state_dict(self, state_dict): ...


def variant(base, **methods):
    return type("Odd", (base,), methods)()


def test_methods_that_could_not_be_called_are_refused_by_name():
    check(Set())
    check(Learning())
    check(variant(Set, credit=lambda self, **kwargs: None))
    check(variant(Learning, state_dict=lambda self, prefix="": None, load_state_dict=lambda self, *states: None))
    for reward, message in [
        (
            variant(Set, credit=lambda self, f, groups: None),
            r"`Odd.credit` .*\(f, groups\): there is no value for `f`",
        ),
        (variant(Set, credit=lambda self, features: None), "`Odd.credit` .* does not accept `groups`"),
        (variant(Learning, score=lambda self: None), "`Odd.score` .* is called with `features` by position"),
        (variant(Learning, score=lambda self, f, prompts: None), "`Odd.score` .*: there is no value for `prompts`"),
        (variant(Learning, update=lambda self, features, rewards: None), "`Odd.update` .*not accept `trainer_state`"),
        (variant(Learning, state_dict=lambda self, what: None), "`Odd.state_dict` .*: there is no value for `what`"),
        (variant(Learning, load_state_dict=lambda self: None), "`Odd.load_state_dict` .* is called with `state_dict`"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(reward)


def test_a_reward_that_asks_for_groups_is_told_how_to_get_them():
    def compares(images, groups, **kwargs): ...

    with pytest.raises(ValueError, match=r'Set `compares.scope = "group"` for .*, or "batch"') as caught:
        check(compares)
    assert "Did you mean" not in str(caught.value)
    check(compares, columns=["prompt", "groups"])  # a column like any other
    with pytest.raises(ValueError, match=r'`Odd.features` .*Set `Odd.scope = "group"`'):
        check(variant(Learning, features=lambda self, images, groups, **kwargs: None))
    check(variant(Learning, scope="group", features=lambda self, images, groups, **kwargs: None))
    with pytest.raises(ValueError, match="`Odd.features` .* are given to `credit`"):
        check(variant(Set, features=lambda self, images, groups, **kwargs: None))
    compares.scope = "group"
    check(compares)


def test_the_keyword_for_videos_is_videos():
    check(lambda videos, **kwargs: [], output="video")
    check(FrameReward(takes_the_rest), output="video")
    with pytest.raises(ValueError, match="no value for `images`"):
        check(takes_the_rest, output="video")


def test_the_message_names_a_dataset_without_columns():
    with pytest.raises(ValueError, match=r"columns of `prompts` \(it has only `prompt`\)"):
        check(needs_a_column, columns=["prompt"], dataset="prompts")


def test_log_functions_are_passed_if_a_reward_and_its_decorators_accept_them():
    assert accepts_log_function(logs, "log_metric") and accepts_log_function(takes_the_rest, "log_extra")
    assert accepts_log_function(Later(), "log_extra") and accepts_log_function(variadic, "log_extra")
    assert not accepts_log_function(lists_all, "log_metric") and not accepts_log_function(min, "log_metric")
    # `no_grad` takes anything, and hands it on.
    assert not accepts_log_function(torch.no_grad()(lists_all), "log_metric")
    assert accepts_log_function(torch.no_grad()(logs), "log_metric")
