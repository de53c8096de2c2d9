# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a run consists of: trainings one after the other, and merges of their adapters."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import TrainerCallback

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.cli.demo import DEMO_SETTINGS
from trl_marble.evaluation import EvaluationConfig, evaluate_pipeline
from trl_marble.evaluation.records import write_atomically
from trl_marble.hub import combine_adapters
from trl_marble.pipelines import lora_config

from .costs import StepCosts, estimate_passes
from .worlds import World


PROMPTS_OF_A_SOURCE = 16  # that are scored
# Seed of the evaluation's images, the same for all methods and seeds of training.
EVALUATION_SEED = 0

HISTORY_FILE = "history.json"
COSTS_FILE = "costs.json"


@dataclass(frozen=True)
class Part:
    """
    One training.

    Args:
        name (`str`):
            Its folder, in that of the run.
        steps (`int`):
            Optimizer steps.
        settings (`Mapping[str, Any]`):
            Of `MarbleConfig`.
        rewards (`tuple[str, ...]`, *optional*):
            Which rewards it trains on. Defaults to none: it learns from teachers alone.
        teachers (`Mapping[str, str]`, *optional*):
            Key of the trainer's `teachers` -> the name of an earlier part. Defaults to none.
        source (`str`, *optional*):
            The only source of its prompts. Defaults to all.
        on (`tuple[str, ...]`, *optional*):
            Earlier parts whose adapters are fused into the base before. Defaults to none.
        number (`int`, *optional*, defaults to `0`):
            Among the parts of the run: each begins with other prompts.
    """

    name: str
    steps: int
    settings: Mapping[str, Any]
    rewards: tuple[str, ...] = ()
    teachers: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None
    on: tuple[str, ...] = ()
    number: int = 0


@dataclass(frozen=True)
class Merge:
    """
    A weighted sum of adapters.

    Args:
        name (`str`):
            The folder of the sum.
        weights (`Mapping[str, float]`):
            Name of an earlier part or merge -> its weight.
    """

    name: str
    weights: Mapping[str, float]

    def write(self, folder: Path) -> None:
        """Write the sum, below the folder of the run."""
        combine_adapters({folder / name: weight for name, weight in self.weights.items()}, folder / self.name)


@dataclass(frozen=True)
class Rescale:
    """
    An adapter times the factor with which its policy is at a given KL to the base model.

    The KL is that of the very images that are scored, and no reward is looked at. Single images differ in it so much
    that a factor found on 192 others was up to a quarter off. The KL grows with nearly the square of the factor,
    which is in `rescaled.json`, written last.

    Args:
        name (`str`):
            The folder of the result.
        part (`str`):
            An earlier part or merge.
        kl (`float`):
            The mean of (v - v_base)^2 that it is to have.
        split (`str`):
            Of the prompts that are scored.
        images (`int`):
            Of each prompt.
        prompts (`int`, *optional*, defaults to `PROMPTS_OF_A_SOURCE`):
            How many prompts of each source are scored.
        steps (`int`, *optional*, defaults to `8`):
            Solver steps.
    """

    name: str
    part: str
    kl: float
    split: str
    images: int
    prompts: int = PROMPTS_OF_A_SOURCE
    steps: int = 8

    def write(self, folder: Path, world: World) -> None:
        """Write the adapter below the folder of the run."""
        if (folder / self.name / RESCALED_FILE).is_file():
            return
        chosen = world.some_prompts(self.split, self.prompts)
        factor = 1.0
        for _ in range(RESCALINGS):
            combine_adapters({folder / self.part: factor}, folder / self.name)
            pipeline = world.load_pipeline()
            pipeline.load_lora_weights(folder / self.name)
            with tempfile.TemporaryDirectory() as place:
                config = EvaluationConfig(
                    place,
                    num_generations=self.images,
                    num_inference_steps=self.steps,
                    seed=EVALUATION_SEED,
                    batch_size=DEMO_SETTINGS["per_device_eval_batch_size"],
                )
                measured = evaluate_pipeline(pipeline, world.reward_funcs()[-1:], chosen, config).kl_to_base()
            assert measured is not None  # the adapter is beside the base
            kl = measured[0]
            if not (math.isfinite(kl) and kl > 0):
                raise ValueError(f"`{folder / self.part}` times {factor:g} has a KL of {kl}; it cannot be scaled.")
            factor *= math.sqrt(self.kl / kl)
            if abs(kl / self.kl - 1) < LAST_CORRECTION:
                combine_adapters({folder / self.part: factor}, folder / self.name)
                write_atomically(folder / self.name / RESCALED_FILE, json.dumps({"factor": factor}).encode())
                return
        raise ValueError(
            f"`{folder / self.part}` has a KL of {kl:g} after {RESCALINGS} scalings, and {self.kl:g} was wanted."
        )


