# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a reward is, what it may return, and how its answers are checked."""

import functools
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .loading import load_reward
from .reward_value import to_number


FLOAT32_MAX = torch.finfo(torch.float32).max

RewardValues = Sequence[float | Exception | None]
RewardFunc = Callable[..., RewardValues | Awaitable[RewardValues]]
"""A sync or async callable that scores images, or videos.

It is called with keywords only: `images` (list of PIL images), `prompts` (list of strings), every other column of the
dataset (list of values) and `trainer_state` ([`~transformers.TrainerState`]). It returns one number for each image,
higher is better, or `None` (or NaN) where the reward does not apply. Where it should apply but failed for one image
only, it may return the exception in the place of the number; raising means that it failed for all. Accept `**kwargs`
to ignore what is not needed: a reward that does not accept one of them is refused before anything is sampled. A
function whose attribute `image_type` is `"pt"` receives `images` as one tensor `[B, 3, H, W]` in [0, 1] instead.

It may log: where it accepts them, it also gets `log_metric` (called with a name and a number, see
[`~trl_marble.rewards.call_log.CallLog.log_metric`]) and `log_extra` (called with the name of a column and a list with
one value for each image, see [`~trl_marble.rewards.call_log.CallLog.log_extra`]).

Where the pipeline makes videos, the keyword is `videos` in the place of `images`: a list of lists of PIL frames, or
with `image_type` `"pt"` one tensor `[B, F, 3, H, W]` in [0, 1]. A reward of images scores videos through
[`FrameReward`].
"""


class RewardError(RuntimeError):
    """A reward function failed or returned something that is not a reward."""


class BrokenRewardError(RewardError):
    """A reward function that has not scored any image, or whose code cannot work: no matter of single images."""


class InfiniteRewardError(RewardError):
    """A reward function returned a number for an image that is infinite, or too large for float32."""


def reward_names(reward_funcs: Sequence[RewardFunc]) -> list[str]:
    """
    Names that tell the rewards of a run apart.

    Args:
        reward_funcs (`Sequence[RewardFunc]`):
            Functions (named by `__name__`), `functools.partial` objects (by the function inside) or other callables
            (by their class).

    Returns:
        `list[str]`: One name a reward; a name that several rewards share gets `_1`, `_2`, ... appended from the
        second on.
    """
    taken: set[str] = set()
    names = []
    for func in reward_funcs:
        inner: Any = func
        while isinstance(inner, functools.partial):
            inner = inner.func
        base = getattr(inner, "__name__", type(inner).__name__)
        name, suffix = base, 0
        while name in taken:
            suffix += 1
            name = f"{base}_{suffix}"
        taken.add(name)
        names.append(name)
    return names


def validate_reward_funcs(reward_funcs: Any, argument: str = "reward_funcs") -> list[RewardFunc]:
    """
    The rewards as a new list, strings loaded, refused if one of them cannot be called.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            One reward or several.
        argument (`str`, *optional*, defaults to `"reward_funcs"`):
            What the caller's user knows them as, for messages.

    Raises:
        `TypeError`: If a reward is not callable.
        `ValueError`: If there is none.
    """
    funcs = [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, str) else list(reward_funcs or [])
    if not funcs:
        raise ValueError(f"`{argument}` is empty; pass at least one callable that scores images.")
    funcs = [load_reward(func) if isinstance(func, str) else func for func in funcs]
    for position, func in enumerate(funcs):
        if not callable(func):
            raise TypeError(f"`{argument}[{position}]` is {func!r}; every reward must be a callable or a name.")
    return funcs


def media_asked_for(func: RewardFunc) -> Literal["images", "videos"] | None:
    """What a reward cannot be called without, by the parameters that it has; `None` where they do not say."""
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):  # some callables of C have none
        return None
    if "images" in parameters and "videos" in parameters:
        return None
    for name in ("images", "videos"):
        if name in parameters and parameters[name].default is inspect.Parameter.empty:
            return name
    return None


