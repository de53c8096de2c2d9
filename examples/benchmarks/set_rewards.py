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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.other_rewards import HISTORY, evaluate_with, sizes_of, train_with
from evidence.runs import LONG, QUICK_LONG, SEEDS, Scale
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_marble.evaluation import EvaluationResults, gains_in_deviations
from trl_marble.rewards import VendiDiversity
from trl_marble.rollout.diversity import thumbnails
from trl_marble.shapeworld import reward_funcs


BASE, VARIANTS = "base", ("five", "six", "diversity")


def small_pixels(images: list[Image.Image]) -> Tensor:
    """16 x 16 pixels around grey: what is where, and in what colour."""
    return thumbnails(images) - 0.5


def rewards(variant: str) -> list:
    """The rewards that a variant is trained on."""
    five, diversity = [*reward_funcs()], VendiDiversity(small_pixels)
    return {"five": five, "six": [*five, diversity], "diversity": [diversity]}[variant]


def train(folder: Path, variant: str, seed: int, scale: Scale, kl_target: float) -> None:
    """Train one adapter, and save it in the folder."""
    settings: dict[str, Any] = {"multi_objective_aggregation": "progress", "scale_rewards": "group"}
    settings |= {"beta": 0.5, "kl_target": kl_target}
    # The value of a group depends on its size, so the base model's groups are as large.
    settings["progress_base_images"] = sizes_of(scale)["num_generations"]
    train_with(folder, rewards(variant), settings, seed, scale)


def _gains(
    base: EvaluationResults, results: EvaluationResults, names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    before, after = [{name: of.table[name].to_numpy() for name in names} for of in (base, results)]
    return gains_in_deviations(before, after, base.groups)[0]


def gains_table(base: EvaluationResults, found: dict[str, list[EvaluationResults]]) -> Table:
    """Gains in standard deviations of the base's images, the mean over seeds; and the KL and the Vendi score."""
    names = base.reward_names
    table = Table("rewards", *names, "worst of five", "Vendi score", "KL", title="gains since the base")
    five = [name for name in names if name != "VendiDiversity"]
    for variant, results in found.items():
        points = [_gains(base, each, names) for each in results]
        gains = {name: np.mean([point[name][0] for point in points]) for name in names}
        worst = np.nanmin([gains[name] for name in five])
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
    base = evaluate_with(args.output_dir / BASE, None, rewards("six"), scale)
    found: dict[str, list[EvaluationResults]] = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            folder = args.output_dir / variant / f"seed-{seed}"
            if not (folder / HISTORY).is_file():
                train(folder, variant, seed, scale, args.kl_target)
            found[variant].append(evaluate_with(folder / "evaluation", folder, rewards("six"), scale))
    Console(width=160).print(gains_table(base, {BASE: [base], **found}))


if __name__ == "__main__":
    main()