RESCALED_FILE = "rescaled.json"
# A correction of the KL up to this ends within 2 %: in two runs it grew with the power 1.6 and 1.7 of the factor.
RESCALINGS, LAST_CORRECTION = 8, 0.08

# ---- Runs of several parts ----

Piece = Part | Merge | Rescale

ROUNDS = 3  # of MapReduce
STUDENT_SHARE = 0.5  # of a budget; the other half trains the teachers


def train_specialists(
    world: World,
    settings: Mapping[str, Any],
    budget: float,
    folder: str = "",
    on: tuple[str, ...] = (),
    first: int = 0,
) -> list[Part]:
    """One training for each reward, on the prompts that it applies to; they share a budget of passes."""
    steps = max(1, round(budget / len(world.rewards) / estimate_passes(settings, 1)))
    return [
        Part(f"{folder}{name}", steps, settings, (name,), source=world.sources.get(name), on=on, number=first + place)
        for place, name in enumerate(world.rewards)
    ]


def _mean(name: str, parts: Sequence[Part]) -> Merge:
    return Merge(name, {part.name: 1 / len(parts) for part in parts})


def soup(world: World, settings: Mapping[str, Any], budget: float) -> list[Piece]:
    """The average of specialists (rewarded soups, https://huggingface.co/papers/2306.04488)."""
    parts = train_specialists(world, settings, budget)
    return [*parts, _mean("soup", parts)]


def map_reduce(world: World, settings: Mapping[str, Any], budget: float) -> list[Piece]:
    """Specialists and their average, again and again (MapReduce LoRA, https://huggingface.co/papers/2511.20629)."""
    done: list[Piece] = []
    merged: tuple[str, ...] = ()
    for number in range(ROUNDS):
        folder = f"round-{number + 1}"
        parts = train_specialists(
            world, settings, budget / ROUNDS, f"{folder}/", on=merged, first=number * len(world.rewards)
        )
        done += [*parts, _mean(f"{folder}/merged", parts)]
        merged += (f"{folder}/merged",)
    return [*done, Merge("sum", dict.fromkeys(merged, 1.0))]


def _distill(world: World, settings: Mapping[str, Any], budget: float, student: Mapping[str, Any]) -> list[Piece]:
    parts = train_specialists(world, settings, budget * (1 - STUDENT_SHARE))
    teachers = {world.sources.get(part.name, f"all:{part.name}"): part.name for part in parts}
    if len(teachers) < len(parts):
        raise ValueError(f"Two rewards apply to the same source of prompts only: {dict(world.sources)}.")
    # Each sample is taught by those of all prompts, and by at most one of its source.
    of_all = sum(key.startswith("all:") for key in teachers)
    lessons = of_all + (len(world.sources) > 0)
    sources = world.load_prompts("train")["source"]
    of_source = sum(source in teachers for source in sources) / len(sources)
    own = {name: value for name, value in settings.items() if name not in _ONLY_REWARDS} | {"beta": 0.0, **student}
    taught = (of_all + of_source) / lessons
    passes = estimate_passes(own, 0, num_lessons=lessons, num_teachers=len(teachers), taught=taught)
    steps = max(1, round(budget * STUDENT_SHARE / passes))
    return [*parts, Part("student", steps, own, teachers=teachers, number=len(parts))]


