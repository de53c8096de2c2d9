# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""An adversarial reward on ShapeWorld: does it keep pictures clean while five rewards rise?

```bash
python examples/benchmarks/adversarial_reward.py
```

Trains with the five rewards of ShapeWorld (`five`), and with an adversarial reward as a sixth whose reference are
drawn pictures (`six`), each with three seeds and the KL to the base held at the same value (`kl_target`). All are
scored on held-out prompts, with the adapters scaled to the same KL of the scored images: with the five rewards; with
distances to other drawn pictures, by features that the adversarial reward sees (`layout`) and by some that it does not
(`texture`); and with the accuracy of a network that learns afterwards to tell the images from drawn pictures, where
50 % would be pictures that nobody can tell. Writes `report.md`. Finished runs are not repeated, and interrupted ones
continue from their last checkpoint. Runs with other `--variants` or `--seeds` may share `OUTPUT_DIR` and be started at
the same time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from evidence.other_rewards import HISTORY, evaluate_with, scale_to_final_kl, train_with
from evidence.runs import LONG, QUICK_LONG, SEEDS, Scale
from evidence.statistics import mean_over_seeds
from evidence.tables import ABSENT, estimate_text, table
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from trl_marble.evaluation import EvaluationResults, gains_in_deviations
from trl_marble.evaluation.records import write_atomically
from trl_marble.rewards import AdversarialReward, MMDReward
from trl_marble.rollout.diversity import thumbnails
from trl_marble.shapeworld import generate, reward_funcs


BASE, VARIANTS = "base", ("five", "six")
LABELS = {BASE: "nothing", "five": "five rewards", "six": "five rewards and the adversarial one"}
TEXT = (
    "Gains in standard deviations of the untrained pipeline's images, mean over seeds ± standard error over seeds, on "
    "held-out prompts at equal KL. Distances: squared MMD to drawn pictures that nothing was trained on. Told apart: "
    "the accuracy of a network that learns afterwards to tell the images from drawn pictures."
)
DRAWN, UNSEEN = 512, 256  # pictures that the reward learns from, and others for the distances


def layout(images: list[Image.Image]) -> Tensor:
    """16 x 16 pixels: what is where, and in what colour."""
    return thumbnails(images) - 0.5


def texture(images: list[Image.Image]) -> Tensor:
    """How rough each of 8 x 8 parts is: the mean difference of neighbouring pixels, which layout does not show."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).float() / 255
    across, down = pixels.diff(dim=2).abs().mean(dim=3), pixels.diff(dim=1).abs().mean(dim=3)
    parts = [torch.nn.functional.adaptive_avg_pool2d(each[:, None], 8).flatten(1) for each in (across, down)]
    return torch.cat(parts, dim=1)


def layout_and_texture(images: list[Image.Image]) -> Tensor:
    """What a network sees that tells images from drawn pictures after the training."""
    return torch.cat([layout(images), texture(images)], dim=1)


def drawn(number: int, seed: int) -> list[Image.Image]:
    return [picture for _, picture in generate(number, seed)]


def measures(scale: Scale) -> list:
    """The five rewards, and minus the distances to drawn pictures that nothing was trained on."""
    unseen = drawn(16 if scale.quick else UNSEEN, seed=1)
    distances = [MMDReward(unseen, extractor) for extractor in (layout, texture)]
    for distance, name in zip(distances, ("layout", "texture"), strict=True):
        distance.__name__ = name
    return [*reward_funcs(), *distances]


def train(folder: Path, variant: str, seed: int, scale: Scale, kl_target: float) -> None:
    """Train one adapter, and save it in the folder."""
    rewards = [*reward_funcs()]
    if variant == "six":
        rewards.append(AdversarialReward(drawn(16 if scale.quick else DRAWN, seed=0), layout, seed=seed))
    train_with(folder, rewards, {"beta": 0.5, "kl_target": kl_target, "balance_every": 1}, seed, scale)


def told_apart(results: EvaluationResults, scale: Scale) -> float:
    """How many held-out images, and drawn pictures, a network tells that has learned from the others."""
    images = [Image.open(results.folder / path).convert("RGB") for path in results.table["image"]]
    number = len(images) // 2
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    pictures = drawn(2 * number, seed=2)
    network = AdversarialReward(pictures[:number], layout_and_texture)
    features = layout_and_texture([images[place] for place in order[:number]])
    for _ in range(2 if scale.quick else 100):
        network.update(features=features, rewards={}, trainer_state=None)
    fake = network.score(layout_and_texture([images[place] for place in order[number : 2 * number]]))
    real = network.score(layout_and_texture(pictures[number:]))
    return ((fake < 0).float().mean() + (real > 0).float().mean()).item() / 2


def summarize(base: EvaluationResults, results: EvaluationResults, scale: Scale) -> dict[str, float]:
    """Gains in standard deviations of the base's images, and what shows how clean the images are."""
    five = [name for name in base.reward_names if name not in ("layout", "texture")]
    after = results.table
    before_and_after = [{name: of.table[name].to_numpy() for name in five} for of in (base, results)]
    gains, (worst, _), (mean, _) = gains_in_deviations(*before_and_after, base.groups)
    distances = {f"distance {name}": -after[name].mean() for name in ("layout", "texture")}
    return {
        **{f"gain {name}": gain for name, (gain, _) in gains.items()},
        "worst gain": worst,
        "mean gain": mean,
        **distances,
        "told apart": told_apart(results, scale),
        "KL": 0.0 if results is base else after["kl"].mean(),
    }


def report(found: dict[str, list[dict[str, float]]]) -> str:
    """A table in Markdown of what [`summarize`] has for each seed of each variant."""
    header = ["trained on", "seeds", *found[BASE][0]]
    rows = []
    for variant, seeds in found.items():
        if seeds:
            values = [mean_over_seeds([row[name] for row in seeds]) for name in found[BASE][0]]
            cells = [
                estimate_text(value, digits=3 if name.startswith(("distance", "KL")) else 2)
                for name, value in zip(found[BASE][0], values, strict=True)
            ]
            rows.append([LABELS[variant], ABSENT if variant == BASE else str(len(seeds)), *cells])
    return f"# An adversarial reward\n\n{TEXT}\n\n{table(header, rows)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/adversarial_reward"), help="default: %(default)s"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--kl_target", type=float, default=0.06, help="KL to the base; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two small steps: tests only the code")
    args = parser.parse_args(arguments)
    scale = QUICK_LONG if args.quick else LONG
    base = evaluate_with(args.output_dir / BASE, None, measures(scale), scale)
    found = {BASE: [summarize(base, base, scale)], **{variant: [] for variant in args.variants}}
    for seed in args.seeds:
        for variant in args.variants:
            folder = args.output_dir / variant / f"seed-{seed}"
            if not (folder / HISTORY).is_file():
                train(folder, variant, seed, scale, args.kl_target)
            scaled = scale_to_final_kl(folder, scale)
            results = evaluate_with(scaled / "evaluation", scaled, measures(scale), scale)
            found[variant].append(summarize(base, results, scale))
    text = report(found)
    write_atomically(args.output_dir / "report.md", text.encode())
    Console(width=200).print(Markdown(text))


if __name__ == "__main__":
    main()