def check_media(
    reward_funcs: Sequence[RewardFunc], names: Sequence[str], output: Literal["image", "video"], pipeline: str
) -> None:
    """
    Refuse rewards that ask for what the pipeline does not make.

    Args:
        reward_funcs (`Sequence[RewardFunc]`):
            The rewards.
        names (`Sequence[str]`):
            Their names, for messages.
        output (`"image"` or `"video"`):
            What the pipeline makes.
        pipeline (`str`):
            What makes it, for messages.

    Raises:
        `ValueError`: For the first one that does; says how to mend it.
    """
    for func, name in zip(reward_funcs, names, strict=True):
        asked = media_asked_for(func)
        if asked == "images" and output == "video":
            raise ValueError(
                f"Reward `{name}` scores images, and {pipeline} makes videos. `FrameReward({name})` scores evenly "
                "spaced frames of each video with it and averages them; a reward of whole videos takes `videos` in "
                "the place of `images`."
            )
        if asked == "videos" and output == "image":
            raise ValueError(
                f"Reward `{name}` scores videos, and {pipeline} makes images. Use a reward that takes `images`; one "
                "in `FrameReward` works without it."
            )


def reward_tensor(values: Any, name: str, prompts: Sequence[str]) -> Tensor:
    """
    Check what a reward returned and turn it into a tensor.

    Args:
        values (`Sequence[float | None]`, `np.ndarray` or `Tensor`):
            The answer: one value an image.
        name (`str`):
            Name of the reward, for messages.
        prompts (`Sequence[str]`):
            The prompts of the images, for messages and for the number of values.

    Returns:
        `Tensor` of shape `[B]`, float32: NaN where the reward does not apply, and where it gave an exception.

    Raises:
        [`RewardError`]: If the number of values is wrong, a value is not a number, or a value is infinite
            ([`InfiniteRewardError`]).
    """
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise RewardError(
            f"Reward `{name}` returned {_short(values)} for {len(prompts)} images; return a list with one number (or "
            "`None`) for each image."
        )
    if len(values) != len(prompts):
        raise RewardError(
            f"Reward `{name}` returned {len(values)} values for {len(prompts)} images; return one for each image, "
            "`None` where the reward does not apply."
        )
    numbers = torch.empty(len(prompts), dtype=torch.float32)
    for i, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        try:
            number = math.nan if isinstance(value, Exception) else to_number(value)
        except TypeError:
            raise RewardError(
                f"Reward `{name}` returned {_short(value)} for the prompt {prompt!r}; a reward is a number, or `None` "
                "where it does not apply."
            ) from None
        if abs(number) > FLOAT32_MAX:
            raise _infinite(value, name, prompt)
        numbers[i] = number
    return numbers


def errors_for_infinite(values: Any, name: str, prompts: Sequence[str]) -> Any:
    """
    What a reward returned, with infinite numbers taken for failures of their images.

    Args:
        values (`Sequence[float | None]`, `np.ndarray` or `Tensor`):
            The answer.
        name (`str`):
            Name of the reward, for messages.
        prompts (`Sequence[str]`):
            The prompts of the images, for messages.

    Returns:
        `list`: The answer with an [`InfiniteRewardError`] in the place of each number that is not finite in float32
        (NaN apart). The answer as it is where it is not one value an image, which [`reward_tensor`] refuses.
    """
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != len(prompts):
        return values
    return [
        _infinite(value, name, prompt) if _is_infinite(value) else value
        for value, prompt in zip(values, prompts, strict=True)
    ]


def _is_infinite(value: Any) -> bool:
    try:
        return abs(to_number(value)) > FLOAT32_MAX
    except TypeError:  # an exception, or what is no reward
        return False


def _infinite(value: Any, name: str, prompt: str) -> InfiniteRewardError:
    return InfiniteRewardError(
        f"Reward `{name}` returned {_short(value)} for the prompt {prompt!r}; a reward must be finite in float32. "
        "Return `None` where it does not apply, or bound it."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def most_common_prompts(prompts: Sequence[str], limit: int = 3) -> str:
    """The most frequent prompts of a batch, quoted, for messages."""
    counts = Counter(prompts)
    shown = ", ".join(repr(prompt) for prompt, _ in counts.most_common(limit))
    return shown if len(counts) <= limit else f"{shown} and {len(counts) - limit} more"
