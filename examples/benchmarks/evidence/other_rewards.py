# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Long runs with rewards of a benchmark's own, and their evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.evaluation import EvaluationConfig, EvaluationResults, evaluate_pipeline
from trl_marble.evaluation.records import write_atomically
from trl_marble.shapeworld import load_pipeline, load_prompts

from .methods import DEMO_SAMPLES, SAMPLES
from .parts import EVALUATION_SEED
from .runs import LONG_RATE, LONG_SETTINGS, MAIN, QUICK_SIZES, Scale
from .worlds import SHAPEWORLD, WORLDS


FINAL_KL = 0.05  # that all adapters are scaled to before they are scored
HISTORY = "history.json"  # the last file that a run writes


def sizes_of(scale: Scale) -> dict[str, Any]:
    """The settings of a long run of this scale with the demo's samples, without those of a method."""
    return LONG_SETTINGS | SAMPLES[DEMO_SAMPLES][1] | (QUICK_SIZES if scale.quick else {})


def train_with(folder: Path, rewards: list, settings: Mapping[str, Any], seed: int, scale: Scale) -> None:
    """Train one adapter, and save it in the folder; an interrupted run continues from its last checkpoint."""
    config = MarbleConfig(
        str(folder),
        **sizes_of(scale) | settings,
        learning_rate=LONG_RATE,
        max_steps=scale.steps,
        seed=seed,
        use_cpu=True,
        save_steps=10,
        save_total_limit=1,
        report_to="none",
        log_images=False,
        disable_tqdm=True,
    )
    trainer = MarbleNFTTrainer(load_pipeline(), rewards, args=config, train_dataset=load_prompts("train"))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    write_atomically(folder / HISTORY, json.dumps(trainer.state.log_history).encode())


def scale_to_final_kl(folder: Path, scale: Scale) -> Path:
    """The adapter of a run, scaled to the KL of all; made once."""
    scaled = scale.rescaling("rescaled", "", FINAL_KL, MAIN)
    scaled.write(folder, WORLDS[SHAPEWORLD])
    return folder / scaled.name


def evaluate_with(
    folder: Path, adapter: Path | None, rewards: list, scale: Scale, phase: str = MAIN
) -> EvaluationResults:
    """Score an adapter, or the base, on the prompts of a phase: held-out ones by default."""
    config = EvaluationConfig(
        str(folder),
        adapter=None if adapter is None else str(adapter),
        num_generations=scale.scored_images(phase),
        num_inference_steps=scale.evaluation_steps,
        seed=EVALUATION_SEED,
    )
    return evaluate_pipeline(load_pipeline(), rewards, scale.prompts(phase), config)
