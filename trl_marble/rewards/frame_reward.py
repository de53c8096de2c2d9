# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards of images on videos: frame by frame."""

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
from .parameters import accepts_certainly
from .protocol import RewardFunc, media_asked_for, reward_names, reward_tensor


class FrameReward:
    """
    A reward of videos: what a reward of images says of evenly spaced frames, averaged.

    A video gets the mean over the frames that the reward applies to, `None` where it applies to none of them, and the
    exception where it failed for one of them. All frames of a batch of videos are scored in one call, each with the
    prompt and the columns of its video. In logs it has the name of the reward that it asks.

    ```python
    from trl_marble.rewards import FrameReward, PickScore

    reward_funcs = [FrameReward("hpsv2"), FrameReward(PickScore(offload=True), num_frames=4)]
    ```

    Args:
        reward (`str` or `RewardFunc`):
            The reward of images: sync or async, of this package or your own; a string is that of
            [`~trl_marble.rewards.load_reward`].
        num_frames (`int`, *optional*, defaults to `8`):
            How many frames of each video are scored, from the first one to the last one; 1 scores the one in the
            middle. Of a video that has fewer, all are.

    Raises:
        `TypeError`: If the reward cannot be called.
        `ValueError`: If `num_frames` is not positive, there is no reward of that name, or the reward is one of videos.
    """

    def __init__(self, reward: str | RewardFunc, num_frames: int = 8) -> None:
        if num_frames < 1:
            raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
        self.reward = load_reward(reward) if isinstance(reward, str) else reward
        if not callable(self.reward):
            raise TypeError(f"`reward` is {reward!r}; it must be a callable that scores images, or a name.")
        (self.__name__,) = reward_names([self.reward])  # what `reward_names` reads
        if media_asked_for(self.reward) == "videos":
            raise ValueError(
                f"`reward` is `{self.__name__}`, which scores whole videos by itself; pass it without `FrameReward`."
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
                Passed on.
            log_metric (`Callable[[str, float], None]`, *optional*):
                Passed on.
            log_extra (`Callable[[str, list], None]`, *optional*):
                Passed on; what the reward logs of frames becomes a list for each video.
            columns (`list`):
                The other columns of the dataset by name, one value a video.

        Returns:
            `list[float | Exception | None]`: one value a video; a coroutine of it where the reward is async.

        Raises:
            [`RewardError`]: If the reward answered anything else than one value a frame.
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
            **{keyword: log for keyword, log in logs.items() if accepts_certainly(self.reward, keyword)},
            images=to_tensor(frames) if getattr(self.reward, "image_type", "pil") == "pt" else frames,
            prompts=texts,
            trainer_state=trainer_state,
        )
        if inspect.isawaitable(answer):
            return self._average_later(answer, texts, counts)
        return self._average(answer, texts, counts)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Let the reward, if it is a [`ModelReward`], score on a device, in a dtype unless it chose its own."""
        if isinstance(self.reward, ModelReward):
            self.reward.to(device, dtype)
        return self

    def release(self) -> None:
        """Let the reward, if it is a [`ModelReward`], leave the device, if it was asked to."""
        if isinstance(self.reward, ModelReward):
            self.reward.release()

    async def _average_later(self, answer: Any, texts: list[str], counts: list[int]) -> list:
        return self._average(await answer, texts, counts)

    def _average(self, answer: Any, texts: list[str], counts: list[int]) -> list[float | Exception | None]:
        """One value a video from one a frame."""
        numbers = reward_tensor(answer, self.__name__, texts)  # NaN where a frame has none
        failures = [value if isinstance(value, Exception) else None for value in answer]
        values: list[float | Exception | None] = []
        for part, end in zip(counts, np.cumsum(counts).tolist(), strict=True):
            frames = slice(end - part, end)
            failure = next((each for each in failures[frames] if each is not None), None)
            values.append(_mean(numbers[frames]) if failure is None else failure)
        return values


def _repeat(values: Sequence, counts: list[int]) -> list:
    """Each value as often as its video has frames."""
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


def _log_frames(log_extra: Callable[[str, Any], None], counts: list[int]) -> Callable[[str, Any], None]:
    """Logs what a reward logs of frames as a list for each video."""
    ends = np.cumsum(counts).tolist()

    def log(column: str, values: Any) -> None:
        frames = CallLog(sum(counts))
        frames.log_extra(column, values)  # refuses what is not one value for each frame
        plain = frames.extras[column]
        log_extra(column, [plain[end - count : end] for end, count in zip(ends, counts, strict=True)])

    return log


def _mean(values: Tensor) -> float | None:
    """Mean of what is not NaN."""
    valid = values[~values.isnan()]
    return valid.double().mean().item() if len(valid) else None
