# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Sampling and scoring a whole prompt set, batch by batch, on any number of processes."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..data import read_rows
from ..media import Sample
from ..pipelines import FlowPipeline, encode_distinct, with_rgb_images
from ..rewards import RewardScorer
from ..rollout import RolloutSampler, SampleBatch, Samples, SetImages
from .drift import DriftMeter
from .statistics import number_prompts


GOLDEN_RATIO = (5**0.5 - 1) / 2  # the fractions of its multiples are spread evenly, however many they are


class EvaluationPlan:
    """
    Which image is sampled from what, and with which others: the same for any number of processes.

    Args:
        prompts ([`~datasets.Dataset`]):
            The prompt set.
        edits (`bool`):
            Whether the pipeline edits the images of the column `image`.
        num_generations (`int`):
            Images per row of the prompt set.
        seed (`int`):
            Seed of the evaluation.
        batch_size (`int`):
            Images that are sampled together. Images depend on it by rounding.

    Attributes:
        texts (`list[str]`): The prompt of each row.
        num_images (`int`): Number of images.
        batches (`list[range]`): The numbers of the images of each batch.
    """

    def __init__(self, prompts: Dataset, edits: bool, num_generations: int, seed: int, batch_size: int) -> None:
        self.prompts = prompts
        self.texts: list[str] = prompts["prompt"][:]
        self._rows = with_rgb_images(prompts) if edits else prompts  # its images are decoded where a row is read
        self.edits, self.num_generations, self.seed = edits, num_generations, seed
        self.num_images = len(prompts) * num_generations
        starts = range(0, self.num_images, batch_size)
        self.batches = [range(start, min(start + batch_size, self.num_images)) for start in starts]

    def place(self, index: int) -> tuple[int, int]:
        """Row of the prompt set of an image, and its number among the images of that row."""
        return divmod(index, self.num_generations)

    def image_seed(self, index: int) -> int:
        """The seed of an image."""
        return image_seed(self.seed, *self.place(index))

    def time_place(self, index: int) -> float:
        """
        Where in the time grid the drift of an image is measured, in [0, 1): the images of a row are spread evenly over
        the grid, and rows are shifted against each other.
        """
        row, generation = self.place(index)
        return (generation + row * GOLDEN_RATIO % 1) / self.num_generations

    def group_numbers(self) -> list[int]:
        """The group of each image: the number of its prompt, or of the pair of prompt and image to be edited."""
        rows = [self.place(index)[0] for index in range(self.num_images)]
        return number_prompts([self.texts[row] for row in rows], rows, self.edits).tolist()

    def set_images(self, indices: Sequence[int], images: list[Sample], finite: Tensor) -> SetImages:
        """
        Images as rewards compare them that have a `scope`.

        Args:
            indices (`Sequence[int]`):
                The numbers of this process's images.
            images (`list[PIL.Image.Image]` or `list[list[PIL.Image.Image]]`):
                These images.
            finite (`Tensor` of shape `[B]`, bool):
                Which of them rewards are shown.
        """
        groups = self.group_numbers()
        columns = read_rows(self._rows, [self.place(index)[0] for index in indices]) if indices else {"prompt": []}
        prompts = columns.pop("prompt")
        return SetImages(images, prompts, columns, list(indices), [groups[index] for index in indices], finite)

    def make_batch(self, flow: FlowPipeline, number: int) -> SampleBatch:
        """What a batch is sampled from."""
        indices = self.batches[number]
        columns = read_rows(self._rows, [self.place(index)[0] for index in indices])
        texts = columns.pop("prompt")
        conditioning, row = encode_distinct(flow, texts, columns["image"] if self.edits else None)
        seeds = [self.image_seed(index) for index in indices]
        return SampleBatch(texts, columns, seeds, conditioning.select(row))


