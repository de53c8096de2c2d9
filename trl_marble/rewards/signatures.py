# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Check, before anything is sampled, that rewards accept the keywords that they are called with."""

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from .call_log import LOG_KEYWORDS
from .frame_reward import FrameReward
from .learning_reward import LearningReward
from .model_reward import ModelReward
from .parameters import accepts, call_signature
from .protocol import Learner, RewardFunc, find_learner, reward_scope
from .remote import RemoteReward
from .set_reward import SetReward


def check_signatures(
    reward_funcs: Sequence[RewardFunc],
    names: Sequence[str],
    output: Literal["image", "video"],
    columns: Sequence[str],
    dataset: str,
) -> None:
    """
    Refuse rewards whose parameters make every call fail. Callables that cannot be inspected are accepted.

    Args:
        reward_funcs (`Sequence[RewardFunc]`):
            The rewards.
        names (`Sequence[str]`):
            Their names, for messages.
        output (`"image"` or `"video"`):
            What the pipeline makes.
        columns (`Sequence[str]`):
            The columns of the dataset, `prompt` among them.
        dataset (`str`):
            The name of the dataset in messages.

    Raises:
        `ValueError`: For the first reward that has a required parameter without a value, does not accept a keyword
            that it is called with, or is a class; with how to fix it.
    """
    others = [column for column in columns if column != "prompt"]
    for func, name in zip(reward_funcs, names, strict=True):
        media = f"{output}s"
        while isinstance(func, FrameReward):
            func, media = func.reward, "images"
        if isinstance(func, type):
            raise ValueError(f"Reward `{name}` is a class, not an object of it. Pass `{name}()`.")
        given = [media, "prompts", "trainer_state"]
        if reward_scope(func) != "image":
            given.append("groups")
            if "groups" in others:
                raise ValueError(
                    f"`{dataset}` has a column `groups`, and reward `{name}` compares images: it gets the number of "
                    "the group of each image by that name. Rename the column."
                )
        shown = (
            f"It is called with the keywords {_quote([*given, *LOG_KEYWORDS])} and "
            f"the columns of `{dataset}` ({_quote(others) if others else 'it has only `prompt`'})."
        )
        if (learner := find_learner(func)) is not None:
            _check_learner(learner, name, media, others, dataset)
        given += others
        if isinstance(func, SetReward):
            given.remove("groups")
        called: Callable[..., Any]
        if isinstance(func, SetReward | LearningReward):
            called, title = func.features, f"`{name}.features`"
        else:
            called, title = func, f"Reward `{name}`"
        if "groups" not in given and _requires(called, "groups"):
            raise ValueError(f"{title} has the parameter `groups`. {_how_to_get_groups(func, name)}")
        _check_parameters(called, title, given, LOG_KEYWORDS, shown)
        if isinstance(func, SetReward):
            keywords = "It is called with the keywords `features` and `groups`."
            _check_parameters(func.credit, f"`{name}.credit`", ["features", "groups"], (), keywords, has_columns=False)
        if isinstance(func, LearningReward):
            _check_by_position(func.score, f"`{name}.score`", ["features"])
        if isinstance(func, ModelReward):
            _check_by_position(func.applies, f"`{name}.applies`", ["prompts"], others, shown)
            _check_by_position(func.score, f"`{name}.score`", ["images", "prompts"], others, shown)
        if isinstance(func, RemoteReward) and (missing := [c for c in func.columns or () if c not in others]):
            raise ValueError(
                f"`columns` of the remote reward `{name}` asks for {_quote(missing)}, which `{dataset}` does not "
                f"have. {_nearest(missing, others)}It has the columns {_quote(columns)}."
            )


def _check_learner(
    learner: Learner | LearningReward, name: str, media: str, others: Sequence[str], dataset: str
) -> None:
    """Refuse a reward that learns whose `update`, `state_dict` or `load_state_dict` could not be called."""
    given = ["features" if isinstance(learner, LearningReward) else media, "rewards", "trainer_state"]
    if taken := [column for column in others if column in given]:
        raise ValueError(
            f"`{dataset}` has a column {_quote(taken)}, and `{name}.update` gets something else by that name. Rename "
            "the column."
        )
    optional = ["prompts", "log_metric", *others]
    shown = f"It is called with the keywords {_quote(given)}, and with {_quote(optional)} where it accepts them."
    _check_parameters(learner.update, f"`{name}.update`", given, optional, shown)
    _check_by_position(learner.state_dict, f"`{name}.state_dict`", [])
    _check_by_position(learner.load_state_dict, f"`{name}.load_state_dict`", ["state_dict"])


def _requires(func: Callable[..., Any], keyword: str) -> bool:
    """Whether a callable has a parameter of that name without a default."""
    signature = call_signature(func)
    parameter = None if signature is None else signature.parameters.get(keyword)
    return parameter is not None and parameter.default is parameter.empty


def _how_to_get_groups(func: RewardFunc, name: str) -> str:
    """What to do where a method asks for `groups` and does not get them."""
    if isinstance(func, SetReward):
        return "It is called with the images of one process; the groups of all images are given to `credit`."
    return (
        "Only rewards that compare images get it, the number of each image's group. "
        f'Set `{name}.scope = "group"` for calls with all images of each of some prompts, or "batch" for calls with '
        "all images of the generation batch."
    )


def _check_by_position(
    func: Callable[..., Any], title: str, places: Sequence[str], others: Sequence[str] = (), shown: str = ""
) -> None:
    """Refuse a method that cannot be called with some arguments by position, and others by keyword."""
    signature = call_signature(func)
    if signature is None:
        return
    try:
        signature.bind_partial(*places)
    except TypeError:
        raise ValueError(
            f"{title} has the parameters {signature}, and is called with "
            f"{_quote(places)} by position. Give it {'this parameter' if len(places) == 1 else 'these parameters'}."
        ) from None
    called = functools.partial(func, *places)
    _check_parameters(called, title, others, (), shown or _only(places), has_columns=bool(others))


def _only(names: Sequence[str]) -> str:
    return f"It is called with {_quote(names)} alone." if names else "It is called without arguments."


def _check_parameters(
    func: Callable[..., Any],
    title: str,
    given: Sequence[str],
    optional: Sequence[str],
    shown: str,
    has_columns: bool = True,
) -> None:
    """Refuse a callable with required parameters that have no value, or without some of the given ones."""
    signature = call_signature(func)
    if signature is None:
        return
    parameters = signature.parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_position = [p.name for p in needed if p.kind is p.POSITIONAL_ONLY]
    title = f"{title} has the parameters {signature}"
    if by_position:
        raise ValueError(f"{title}: {_quote(by_position)} cannot be passed by keyword. Remove the `/`. {shown}")
    if missing := [p.name for p in needed if p.name not in (*given, *optional)]:
        ways = "give it a default, or add a column of that name" if has_columns else "or give it a default"
        raise ValueError(
            f"{title}: there is no value for {_quote(missing)}. {_nearest(missing, [*given, *optional])}Rename the "
            f"parameter, {ways}. {shown}"
        )
    if refused := [keyword for keyword in given if not accepts(signature, keyword)]:
        raise ValueError(
            f"{title} and does not accept {_quote(refused)}. Add `**kwargs` for keywords that it ignores. {shown}"
        )


def _nearest(missing: Sequence[str], known: Sequence[str]) -> str:
    """A sentence with the known names that are most similar, with a space at its end; empty if there are none."""
    hints = [
        f"`{near[0]}` instead of `{name}`" for name in missing if (near := difflib.get_close_matches(name, known, 1))
    ]
    return f"Did you mean {' and '.join(hints)}? " if hints else ""


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
