# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Judges that compare the images of a prompt; from their answers each image gets a Bradley-Terry score."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from .bradley_terry import bradley_terry
from .judge_choices import parse_choice, parse_ranking
from .judge_endpoint import Answer, JudgeEndpoint, Question
from .judge_templates import PAIR_TEMPLATE, RANKING_TEMPLATE


Tiers = list[list[int]]
"""Places of images from best to worst, equal ones together."""


class _GroupJudge:
    """
    What the judges of groups have in common: questions about some images of a group each, with an order as the answer.

    Args:
        template (`str`):
            The question; `{prompt}` and `{number}` are replaced.
        prior (`float`):
            See `bradley_terry`.
        endpoint (`Any`):
            The arguments of `JudgeEndpoint`, in their order.
    """

    scope = "group"
    applies_to = "every image that was compared"
    value_range = "a strength on the scale of log-odds, 0 on average over a group"

    def __init__(self, template: str, prior: float, *endpoint: Any) -> None:
        if "{prompt}" not in template:
            raise ValueError(f"`prompt_template` has no {{prompt}}, which stands for the prompt: {template!r}.")
        if not prior > 0:
            raise ValueError(f"`prior` is {prior}; it must be positive.")
        self.prompt_template = template
        self.prior = prior
        self._endpoint = JudgeEndpoint(*endpoint)

    def subsets(self, num_images: int) -> list[tuple[int, ...]]:
        """The images of a group that are in each question."""
        raise NotImplementedError

    def read(self, answer: str, num_images: int) -> Tiers:
        """The order of the images of a question, from best to worst; `ValueError` if it is uncertain."""
        raise NotImplementedError

    async def __call__(
        self, images: list[Image.Image], prompts: list[str], groups: list[int], **kwargs: Any
    ) -> list[float | Exception | None]:
        """
        Judge images.

        Args:
            images (`list[PIL.Image.Image]`):
                All images of some prompts, of any mode and size.
            prompts (`list[str]`):
                Their prompts.
            groups (`list[int]`):
                One number per image, the same for the images of a group.
            kwargs (`Any`):
                Not used.

        Returns:
            `list[float | Exception | None]`: for each image its strength, `None` if it is alone in its group, or a
            [`RewardError`] if every comparison with it failed.

        Raises:
            [`RewardError`]: If the endpoint refuses the key or the model, or is dead, as for [`VLMJudge`].
        """
        members: dict[int, list[int]] = {}
        for place, group in enumerate(groups):
            members.setdefault(group, []).append(place)
        asked = [[places[k] for k in subset] for places in members.values() for subset in self.subsets(len(places))]
        questions = [self._question(images, prompts, subset) for subset in asked]
        orders = await self._endpoint.ask(questions, self._read_complete)
        wins = np.zeros((len(images), len(images)))
        was_compared = np.zeros(len(images), dtype=bool)
        failures: dict[int, Exception] = {}
        for subset, order in zip(asked, orders, strict=True):
            if isinstance(order, Exception):
                failures |= {place: order for place in subset if place not in failures}
                continue
            was_compared[subset] = True
            add_wins(wins, [[subset[k] for k in tier] for tier in order])
        scores: list[float | Exception | None] = [failures.get(place) for place in range(len(images))]
        for places in members.values():
            strengths = bradley_terry(wins[np.ix_(places, places)], self.prior)
            for place, strength in zip(places, strengths.tolist(), strict=True):
                if was_compared[place]:
                    scores[place] = strength
        return scores

    def _question(self, images: Sequence[Image.Image], prompts: Sequence[str], subset: Sequence[int]) -> Question:
        text = self.prompt_template.replace("{number}", str(len(subset))).replace("{prompt}", prompts[subset[0]])
        return Question([images[place] for place in subset], text)

    def _read_complete(self, answer: Answer, question: Question) -> Tiers:
        answer.check_complete()
        orders = [self.read(text, len(question.images)) for text in answer.texts]
        if any(order != orders[0] for order in orders):
            raise ValueError("The parts of the answer say different things.")
        return orders[0]


