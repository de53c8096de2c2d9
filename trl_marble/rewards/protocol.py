# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The protocol of rewards, and the check of the values that they return."""

import functools
import inspect
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import InfiniteRewardError, RewardError
from .learning_reward import LearningReward
from .loading import load_reward
from .parameters import call_signature
from .reward_value import to_number


FLOAT32_MAX = torch.finfo(torch.float32).max

RewardValues = Sequence[float | Exception | None]
RewardFunc = Callable[..., RewardValues | Awaitable[RewardValues]]
"""A sync or async callable that scores images, or videos.

It is called with keywords only: `images` (list of PIL images), `prompts` (list of strings), every other column of the
dataset (list of values) and `trainer_state` ([`~transformers.TrainerState`]). It returns one number per image, higher
is better, or `None` (or NaN) where the reward does not apply. If it fails for single images, it may return the
exception instead of the number of such an image; if it raises, it has failed for all. Accept `**kwargs` to ignore
keywords that are not needed: a reward that does not accept one of them is refused before anything is sampled. A
function whose attribute `image_type` is `"pt"` gets `images` as one tensor `[B, 3, H, W]` in [0, 1] instead.

It may log: if it accepts them, it also gets `log_metric` (called with a name and a number, see
[`~trl_marble.rewards.call_log.CallLog.log_metric`]) and `log_extra` (called with the name of a column and a list with
one value per image, see [`~trl_marble.rewards.call_log.CallLog.log_extra`]).

If the pipeline makes videos, the keyword is `videos` instead of `images`: a list of lists of PIL frames, or with
`image_type` `"pt"` one tensor `[B, F, 3, H, W]` in [0, 1]. [`FrameReward`] scores videos with a reward of images.

A reward that compares images has the attribute `scope`. With `"group"` each call has whole groups, all images of each
of some prompts, and with `"batch"` all images of the generation batch, from all processes. It also gets `groups`, a
list with one int per image, which images of one prompt share. The default is `"image"`: a call has any images. The
attribute `center` says which mean its advantages subtract: `"group"`, that of the prompt's images, or `"batch"`, that
of all images, which is the default with the scope `"batch"`. See also [`SetReward`].

A reward that learns has the methods `update`, `state_dict` and `load_state_dict`, see [`Learner`].
"""

Scope = Literal["image", "group", "batch"]
Center = Literal["group", "batch"]
ImageType = Literal["pil", "pt"]


class Learner(Protocol):
    """
    What a reward that learns has beside its call.

    After each generation batch, once all of it is scored, `update` is called on the first process with what all
    processes have sampled. The others then take over its state, so that all of them always score with the same one.
    """

    def update(
        self, *, images: list[Image.Image], rewards: dict[str, list[float | None]], trainer_state: Any, **more: Any
    ) -> None:
        """
        Learn from a generation batch, which was scored before.

        Args:
            images (`list[PIL.Image.Image]`):
                The images of all processes, without those that the reward failed on, as the reward itself gets them: a
                tensor with `image_type` `"pt"`, and `videos` by that name. A [`LearningReward`] gets `features`
                instead.
            rewards (`dict[str, list[float | None]]`):
                Name of each reward that is trained on -> one score per image; `None` where it does not apply.
            trainer_state ([`~transformers.TrainerState`]):
                The state of the run.
            more:
                `prompts`, the other columns of the dataset, and `log_metric`, of these what the method accepts.
        """

    def state_dict(self) -> dict[str, Any]:
        """
        All that was learned, and all that decides what will be, such as the state of an optimizer: dicts, lists and
        tuples of tensors, numbers, strings and `None`. It goes into checkpoints.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what [`~Learner.state_dict`] returned, here or on another process."""


LEARNING = ("update", "state_dict", "load_state_dict")


