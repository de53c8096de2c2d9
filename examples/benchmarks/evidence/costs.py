# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What optimizer steps cost: CPU time, and passes of the transformer, which no other load on the machine changes."""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trl_marble import MarbleConfig
from trl_marble.cli.step_passes import compute_passes
from trl_marble.evaluation.records import write_atomically
from trl_marble.selftest.passes import count_passes


@dataclass(frozen=True)
class StepCost:
    """
    What one optimizer step has cost, from its rollouts to the optimizer. Evaluations are no part of it.

    Args:
        cpu_seconds (`float`):
            CPU time of all threads of the process.
        forwards (`int`):
            Forward passes of the transformer, one for each image of their batches.
        backwards (`int`):
            Backward passes, in the same way.
    """

    cpu_seconds: float
    forwards: int
    backwards: int

    @property
    def passes(self) -> int:
        """Passes of both kinds, each counted as 1."""
        return self.forwards + self.backwards


class StepCosts(TrainerCallback):
    """
    Measures the cost of each optimizer step.

    Args:
        file (`Path`, *optional*):
            Where to keep the costs. A run that is resumed goes on in it: what it does again counts once.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.steps = read_costs(file) if file is not None and file.is_file() else {}

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._counting = ExitStack()
        self._passes = self._counting.enter_context(count_passes(model.transformer))
        self._start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = time.process_time() - self._start
        self._counting.close()
        passes = self._passes
        self.steps[state.global_step] = StepCost(seconds, passes.images_forward, passes.images_backward)
        if self.file is not None:
            content = {step: asdict(cost) for step, cost in self.steps.items()}
            write_atomically(self.file, json.dumps(content).encode())


def read_costs(file: Path) -> dict[int, StepCost]:
    """Step -> its cost, as [`StepCosts`] has left them."""
    return {int(step): StepCost(**cost) for step, cost in json.loads(file.read_text()).items()}


def total_until(costs: Mapping[int, StepCost], step: int) -> StepCost:
    """The cost of all steps up to one, this included."""
    own = [cost for number, cost in costs.items() if number <= step]
    seconds = sum(cost.cpu_seconds for cost in own)
    return StepCost(seconds, sum(cost.forwards for cost in own), sum(cost.backwards for cost in own))


# Decoding and scoring an image takes about as long as five passes of ShapeWorld's transformer (docs/step_cost.md).
IMAGE_PASSES = 5


def estimate_passes(
    settings: Mapping[str, Any],
    num_rewards: int,
    num_lessons: int = 0,
    num_teachers: int = 0,
    taught: float = 1.0,
    num_prompts: int | None = None,
) -> float:
    """
    About how many passes for each image an optimizer step takes, with decoding and scoring in the same unit. It
    decides how many steps a run of a given cost has.

    Args:
        settings (`Mapping[str, Any]`):
            Of `MarbleConfig`.
        num_rewards (`int`):
            K; without rewards nothing is decoded.
        num_lessons (`int`, *optional*, defaults to `0`):
            Most teachers that any sample has.
        num_teachers (`int`, *optional*, defaults to `0`):
            T.
        taught (`float`, *optional*, defaults to `1.0`):
            How many teachers a sample has on average, as a share of `num_lessons`.
        num_prompts (`int`, *optional*):
            Prompts of the prompt set. With weights by progress each has images of the base model once in a run, of as
            many steps as `settings` has; by default these are left out.
    """
    args = MarbleConfig("estimated", **settings)
    passes = compute_passes(
        args,
        num_processes=1,
        classifier_free=False,
        num_rewards=num_rewards,
        num_lessons=num_lessons,
        num_teachers=num_teachers,
        num_prompts=num_prompts,
    )
    updates = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
    scored = args.generation_batch_size / updates if num_rewards else 0.0
    base_images = 0.0 if num_prompts is None else passes.base_images
    scored += base_images / args.num_inference_steps  # without guidance a pass is a solver step
    own = passes.total - passes.base_images + base_images - (1 - taught) * passes.teachers
    return own + IMAGE_PASSES * scored
