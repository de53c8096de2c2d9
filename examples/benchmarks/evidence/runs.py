# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One run: a method trained with one learning rate and one seed, then scored on the same prompts as all others."""

import dataclasses
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_marble import MarbleNFTTrainer
from trl_marble.cli.demo import DEMO_SETTINGS
from trl_marble.evaluation import EvaluationConfig, EvaluationResults, evaluate_pipeline
from trl_marble.evaluation.records import write_atomically

from .costs import estimate_passes
from .drift import DRIFT_CONTROLS
from .experiments import EXPERIMENTS
from .methods import BASE, METHODS, REWARDS, SHARED_SETTINGS, find_method, make_weighting
from .parts import (
    COMPOSITES,
    EVALUATION_SEED,
    HISTORY_FILE,
    PROMPTS_OF_A_SOURCE,
    Merge,
    Part,
    Piece,
    Rescale,
    fuse,
    join_histories,
    train_part,
)
from .worlds import SHAPEWORLD, WORLDS, World


# Optimizer steps of a run, for every method: five for each stage of the sequential one.
STEPS = 25
LEARNING_RATES = (6e-4, 1.2e-3, 2.4e-3)
SEEDS = (1, 2, 3)
TUNING_SEED = 0

# Long runs have the demo's settings with twice its images a step, with which 150 steps take about 20 minutes on one
# core. `beta` and how rewards are combined are each method's own.
LONG_STEPS = 150
LONG_SETTINGS = {
    **{name: DEMO_SETTINGS[name] for name in SHARED_SETTINGS},
    "per_device_train_batch_size": 128,
    "rollout_batch_size": 128,
    "beta": 0.0,
}
# Solver steps of the last evaluation of a long run: more than those of the training.
LONG_EVALUATION_STEPS = 8
QUICK_SIZES = {
    "num_generations": 4,
    "per_device_train_batch_size": 16,
    "rollout_batch_size": 16,
    "num_inference_steps": 3,  # trained at two, so that the KL can be taken at one of them
}
QUICK_SETTINGS = SHARED_SETTINGS | QUICK_SIZES

# Learning rates are chosen on prompts of the train split, so that the test split does not influence the choice.
TUNING, MAIN = "tuning", "main"
STAGE_SEEDS = 100  # difference between the seeds of a run's stages, so that these begin with different prompts
# Small evaluations during the training, for the curves.
CURVE_STEPS, CURVE_IMAGES = 5, 8

REPORT_FILE = "report.json"
PLAN_FILE = "run.json"
LOG_FILE = "log.txt"
PROGRESS_FILE = "steps.txt"


