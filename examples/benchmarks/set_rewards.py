# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""Diversity as a reward on ShapeWorld: what happens to it, and at what price for the five rewards.

```bash
python examples/benchmarks/set_rewards.py
```

Trains with the five rewards of ShapeWorld (`five`), with the Vendi diversity of a prompt's images as a sixth (`six`),
and with diversity alone (`diversity`), each with three seeds and the KL to the base held at the same value
(`kl_target`), and scores all on held-out prompts, with the adapters scaled to the same KL of the scored images. Writes
`report.md`. Finished runs are not repeated, and interrupted ones continue from their last checkpoint. Runs with other
`--variants` or `--seeds` may share `OUTPUT_DIR` and be started at the same time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.other_rewards import HISTORY, evaluate_with, scale_to_final_kl, sizes_of, train_with
from evidence.runs import LONG, QUICK_LONG, SEEDS, Scale
from evidence.statistics import mean_over_seeds
from evidence.tables import ABSENT, estimate_text, table
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from trl_marble.evaluation import EvaluationResults, gains_in_deviations
from trl_marble.evaluation.records import write_atomically
from trl_marble.rewards import VendiDiversity
from trl_marble.rollout.diversity import thumbnails
from trl_marble.shapeworld import reward_funcs


BASE, VARIANTS = "base", ("five", "six", "diversity")
DIVERSITY = "VendiDiversity"
LABELS = {
    BASE: "nothing",
    "five": "five rewards",
    "six": "five rewards and diversity",
    "diversity": "diversity alone",
}
TEXT = (
    "Gains in standard deviations of the untrained pipeline's images, mean over seeds ± standard error over seeds, on "
    "held-out prompts at equal KL. Vendi score: the effective number of different images of a prompt, of 24."
)


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


def report(base: EvaluationResults, found: dict[str, list[EvaluationResults]]) -> str:
    """
    Gains in standard deviations of the base's images, the Vendi score and the KL, as a table in Markdown.

    Args:
        base (`EvaluationResults`):
            Of the untrained pipeline.
        found (`dict[str, list[EvaluationResults]]`):
            Variant -> the results of each seed.
    """
    five = [name for name in base.reward_names if name != DIVERSITY]
    rows = [[LABELS[BASE], ABSENT, *("0" for _ in five), "0", "0", f"{base.table[DIVERSITY].mean():.3f}", "0"]]
    for variant, results in found.items():
        points = [{name: gain for name, (gain, _) in _gains(base, each, five).items()} for each in results]
        kl = [each.kl_to_base() for each in results]
        columns = [
            *([point[name] for point in points] for name in five),
            [min(point.values()) for point in points],
            [float(np.mean([*point.values()])) for point in points],
        ]
        cells = [estimate_text(mean_over_seeds(column), digits=2) for column in columns]
        cells.append(estimate_text(mean_over_seeds([each.table[DIVERSITY].mean() for each in results]), digits=3))
        cells.append(estimate_text(mean_over_seeds([each[0] for each in kl if each is not None]), digits=3))
        rows.append([LABELS[variant], str(len(results)), *cells])
    header = ["trained on", "seeds", *five, "worst of five", "mean of five", "Vendi score", "KL"]
    return f"# Diversity as a reward\n\n{TEXT}\n\n{table(header, rows)}"


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
            scaled = scale_to_final_kl(folder, scale)
            found[variant].append(evaluate_with(scaled / "evaluation", scaled, rewards("six"), scale))
    text = report(base, found)
    write_atomically(args.output_dir / "report.md", text.encode())
    Console(width=200).print(Markdown(text))


if __name__ == "__main__":
    main()
