# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""People as a reward: they vote on the images of a prompt, on the page of `trl-marble vote`."""

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers.utils import logging

from ..media import to_rgb
from .votes import Vote, VoteFolder, group_id


logger = logging.get_logger(__name__)

POLL_SECONDS = 0.5


class HumanReward:
    """
    Scores by people, who look at all images of a prompt and choose the best and the worst, or give stars.

    The reward writes the groups of images into a folder and waits for votes. `trl-marble vote FOLDER` serves a page
    from that folder to people, and writes their votes into it: on this machine, or on any that has the folder. The run
    needs no server, and if the page's server ends, nothing is lost: start it again.

    The best image has the score 1, the worst -1, the others 0. Of stars, 1 to 5 become -1 to 1. Images that nobody
    voted on, and groups that were skipped, have `None`: the reward does not apply to them.

    With several processes each of them writes its own groups, so on several machines the folder must be a shared one.

    Votes stay in the subfolder `votes`, a dataset that `datasets.load_dataset` reads, with the images. A run that is
    resumed, or started again, does not ask for a vote that is there: if the prompt and all pixels of a group are the
    same, the vote counts. Use a folder for each run: at its first call the reward withdraws the groups that earlier
    runs asked about.

    Args:
        folder (`str` or `os.PathLike`):
            The folder for groups and votes; it is made.
        timeout (`float`, *optional*):
            Longest time in seconds to wait for the votes of one call. Then training goes on, with the votes that there
            are. Defaults to no limit. It must be less than the `reward_timeout` of
            [`~trl_marble.MarbleConfig`], if that is set, since votes that come in time would be lost otherwise.

    Attributes:
        scope (`str`): `"group"`: it is called with complete groups of images.
        applies_to (`str`): In words, the images that the reward applies to.
        value_range (`str`): In words, the scale of the reward.

    Raises:
        `ValueError`: If `timeout` is not positive.
    """

    scope = "group"
    applies_to = "images of the groups that people voted on"
    value_range = "-1 (worst, one star) to 1 (best, five stars)"

    def __init__(self, folder: str | os.PathLike, timeout: float | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}; give seconds above 0, or `None` to wait without a limit.")
        self.timeout = timeout
        self._votes = VoteFolder(folder)
        self._votes.create()
        self._made = time.time()
        self._was_called = False

    async def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        groups: list[int],
        trainer_state: Any = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Wait for people's votes.

        Args:
            images (`list[PIL.Image.Image]`):
                All images of some prompts.
            prompts (`list[str]`):
                Their prompts.
            groups (`list[int]`):
                One number per image, the same for the images of a group.
            trainer_state ([`~transformers.TrainerState`], *optional*):
                Its step is kept with the votes.
            kwargs (`Any`):
                Not used.

        Returns:
            `list[float | None]`: one score per image, `None` where nobody voted.
        """
        if not self._was_called:
            self._was_called = True
            await asyncio.to_thread(self._votes.withdraw_older, self._made)
        pictures = [to_rgb(image) for image in images]
        members: dict[int, list[int]] = {}
        for place, number in enumerate(groups):
            members.setdefault(number, []).append(place)
        asked: dict[str, tuple[Sequence[Image.Image], str]] = {}
        ids = []
        for places in members.values():
            shown, prompt = [pictures[place] for place in places], prompts[places[0]]
            ids.append(await asyncio.to_thread(group_id, shown, prompt))
            asked[ids[-1]] = shown, prompt
        votes = await self._wait(asked, None if trainer_state is None else trainer_state.global_step)
        scores: list[float | None] = [None] * len(images)
        for places, group in zip(members.values(), ids, strict=True):
            if group in votes:
                for place, score in zip(places, votes[group].scores(len(places)), strict=True):
                    scores[place] = score
        return scores

    async def _wait(self, asked: dict[str, tuple[Sequence[Image.Image], str]], step: int | None) -> dict[str, Vote]:
        """The votes on groups: those that there are, and those that come until the time is over."""
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        votes: dict[str, Vote] = {}
        waiting = list(asked)
        told = False
        try:
            while True:
                for group in list(waiting):
                    vote = await asyncio.to_thread(self._votes.vote_on, group)
                    if vote is not None:
                        votes[group] = vote
                        waiting.remove(group)
                    else:
                        await asyncio.to_thread(self._votes.ask, group, *asked[group], step)
                if not waiting or (deadline is not None and time.monotonic() >= deadline):
                    return votes
                if not told:
                    told = True
                    logger.warning(
                        f"Waiting for people's votes on {len(waiting)} groups of images"
                        + ("" if self.timeout is None else f", for at most {self.timeout:g} seconds")
                        + f". To vote: trl-marble vote {self._votes.folder}"
                    )
                await asyncio.sleep(POLL_SECONDS)
        finally:  # also where the call is cancelled
            for group in asked:
                self._votes.withdraw(group)