def reward_names(reward_funcs: Sequence[RewardFunc]) -> list[str]:
    """
    Unique names of the rewards of a run.

    Args:
        reward_funcs (`Sequence[RewardFunc]`):
            Functions (named by `__name__`), `functools.partial` objects (by the function inside) or other callables
            (by their class).

    Returns:
        `list[str]`: One name per reward; a name that several rewards share gets `_1`, `_2`, ... appended from the
        second on.
    """
    taken: set[str] = set()
    names = []
    for func in reward_funcs:
        inner = without_partials(func)
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
    Make a list of the rewards, load those that are names, and check that all can be called.

    Args:
        reward_funcs (`str`, `RewardFunc` or a list of them):
            One reward or several.
        argument (`str`, *optional*, defaults to `"reward_funcs"`):
            The name of the argument in messages.

    Raises:
        `TypeError`: If a reward is not callable.
        `ValueError`: If there is none, or a reward has an unknown `image_type`.
    """
    funcs = [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, str) else list(reward_funcs or [])
    if not funcs:
        raise ValueError(f"`{argument}` is empty; pass at least one callable that scores images.")
    funcs = [load_reward(func) if isinstance(func, str) else func for func in funcs]
    for position, func in enumerate(funcs):
        if not callable(func):
            raise TypeError(f"`{argument}[{position}]` is {func!r}; every reward must be a callable or a name.")
        reward_image_type(func)
    return funcs


def reward_scope(func: RewardFunc) -> Scope:
    """
    What one score of a reward depends on: the attribute `scope`, by default `"image"`.

    Raises:
        `ValueError`: If it is none of `"image"`, `"group"` and `"batch"`.
    """
    return _attribute(func, "scope", "image", get_args(Scope))


def reward_center(func: RewardFunc) -> Center:
    """
    Which mean the advantages of a reward subtract: the attribute `center`, by default `"group"`, or `"batch"` if that
    is the scope.

    Raises:
        `ValueError`: If it is neither `"group"` nor `"batch"`.
    """
    default = "batch" if reward_scope(func) == "batch" else "group"
    return _attribute(func, "center", default, get_args(Center))


def find_learner(func: RewardFunc) -> Learner | LearningReward | None:
    """
    The object that learns, where a reward does: it has the method `update`.

    Raises:
        `ValueError`: If it has no `state_dict` or no `load_state_dict`.
    """
    inner: Any = without_partials(func)
    missing = [method for method in LEARNING if not callable(getattr(inner, method, None))]
    if "update" in missing:
        return None
    if missing:
        (name,) = reward_names([func])
        raise ValueError(
            f"Reward `{name}` has the method `update`, so it learns, and not {' and '.join(f'`{m}`' for m in missing)}"
            ". Without what it has learned no run could be resumed: write all three methods, or rename `update`."
        )
    return inner


def reward_image_type(func: RewardFunc) -> ImageType:
    """
    What a reward gets: PIL images (`"pil"`, the default) or a tensor (`"pt"`), the attribute `image_type`.

    Raises:
        `ValueError`: If it is neither.
    """
    return _attribute(func, "image_type", "pil", get_args(ImageType))


def without_partials(func: Any) -> Any:
    """The callable inside `functools.partial` objects."""
    while isinstance(func, functools.partial):
        func = func.func
    return func


def _attribute(func: Any, attribute: str, default: str, allowed: Sequence[str]) -> Any:
    layer = func
    while not hasattr(layer, attribute) and isinstance(layer, functools.partial):  # which may have it, too
        layer = layer.func
    value = getattr(layer, attribute, default)
    if value not in allowed:
        (name,) = reward_names([func])
        raise ValueError(
            f"Reward `{name}` has the attribute `{attribute} = {value!r}`; it must be one of "
            f"{', '.join(map(repr, allowed))}."
        )
    return value


def required_media(func: RewardFunc) -> Literal["images", "videos"] | None:
    """Whether a reward requires images or videos, by its parameters; `None` if they do not show it."""
    signature = call_signature(func, follow_wrapped=True)
    if signature is None:
        return None
    parameters = signature.parameters
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
    Refuse rewards of images for a pipeline of videos, and the other way round.

    Args:
        reward_funcs (`Sequence[RewardFunc]`):
            The rewards.
        names (`Sequence[str]`):
            Their names, for messages.
        output (`"image"` or `"video"`):
            What the pipeline makes.
        pipeline (`str`):
            The pipeline, for messages.

    Raises:
        `ValueError`: For the first such reward, with what to do.
    """
    for func, name in zip(reward_funcs, names, strict=True):
        required = required_media(func)
        if required == "images" and output == "video":
            if reward_scope(func) != "image":
                raise ValueError(
                    f"Reward `{name}` compares images with each other, and {pipeline} makes videos. Use a reward that "
                    "takes `videos` instead of `images`."
                )
            raise ValueError(
                f"Reward `{name}` scores images, and {pipeline} makes videos. Pass `FrameReward({name})`, which "
                "averages its scores of evenly spaced frames, or a reward that takes `videos` instead of `images`."
            )
        if required == "videos" and output == "image":
            raise ValueError(
                f"Reward `{name}` scores videos, and {pipeline} makes images. Use a reward that takes `images`, "
                "without `FrameReward`."
            )


def reward_tensor(values: Any, name: str, prompts: Sequence[str]) -> Tensor:
    """
    Check the values that a reward returned, and convert them to a tensor.

    Args:
        values (`Sequence[float | None]`, `np.ndarray` or `Tensor`):
            What the reward returned: one value per image.
        name (`str`):
            Name of the reward, for messages.
        prompts (`Sequence[str]`):
            The prompts of the images, for messages and for the number of values.

    Returns:
        `Tensor` of shape `[B]`, float32: NaN where the reward does not apply, and where it returned an exception.

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
    Replace infinite numbers by failures of their images.

    Args:
        values (`Sequence[float | None]`, `np.ndarray` or `Tensor`):
            What the reward returned.
        name (`str`):
            Name of the reward, for messages.
        prompts (`Sequence[str]`):
            The prompts of the images, for messages.

    Returns:
        `list`: the values, with an [`InfiniteRewardError`] instead of each number that is infinite in float32. Values
        that are not one per image are returned unchanged, for [`reward_tensor`] to refuse.
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
    except TypeError:  # an exception, or not a reward
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