_ONLY_REWARDS = (
    "multi_objective_aggregation",
    "scale_rewards",
    "old_policy_preset",
    "kl_target",
    "regularizer_fraction",
)


def distill(world: World, settings: Mapping[str, Any], budget: float) -> list[Piece]:
    """A student of the specialists (DiffusionOPD, https://huggingface.co/papers/2605.15055)."""
    return _distill(world, settings, budget, {"multi_objective_aggregation": "sum_then_normalize"})


def distill_balanced(world: World, settings: Mapping[str, Any], budget: float) -> list[Piece]:
    """The same, with each teacher's gradient balanced as a reward's is."""
    return _distill(world, settings, budget, {"multi_objective_aggregation": "marble"})


COMPOSITES: dict[str, Callable[[World, Mapping[str, Any], float], list[Piece]]] = {
    "soup": soup,
    "mapreduce": map_reduce,
    "distilled": distill,
    "distilled_balanced": distill_balanced,
}


# ---- Training ----


def fuse(pipeline: DiffusionPipeline, adapter: Path) -> None:
    """Fuse an adapter into the pipeline, so that the next one can be trained."""
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


def train_part(
    part: Part,
    folder: Path,
    world: World,
    settings: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback],
    change: Callable[[MarbleNFTTrainer], None],
    card_name: str | None,
    every_layer: bool = False,
    **arguments: Any,
) -> Path:
    """
    Train one adapter. Its history is written last, and completes it; an interrupted training continues from its last
    checkpoint.

    Args:
        part ([`Part`]):
            What is trained.
        folder (`Path`):
            The folder of the run.
        world ([`World`]):
            Where.
        settings (`Mapping[str, Any]`):
            Of `MarbleConfig`, in addition to the part's.
        callbacks (`Sequence[TrainerCallback]`):
            Watch it.
        change (`Callable[[MarbleNFTTrainer], None]`):
            Changes the trainer before it trains.
        card_name (`str`, *optional*):
            The model's name in the card beside the adapter; `None` for no card.
        every_layer (`bool`, *optional*, defaults to `False`):
            Whether all linear layers of the transformer have an adapter.
        **arguments:
            Of [`MarbleNFTTrainer`].

    Returns:
        `Path`: the folder of the adapter.
    """
    own = folder / part.name
    if (own / HISTORY_FILE).is_file():
        return own
    pipeline = world.load_pipeline()
    for name in part.on:
        fuse(pipeline, folder / name)
    prompts = world.load_prompts("train")
    if part.source is not None:
        prompts = prompts.filter(lambda row: row["source"] == part.source)
    by_name = world.rewards_by_name()
    trainer = MarbleNFTTrainer(
        pipeline,
        reward_funcs=[by_name.pop(name) for name in part.rewards] or None,
        eval_reward_funcs=list(by_name.values()),  # all others: curves have every reward
        args=MarbleConfig(str(own), **{**part.settings, **settings}, max_steps=part.steps),
        train_dataset=prompts,
        teachers={key: folder / name for key, name in part.teachers.items()} or None,
        callbacks=[*callbacks, StepCosts(own / COSTS_FILE)],
        peft_config=lora_config(pipeline, target_modules="all-linear") if every_layer else None,
        **arguments,
    )
    change(trainer)
    try:
        trainer.train(resume_from_checkpoint=any(own.glob("checkpoint-*")))
    except FileNotFoundError as error:  # there are checkpoints, but none is valid
        raise FileNotFoundError(f"{error} Delete `{own}` to train this part again.") from error
    trainer.save_model()
    if card_name is not None:
        trainer.create_model_card(model_name=card_name)
    write_atomically(own / HISTORY_FILE, json.dumps(trainer.state.log_history).encode())
    for checkpoint in own.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return own


def join_histories(histories: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The logs of all parts, with the step numbers of the complete run."""
    offset = 0
    for history in histories:
        for row in history:
            yield {**row, "step": row["step"] + offset}
        offset += max((row["step"] for row in history), default=0)