class PairwiseJudge(_GroupJudge):
    """
    A vision-language model that says which of two images of a prompt is better, for many pairs of a group.

    The images of a group stand in a circle, in the order in which they were sampled, and each is compared with its
    next `rounds` neighbours. So each image is shown first as often as second, and a judge that prefers one of the two
    places favours no image. With `rounds` of half the group's size all pairs are compared. Wins (a tie is half a win
    for both) become strengths of a Bradley-Terry model: `P(i better than j) = sigmoid(score_i - score_j)`.

    What fails for one pair leaves that pair out; an image fails if all of its pairs do.

    Args:
        model, base_url, api_key, request_options, max_concurrency, timeout, max_retries:
            See [`VLMJudge`].
        rounds (`int`, *optional*, defaults to `3`):
            The judge is asked `rounds` times per image.
        prompt_template (`str`, *optional*, defaults to `PAIR_TEMPLATE`):
            The question about two images, which must ask for a last line such as "Better image: 1". `{prompt}` is
            replaced by their prompt.
        prior (`float`, *optional*, defaults to `1.0`):
            Precision of the normal prior of the strengths: with more, few wins count less.

    Attributes:
        scope (`str`): `"group"`: it is called with complete groups of images.
        applies_to (`str`): In words, the images that the reward applies to.
        value_range (`str`): In words, the scale of the reward.

    Raises:
        `ValueError`: If an argument has an impossible value. No message contains the key.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        rounds: int = 3,
        prompt_template: str = PAIR_TEMPLATE,
        prior: float = 1.0,
        request_options: dict[str, Any] | None = None,
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int | None = None,
    ) -> None:
        if rounds < 1:
            raise ValueError(f"`rounds` is {rounds}; it must be at least 1.")
        self.rounds = rounds
        endpoint = (model, base_url, api_key, request_options, max_concurrency, timeout, max_retries)
        super().__init__(prompt_template, prior, *endpoint)

    def subsets(self, num_images: int) -> list[tuple[int, ...]]:
        distances = range(1, min(self.rounds, num_images // 2) + 1)
        return [(k, (k + distance) % num_images) for distance in distances for k in range(num_images)]

    def read(self, answer: str, num_images: int) -> Tiers:
        better = parse_choice(answer)
        return [[0, 1]] if better is None else [[better - 1], [2 - better]]


class RankingJudge(_GroupJudge):
    """
    A vision-language model that orders several images of a prompt from best to worst.

    Each question is asked twice, the second time with its images in reversed order. So each image is shown before
    another one as often as behind it, and a judge that prefers some places favours no image.

    If a group has more images than a question, the images stand in a circle, in the order in which they were sampled,
    and questions have the next `images_per_question` of them, from every half of that number on: each image is in two
    or three questions, each asked twice. Each order counts as a win of each image against all images behind it (equal
    ones win half), and wins become strengths of a Bradley-Terry model as in [`PairwiseJudge`].

    What fails for one question leaves it out; an image fails if all of its questions do.

    Args:
        model, base_url, api_key, request_options, max_concurrency, timeout, max_retries:
            See [`VLMJudge`].
        images_per_question (`int`, *optional*, defaults to `6`):
            Largest number of images in a question.
        prompt_template (`str`, *optional*, defaults to `RANKING_TEMPLATE`):
            The question, which must ask for a last line such as "Ranking: 2 > 3 > 1". `{prompt}` and `{number}` are
            replaced by the prompt and the number of images.
        prior (`float`, *optional*, defaults to `1.0`):
            See [`PairwiseJudge`].

    Attributes:
        scope, applies_to, value_range: See [`PairwiseJudge`].

    Raises:
        `ValueError`: If an argument has an impossible value. No message contains the key.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        images_per_question: int = 6,
        prompt_template: str = RANKING_TEMPLATE,
        prior: float = 1.0,
        request_options: dict[str, Any] | None = None,
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int | None = None,
    ) -> None:
        if images_per_question < 2:
            raise ValueError(f"`images_per_question` is {images_per_question}; it must be at least 2.")
        self.images_per_question = images_per_question
        endpoint = (model, base_url, api_key, request_options, max_concurrency, timeout, max_retries)
        super().__init__(prompt_template, prior, *endpoint)

    def subsets(self, num_images: int) -> list[tuple[int, ...]]:
        size = self.images_per_question
        starts = range(0, num_images, size // 2) if num_images > size else range(num_images > 1)
        stretches = [tuple((start + k) % num_images for k in range(min(size, num_images))) for start in starts]
        return [order for stretch in stretches for order in (stretch, stretch[::-1])]

    def read(self, answer: str, num_images: int) -> Tiers:
        return parse_ranking(answer, num_images)


def add_wins(wins: np.ndarray, order: Tiers) -> None:
    """Add to a table of wins `[n, n]` what an order of places says: wins against all behind, half among equal ones."""
    for rank, tier in enumerate(order):
        behind = [place for later in order[rank + 1 :] for place in later]
        for place in tier:
            wins[place, behind] += 1
            wins[place, [other for other in tier if other != place]] += 0.5