def image_seed(seed: int, prompt_index: int, generation: int) -> int:
    """
    The seed of one image of an evaluation.

    Args:
        seed (`int`):
            Seed of the evaluation, not negative.
        prompt_index (`int`):
            Row of the prompt set.
        generation (`int`):
            Number of the image among those of the row.

    Returns:
        `int`: of 53 bits, which every reader of JSON and CSV keeps exactly. Different places give unrelated seeds, and
        none of them is one of training.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(prompt_index, generation))
    return int(sequence.generate_state(1, np.uint64)[0]) >> 11


def evaluate_batches(
    plan: EvaluationPlan,
    sampler: RolloutSampler,
    scorers: Sequence[RewardScorer],
    numbers: Sequence[int],
    trainer_state: Any,
    deliver: Callable[[int, Samples], None],
    drift: DriftMeter | None = None,
) -> None:
    """
    Sample and score this process's batches with the weights that are in place. A batch is scored while the next one is
    sampled. All processes call it.

    Args:
        plan ([`EvaluationPlan`]):
            What there is to sample.
        sampler ([`~trl_marble.rollout.RolloutSampler`]):
            Samples and scores.
        scorers (`Sequence[RewardScorer]`):
            The rewards to ask.
        numbers (`Sequence[int]`):
            The batches of this process.
        trainer_state ([`~transformers.TrainerState`]):
            Passed on to the rewards.
        deliver (`Callable[[int, Samples], None]`):
            Called with the number of each batch and what became of it, in their order.
        drift ([`~trl_marble.evaluation.drift.DriftMeter`], *optional*):
            What measures each image's distance from the base model, which becomes `Samples.measured`. Defaults to not
            measuring it.
    """
    todo = _fill_up(plan, numbers) if sampler.calls_together else list(numbers)
    # As many rounds on all processes, so that none of them goes on when one has failed.
    rounds = max(gather_object([len(todo)]))
    own, done = set(numbers), iter(todo)

    def make_batches() -> Iterator[SampleBatch]:
        for number in todo:
            yield plan.make_batch(sampler.flow, number)

    def deliver_own(samples: Samples) -> None:
        number = next(done)
        if number in own:
            own.remove(number)
            deliver(number, samples)

    sampler.sample_and_score(
        scorers,
        make_batches(),
        rounds,
        sum(len(plan.batches[number]) for number in todo),
        trainer_state,
        deliver_own,
        max_waiting=1,
        measure=None if drift is None else functools.partial(_measure_drift, drift, plan, iter(todo)),
    )


def _measure_drift(
    drift: DriftMeter, plan: EvaluationPlan, numbers: Iterator[int], batch: SampleBatch, latents: Tensor
) -> Tensor:
    """Measure the next of these batches, see [`~trl_marble.evaluation.drift.DriftMeter.measure`]."""
    places = [plan.time_place(index) for index in plan.batches[next(numbers)]]
    return drift.measure(latents, places, batch.seeds, batch.conditioning)


def _fill_up(plan: EvaluationPlan, numbers: Sequence[int]) -> list[int]:
    """
    This process's batches, and among them some that nobody looks at, with which all processes sample equally many
    images in every round: a pipeline that edits images calls the transformer once for each of them.
    """
    size, last = len(plan.batches[0]), len(plan.batches) - 1
    full = [number for number in numbers if len(plan.batches[number]) == size]
    full += [0] * (max(gather_object([len(full)])) - len(full))
    return full if len(plan.batches[last]) == size else [*full, last]


def digest_evaluation(plan: EvaluationPlan, sampler: RolloutSampler, reward_names: Sequence[str]) -> str:
    """Of the prompts, the seeds, how they are sampled, and the rewards of an evaluation."""
    flow = sampler.flow
    size = (flow.height, flow.width, flow.num_frames)
    sampling = [sampler.num_inference_steps, flow.guidance_scale, size, flow.max_sequence_length]
    settings = [plan.num_generations, plan.seed, *reward_names, sampling, str(flow.autocast_dtype)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for rows in plan.prompts.with_format("arrow").iter(1000):  # as they are stored: no image is decoded for it
        for row in rows.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def digest_prompts(prompts: Dataset) -> str:
    """Of all rows and columns of a prompt set."""
    digest = hashlib.sha256()
    for row in prompts:
        digest.update(json.dumps(row, sort_keys=True, default=_content).encode() + b"\n")
    return digest.hexdigest()


def _content(value: Any) -> str:
    """Of a value that JSON does not have; the `repr` of an image would tell its place in memory."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)
