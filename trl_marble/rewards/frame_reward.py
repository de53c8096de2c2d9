# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Score the frames of videos with a reward of images."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..media import Video, evenly_spaced_frames, to_tensor
from .call_log import CallLog
from .loading import load_reward
from .model_reward import ModelReward
from .parameters import accepts_log_function
from .protocol import (
    RewardFunc,
    find_learner,
    required_media,
    reward_image_type,
    reward_names,
    reward_scope,
    reward_tensor,
    without_partials,
)


class FrameReward:
    """
    A reward of videos: the mean of a reward of images over evenly spaced frames.

    The mean is over the frames that the reward applies to. A video has `None` if it applies to no frame, and the
    exception if it failed for a frame. All frames of a batch of videos are scored in one call, each with the prompt
    and the columns of its video. Its name is that of the reward of images.

    ```python
    from trl_marble.rewards import FrameReward, PickScore

    reward_funcs = [FrameReward("hpsv2"), FrameReward(PickScore(offload=True), num_frames=4)]
    ```

    Args:
        reward (`str` or `RewardFunc`):
            The reward of images: sync or async, of this package or your own; a string is a name for
            [`~trl_marble.rewards.load_reward`].
        num_frames (`int`, *optional*, defaults to `8`):
            Number of frames of each video that are scored, from the first one to the last one; 1 is the frame in the
            middle. If a video has fewer frames, all are scored.

    Raises:
        `TypeError`: If the reward cannot be called.
        `ValueError`: If `num_frames` is not positive, there is no reward of that name, the reward scores videos or
            learns, its `scope` is not `"image"`, or its `image_type` is unknown.
    """

    def __init__(self, reward: str | RewardFunc, num_frames: int = 8) -> None:
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        self.reward = load_reward(reward) if isinstance(reward, str) else reward
        if not callable(self.reward):
            raise TypeError(f"`reward` is {reward!r}; it must be a callable that scores images, or a name.")
        (self.__name__,) = reward_names([self.reward])  # what `reward_names` reads
        if required_media(self.reward) == "videos":
            raise ValueError(
                f"`reward` is `{self.__name__}`, which scores videos itself; pass it without `FrameReward`."
            )
        reward_image_type(self.reward)  # raises for one that is unknown
        if reward_scope(self.reward) != "image":
            raise ValueError(
                f"`reward` is `{self.__name__}`, which compares images with each other, and frames are scored each on "
                "its own. Use a reward that takes `videos` and compares them."
            )
        if find_learner(self.reward) is not None:
            raise ValueError(
                f"`reward` is `{self.__name__}`, which learns from images, and `FrameReward` has videos. Use a reward "
                "that takes `videos` and learns from them."
            )
        self.num_frames = num_frames

    def __call__(
        self,
        videos: list[Video],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, Any], None] | None = None,
        **columns: list,
    ) -> Any:
        """
        Score videos.

        Args:
            videos (`list[list[PIL.Image.Image]]`):
                The videos, each a list of frames.
            prompts (`list[str]`):
                Their prompts.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Passed to the reward.
            log_metric (`Callable[[str, float], None]`, *optional*):
                Passed to the reward.
            log_extra (`Callable[[str, list], None]`, *optional*):
                Passed to the reward; the values that it logs for frames become one list per video.
            columns (`list`):
                The other columns of the dataset by name, one value per video.

        Returns:
            `list[float | Exception | None]`: one value per video; a coroutine of it if the reward is async.

        Raises:
            [`RewardError`]: If the reward did not return one value per frame.
        """
        chosen = [evenly_spaced_frames(video, self.num_frames) for video in videos]
        counts = [len(frames) for frames in chosen]
        frames = [frame for video in chosen for frame in video]
        texts = _repeat(prompts, counts)
        logs: dict[str, Any] = {}
        if log_metric is not None:
            logs["log_metric"] = log_metric
        if log_extra is not None:
            logs["log_extra"] = _log_frames(log_extra, counts)
        answer = self.reward(
            **{name: _repeat(values, counts) for name, values in columns.items()},
            **{keyword: log for keyword, log in logs.items() if accepts_log_function(self.reward, keyword)},
            images=to_tensor(frames) if reward_image_type(self.reward) == "pt" else frames,
            prompts=texts,
            trainer_state=trainer_state,
        )
        if inspect.isawaitable(answer):
            return self._average_later(answer, texts, counts)
        return self._average(answer, texts, counts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Set the device of the reward if it is a [`ModelReward`], and its dtype unless it has its own."""
        if isinstance(model := without_partials(self.reward), ModelReward):
            model.to(device, dtype)
        return self

    def release(self) -> None:
        """Move the reward to the CPU if it is a [`ModelReward`] with `offload`."""
        if isinstance(model := without_partials(self.reward), ModelReward):
            model.release()

    async def _average_later(self, answer: Any, texts: list[str], counts: list[int]) -> list:
        return self._average(await answer, texts, counts)

    def _average(self, answer: Any, texts: list[str], counts: list[int]) -> list[float | Exception | None]:
        """Average the values of frames to one value per video."""
        numbers = reward_tensor(answer, self.__name__, texts)  # NaN for a frame without a value
        failures = [value if isinstance(value, Exception) else None for value in answer]
        values: list[float | Exception | None] = []
        for part, end in zip(counts, np.cumsum(counts).tolist(), strict=True):
            frames = slice(end - part, end)
            failure = next((each for each in failures[frames] if each is not None), None)
            values.append(_mean(numbers[frames]) if failure is None else failure)
        return values


def _repeat(values: Sequence, counts: list[int]) -> list:
    """Repeat the value of each video for every frame of it."""
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


def _log_frames(log_extra: Callable[[str, Any], None], counts: list[int]) -> Callable[[str, Any], None]:
    """A `log_extra` that turns one value per frame into one list per video."""
    ends = np.cumsum(counts).tolist()

    def log(column: str, values: Any) -> None:
        frames = CallLog(sum(counts))
        frames.log_extra(column, values)  # raises unless there is one value per frame
        plain = frames.extras[column]
        log_extra(column, [plain[end - count : end] for end, count in zip(ends, counts, strict=True)])

    return log


def _mean(values: Tensor) -> float | None:
    """Mean of the values that are not NaN."""
    valid = values[~values.isnan()]
    return valid.double().mean().item() if len(valid) else None