@dataclass(frozen=True)
class Scale:
    """
    How large runs and evaluations are; the same for all compared runs.

    Args:
        steps (`int`, *optional*, defaults to `STEPS`):
            Optimizer steps of a run, at least as many as the method has stages.
        images (`int`, *optional*, defaults to `48`):
            Images per prompt of the test split.
        tuning_images (`int`, *optional*, defaults to `16`):
            Images per prompt when learning rates are chosen.
        curve_steps (`int`, *optional*, defaults to `CURVE_STEPS`):
            Optimizer steps between the small evaluations during the training.
        curve_images (`int`, *optional*, defaults to `CURVE_IMAGES`):
            Their images per prompt.
        curve_inference_steps (`int`, *optional*):
            Their solver steps. Defaults to those of the training.
        long (`bool`, *optional*, defaults to `False`):
            Whether the runs are long ones, with `LONG_SETTINGS`.
        quick (`bool`, *optional*, defaults to `False`):
            Whether everything is as small as possible: this only tests the code and measures nothing.
        world (`str`, *optional*, defaults to `"shapeworld"`):
            A name of `WORLDS`.
    """

    steps: int = STEPS
    images: int = 48
    tuning_images: int = 16
    curve_steps: int = CURVE_STEPS
    curve_images: int = CURVE_IMAGES
    curve_inference_steps: int | None = None
    long: bool = False
    quick: bool = False
    world: str = SHAPEWORLD

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `MarbleConfig` that all methods share."""
        if self.quick:
            return QUICK_SETTINGS
        return LONG_SETTINGS if self.long else SHARED_SETTINGS

    @property
    def evaluation_steps(self) -> int:
        """Solver steps of the last evaluation."""
        return LONG_EVALUATION_STEPS if self.long else self.settings["num_inference_steps"]

    @property
    def prompts_of_a_source(self) -> int:
        """How many prompts of each source are scored."""
        return 1 if self.quick else PROMPTS_OF_A_SOURCE

    def prompts(self, phase: str) -> Dataset:
        """The prompts on which the runs of a phase are scored, equally many of each source."""
        return WORLDS[self.world].some_prompts(_split(phase), self.prompts_of_a_source)

    def scored_images(self, phase: str) -> int:
        """How many images of each prompt are scored."""
        return self.tuning_images if phase == TUNING else self.images

    def rescaling(self, name: str, part: str, kl: float, phase: str) -> Rescale:
        """
        An adapter at a given KL, where the runs of a phase are scored. That of quick runs, which only test the code,
        is as small as runs of two steps can have.
        """
        return Rescale(
            name,
            part,
            QUICK_KL if self.quick else kl,
            _split(phase),
            self.scored_images(phase),
            self.prompts_of_a_source,
            self.evaluation_steps,
        )


QUICK_KL = 1e-5


def _split(phase: str) -> str:
    return "train" if phase == TUNING else "test"


QUICK = Scale(steps=2, images=2, tuning_images=2, quick=True)
LONG_RATE = DEMO_SETTINGS["learning_rate"]
QUICK_LONG = Scale(steps=2, images=2, tuning_images=2, curve_steps=1, curve_images=1, long=True, quick=True)
LONG = Scale(steps=LONG_STEPS, images=24, tuning_images=24, curve_steps=10, curve_images=8, long=True)


@dataclass(frozen=True)
class Run:
    """
    One training and its evaluation.

    Args:
        phase (`str`):
            `TUNING` or `MAIN` (also for ablations): decides on which prompts it is scored.
        method (`str`):
            A name of `METHODS` or `VARIANTS`.
        learning_rate (`float`):
            Peak learning rate.
        seed (`int`):
            Seed of the training.
        scale ([`Scale`]):
            How large it is.
    """

    phase: str
    method: str
    learning_rate: float
    seed: int
    scale: Scale

    @property
    def name(self) -> str:
        """Name of its folder within the output folder, and in the progress display."""
        world = "" if self.scale.world == SHAPEWORLD else f"{self.scale.world}/"
        if self.method == BASE:
            return f"{world}{self.phase}/{BASE}"
        return f"{world}{self.phase}/{self.method}/lr-{self.learning_rate:g}/seed-{self.seed}"

    @property
    def world(self) -> World:
        """Where it is trained."""
        return WORLDS[self.scale.world]

    @property
    def steps(self) -> int:
        """Optimizer steps of all parts."""
        return sum(part.steps for part in self.parts if isinstance(part, Part))

    @property
    def parts(self) -> list[Piece]:
        """Its trainings and merges, in their order; the last one is the result."""
        method = find_method(self.method)
        parts: list[Piece] = []
        if method.composite is not None:
            parts = COMPOSITES[method.composite](self.world, self.settings, self._budget)
        else:
            for number, steps in enumerate(split_steps(self._steps_of_cost, len(self.stages))):
                on = tuple(part.name for part in parts)
                rewards = self.stages[number]
                # A reward alone learns from its own prompts, as specialists do.
                alone = method.final_kl is not None and len(rewards) == 1
                source = self.world.sources.get(rewards[0]) if alone else None
                name = f"stage-{number + 1}"
                parts.append(Part(name, steps, self.settings, rewards, source=source, on=on, number=number))
        if method.final_kl is None:
            return parts
        return [*parts, self.scale.rescaling("rescaled", parts[-1].name, method.final_kl, self.phase)]

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The rewards of each of its stages; all rewards are those of its world."""
        return tuple(self.world.rewards if own == REWARDS else own for own in find_method(self.method).stages)

    @property
    def _budget(self) -> float:
        """What it may cost: all steps of the method that it costs as."""
        costs_as = find_method(self.method).costs_as
        assert costs_as is not None
        other = dataclasses.replace(self, method=costs_as)
        # Where recipes are compared, the base model's images count too.
        return self.scale.steps * other._passes_per_step() + other._passes_of_the_base_model

    def _passes_per_step(self, num_prompts: int | None = None) -> float:
        settings = {**self.settings, "max_steps": self.scale.steps}
        return estimate_passes(settings, len(self.stages[0]), num_prompts=num_prompts)

    @property
    def _passes_of_the_base_model(self) -> float:
        """Of a whole run, for the images that weights by progress compare with; 0 where these do not count."""
        if find_method(self.method).final_kl is None:
            return 0.0
        num_prompts = len(self.world.load_prompts("train"))
        return self.scale.steps * (self._passes_per_step(num_prompts=num_prompts) - self._passes_per_step())

    @property
    def _steps_of_cost(self) -> int:
        method = find_method(self.method)
        if not method.stages:
            return 0
        if method.costs_as is None:
            return self.scale.steps
        return max(1, round((self._budget - self._passes_of_the_base_model) / self._passes_per_step()))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `MarbleConfig`, of the method and of what all methods share."""
        settings = {**self.scale.settings, **find_method(self.method).settings}
        return settings | QUICK_SIZES if self.scale.quick else settings

    @property
    def images(self) -> int:
        """Number of sampled images per prompt, including those for the curves."""
        images = self.scale.scored_images(self.phase)
        if not self.has_curves:
            return images
        return images + (1 + self.steps // self.scale.curve_steps) * min(self.scale.curve_images, images)

    @property
    def has_curves(self) -> bool:
        """Whether small evaluations during training make a curve: for long runs and those of the main table."""
        if find_method(self.method).composite is not None:
            return False
        if self.scale.long:
            return self.method != BASE
        return self.phase == MAIN and self.method in METHODS and self.method != BASE

    def plan(self) -> dict[str, Any]:
        """Everything that its result depends on; it is written to its folder."""
        method, own = find_method(self.method), asdict(self)
        for name in ("curve_steps", "curve_images", "curve_inference_steps"):  # these only watch a run
            del own["scale"][name]
        if self.scale.world == SHAPEWORLD:
            del own["scale"]["world"]
        if self.world.fingerprint is not None:
            own["weights"] = self.world.fingerprint()
        if method.costs_as is not None:
            own["steps"] = self.steps
        if method.every_layer:
            own["every_layer"] = True
        if method.final_kl is not None:
            own["parts"] = json.loads(json.dumps([asdict(part) for part in self.parts]))  # as it is read
        return {
            **own,
            "stages": [list(stage) for stage in self.stages],
            "weighting": method.weighting,
            "experiment": method.experiment,
            "drift": method.drift and list(method.drift),
            "settings": self.settings,
        }

    def is_finished(self, output_dir: Path) -> bool:
        """
        Whether its report exists.

        Raises:
            `ValueError`: If the folder contains a run of the same name with other settings.
        """
        folder = output_dir / self.name
        if (folder / PLAN_FILE).is_file():
            found, wanted = json.loads((folder / PLAN_FILE).read_text()), self.plan()
            differing = [
                f"`{key}` is {found.get(key)} there and {wanted.get(key)} here"
                for key in {**wanted, **found}
                if found.get(key) != wanted.get(key)
            ]
            if differing:
                raise ValueError(
                    f"`{folder}` holds another run: {'; '.join(differing)}. Choose another `--output_dir`, or delete "
                    "that folder."
                )
        return (folder / REPORT_FILE).is_file()


def base_run(phase: str, scale: Scale) -> Run:
    """The evaluation of the pipeline before any training; needed once per phase."""
    return Run(phase, BASE, 0.0, 0, scale)


def split_steps(steps: int, stages: int) -> list[int]:
    """
    The steps of each stage, as equal as possible; the first ones get one more if necessary.

    Raises:
        `ValueError`: if there are fewer steps than stages.
    """
    if stages and steps < stages:
        raise ValueError(f"{steps} steps cannot be shared by {stages} stages; train at least one step a stage.")
    return [steps // stages + (stage < steps % stages) for stage in range(stages)]


def execute(run: Run, output_dir: Path) -> None:
    """
    Train and score, and write `report.json` at the end. An interrupted run continues from its last checkpoint, or from
    its last batch of images.
    """
    folder = output_dir / run.name
    write_atomically(folder / PLAN_FILE, json.dumps(run.plan(), indent=2).encode())
    start, start_of_cpu = time.monotonic(), time.process_time()
    histories: list[list[dict[str, Any]]] = []
    done = 0
    for part in run.parts:
        if isinstance(part, Merge):
            part.write(folder)
            continue
        if isinstance(part, Rescale):
            part.write(folder, run.world)
            continue
        _train(run, part, folder, done)
        histories.append(json.loads((folder / part.name / HISTORY_FILE).read_text()))
        done += part.steps
    trained = time.monotonic()
    pipeline = run.world.load_pipeline()
    if run.parts:
        last = run.parts[-1]
        if run.scale.long:
            pipeline.load_lora_weights(folder / last.name)  # beside the base, so that the KL to it can be measured
        else:
            for name in (*(last.on if isinstance(last, Part) else ()), last.name):
                fuse(pipeline, folder / name)
    config = EvaluationConfig(
        str(folder / "evaluation"),
        num_generations=run.scale.scored_images(run.phase),
        num_inference_steps=run.scale.evaluation_steps,
        seed=EVALUATION_SEED,
        batch_size=DEMO_SETTINGS["per_device_eval_batch_size"],
    )
    rewards = [*run.world.reward_funcs(), *run.world.heldout_funcs()]
    evaluate_pipeline(pipeline, rewards, run.scale.prompts(run.phase), config)
    report = {
        "plan": run.plan(),
        "history": list(join_histories(histories)),
        # Of the last attempt, if a run was interrupted.
        "training_seconds": trained - start,
        "cpu_seconds": time.process_time() - start_of_cpu,
        "evaluation_seconds": time.monotonic() - trained,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_atomically(folder / REPORT_FILE, json.dumps(report, indent=2).encode())


def load_report(run: Run, output_dir: Path) -> dict[str, Any]:
    """The report of a finished run."""
    return json.loads((output_dir / run.name / REPORT_FILE).read_text())


def load_scores(run: Run, output_dir: Path) -> EvaluationResults:
    """The rewards of all held-out images of a run."""
    return EvaluationResults.load(output_dir / run.name / "evaluation")


def _train(run: Run, part: Part, folder: Path, done: int) -> None:
    """Train one part, after so many steps of others."""
    method = find_method(run.method)
    settings = {
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "data_seed": run.seed + STAGE_SEEDS * part.number,
        "use_cpu": True,  # on every machine, for equal conditions
        "save_steps": 10 if run.scale.long else 5,
        "save_total_limit": 1,
        "eval_strategy": "steps" if run.has_curves else "no",
        "eval_steps": run.scale.curve_steps if run.has_curves else None,
        "eval_on_start": run.has_curves and part.number == 0,
        "eval_num_inference_steps": run.scale.curve_inference_steps if run.has_curves else None,
        "num_generations_eval": min(run.scale.curve_images, run.scale.images),
        "per_device_eval_batch_size": DEMO_SETTINGS["per_device_eval_batch_size"],
        "report_to": "none",
        "log_images": False,
        "disable_tqdm": True,
    }

    def change(trainer: MarbleNFTTrainer) -> None:
        if method.experiment is not None:
            trainer.update.gradient = EXPERIMENTS[method.experiment](trainer)
        if method.drift is not None:
            kind, strength = method.drift
            DRIFT_CONTROLS[kind](trainer, strength)

    train_part(
        part,
        folder,
        run.world,
        settings,
        [_Progress(folder / PROGRESS_FILE, done)],
        change,
        card_name=f"{run.scale.world}-{run.method.replace('_', '-')}-seed-{run.seed}" if run.has_curves else None,
        eval_dataset=run.scale.prompts(run.phase),
        weighting=make_weighting(method),
        every_layer=method.every_layer,
    )


class _Progress(TrainerCallback):
    """Report the number of finished steps to the process that started the run."""

    def __init__(self, file: Path, done: int) -> None:
        self.file, self.done = file, done

    def on_step_end(self, args, state, control, **kwargs) -> None:
        write_atomically(self.file, str(self.done + state.global_step).encode())
