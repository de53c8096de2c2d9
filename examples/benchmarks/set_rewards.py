# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Diversity as a reward on ShapeWorld: what happens to it, and at what price for the five rewards.

```bash
python examples/benchmarks/set_rewards.py
```

Trains with the five rewards of ShapeWorld (`five`), with the Vendi diversity of a prompt's images as a sixth (`six`),
and with diversity alone (`diversity`), each with three seeds and the KL to the base held at the same value, and scores
all on held-out prompts. Finished runs are not repeated, and interrupted ones continue from their last checkpoint. Runs
with other `--variants` or `--seeds` may share `OUTPUT_DIR` and be started at the same time.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.runs import LONG, LONG_RATE, LONG_SETTINGS, MAIN, QUICK_LONG, QUICK_SIZES, SEEDS, Scale
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.evaluation import EvaluationConfig, EvaluationResults, evaluate_pipeline
from trl_marble.rewards import VendiDiversity
from trl_marble.rollout.diversity import thumbnails
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs


BASE, VARIANTS = "base", ("five", "six", "diversity")
EVALUATION_SEED = 0


def small_pixels(images: list[Image.Image]) -> Tensor:
    """16 x 16 pixels around grey: what is where, and in what colour."""
    return thumbnails(images) - 0.5


def rewards(variant: str) -> list:
    """The rewards that a variant is trained on."""
    five, diversity = [*reward_funcs()], VendiDiversity(small_pixels)
    return {"five": five, "six": [*five, diversity], "diversity": [diversity]}[variant]


def train(folder: Path, variant: str, seed: int, scale: Scale, kl_target: float) -> None:
    """Train one adapter, and save it in the folder."""
    # The value of a group depends on its size, so the base model's groups are as large.
    sizes = QUICK_SIZES if scale.quick else {}
    settings: dict[str, Any] = LONG_SETTINGS | sizes | {"multi_objective_aggregation": "progress"}
    settings |= {"scale_rewards": "group", "beta": 0.5, "kl_target": kl_target}
    config = MarbleConfig(
        str(folder),
        **settings,
        progress_base_images=settings["num_generations"],
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
    trainer = MarbleNFTTrainer(load_pipeline(), rewards(variant), args=config, train_dataset=load_prompts("train"))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history))


def evaluate(folder: Path, adapter: Path | None, scale: Scale) -> EvaluationResults:
    """Score an adapter, or the base, on held-out prompts with all six rewards."""
    config = EvaluationConfig(
        str(folder),
        adapter=None if adapter is None else str(adapter),
        num_generations=scale.images,
        num_inference_steps=2 if scale.quick else scale.evaluation_steps,
        seed=EVALUATION_SEED,
    )
    return evaluate_pipeline(load_pipeline(), rewards("six"), scale.prompts(MAIN), config)


def gains_table(base: EvaluationResults, found: dict[str, list[EvaluationResults]]) -> Table:
    """Gains in standard deviations of the base's images, the mean over seeds; and the KL and the Vendi score."""
    names = base.reward_names
    table = Table("rewards", *names, "worst of five", "Vendi score", "KL", title="gains since the base")
    for variant, results in found.items():
        gains = {
            name: np.mean([each.table[name].mean() - base.table[name].mean() for each in results])
            / base.table[name].std(ddof=0)
            for name in names
        }
        worst = min(gain for name, gain in gains.items() if name != "VendiDiversity")
        vendi = np.mean([each.table["VendiDiversity"].mean() for each in results])
        kl = np.mean([each.table["kl"].mean() if "kl" in each.table else 0.0 for each in results])  # the base has none
        table.add_row(
            variant, *(f"{gain:+.2f}" for gain in gains.values()), f"{worst:+.2f}", f"{vendi:.3f}", f"{kl:.3f}"
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/set_rewards"), help="default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--kl_target", type=float, default=0.06, help="KL to the base; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two small steps: tests only the code")
    args = parser.parse_args(arguments)
    scale = QUICK_LONG if args.quick else LONG
    base = evaluate(args.output_dir / BASE, None, scale)
    found: dict[str, list[EvaluationResults]] = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            folder = args.output_dir / variant / f"seed-{seed}"
            if not (folder / "history.json").is_file():
                train(folder, variant, seed, scale, args.kl_target)
            found[variant].append(evaluate(folder / "evaluation", folder, scale))
    Console(width=160).print(gains_table(base, {BASE: [base], **found}))


if __name__ == "__main__":
    main()
