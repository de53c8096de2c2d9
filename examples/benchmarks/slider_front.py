# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "rich"]
# ///
"""One adapter for many balances: its front of two rewards, and that of a soup of specialists, at equal cost.

```bash
python examples/benchmarks/slider_front.py
```

The rewards are `centring` and `calm` of ShapeWorld, which conflict. `slider` trains both parts together, in mixtures
(`balance_slider=True`); `soup` trains one specialist for each reward, each with half of the passes. Both are then
mixed with five shares, and each mixture is scaled to the same KL to the base (0.04) on the images that are scored, of
held-out prompts. A front is measured by its area: what is below the points of gains in both rewards. The coefficient
of the KL and the learning rate are chosen with seed 0 on prompts of the train split, from the same three settings for
each; the rule: the largest area. Writes `report.md`, `front.json` and `front.png`.

Finished parts are not repeated, and interrupted ones continue from their last checkpoint. Runs with other `--methods`
or `--seeds` may share `OUTPUT_DIR` and be started at the same time. All adapters are on every linear layer of the
transformer.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.costs import estimate_passes
from evidence.other_rewards import evaluate_with, sizes_of
from evidence.parts import Merge, Part, train_part
from evidence.runs import LONG_RATE, MAIN, SEEDS, TUNING, TUNING_SEED, Scale
from evidence.statistics import mean_over_seeds
from evidence.tables import estimate_text, table
from evidence.worlds import SHAPEWORLD, WORLDS
from rich.console import Console
from rich.markdown import Markdown

from trl_marble.evaluation import EvaluationResults, gains_in_deviations
from trl_marble.evaluation.figures import FAINT, new_figure, save_figure
from trl_marble.evaluation.plots import PALETTE
from trl_marble.evaluation.records import write_atomically


REWARDS = ("centring", "calm")
METHODS = ("slider", "soup")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second reward
STEPS, KL = 80, 0.04
SETTINGS = ((0.05, LONG_RATE), (0.2, LONG_RATE), (0.2, 2 * LONG_RATE))  # beta, learning rate
LABELS = {"slider": "one adapter, many balances", "soup": "soup of specialists"}
SCALE = Scale(steps=STEPS, images=24, tuning_images=8, long=True)
QUICK = Scale(steps=4, images=2, tuning_images=2, long=True, quick=True)
TEXT = (
    f"Gains in standard deviations of the untrained pipeline's images, at a KL of {KL:g}, mean over seeds ± standard "
    f"error over seeds. Share: of `{REWARDS[1]}`; the other reward has the rest. Area: of all that is below the "
    "points of a front in both gains.\n"
)
SUM = {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"}


def parts_of(method: str, settings: Mapping[str, Any], steps: int) -> list[Part]:
    """The trainings of a method; those of the soup cost together what the slider costs."""
    if method == "slider":
        return [Part("slider", steps, {**settings, "balance_slider": True}, REWARDS)]
    whole, one = (estimate_passes(settings, number) for number in (len(REWARDS), 1))
    own = max(1, round(steps * whole / one / len(REWARDS)))
    return [Part(name, own, settings, (name,), number=place) for place, name in enumerate(REWARDS)]


def train(folder: Path, phase: str, method: str, beta: float, rate: float, seed: int, scale: Scale) -> None:
    """Train the adapters of a method, and write the five mixtures at the same KL."""
    world = WORLDS[SHAPEWORLD]
    settings = {**sizes_of(scale), **SUM, "beta": beta}
    run = {"learning_rate": rate, "seed": seed, "use_cpu": True, "save_steps": 10, "save_total_limit": 1}
    run |= {"report_to": "none", "log_images": False, "disable_tqdm": True}
    for part in parts_of(method, settings, scale.steps):
        own = {**run, "data_seed": seed + 100 * part.number}
        train_part(part, folder, world, own, [], change=lambda trainer: None, card_name=None, every_layer=True)
    where = "slider/adapters/{}.safetensors" if method == "slider" else "{}"
    for share in SHARES:
        weights = dict(zip((where.format(name) for name in REWARDS), (1 - share, share), strict=True))
        mixture = Merge(f"mixture-{share:g}", {name: weight for name, weight in weights.items() if weight})
        mixture.write(folder)
        scale.rescaling(f"at-{share:g}", mixture.name, KL, phase).write(folder, world)


def evaluate(folder: Path, adapter: Path | None, phase: str, scale: Scale) -> EvaluationResults:
    """Score an adapter, or the base, with both rewards."""
    by_name = WORLDS[SHAPEWORLD].rewards_by_name()
    return evaluate_with(folder, adapter, [by_name[name] for name in REWARDS], scale, phase)


def front_area(points: Sequence[Sequence[float]]) -> float:
    """
    The area of all that is at least 0 and at most one of the points in both coordinates: a front's hypervolume.

    Args:
        points (`Sequence[Sequence[float]]`):
            Gains `(x, y)`; what is below 0 counts as 0.
    """
    area, height = 0.0, 0.0
    for x, y in sorted(points, reverse=True):  # from the right: each adds what is higher than all before
        area += max(x, 0.0) * max(y - height, 0.0)
        height = max(height, y)
    return area


def measure(folder: Path, base: EvaluationResults, phase: str, scale: Scale) -> list[dict[str, float]]:
    """Gains of the five mixtures in standard deviations of the base's images, and their KL."""
    points = []
    before = {name: base.table[name].to_numpy() for name in REWARDS}
    for share in SHARES:
        results = evaluate(folder / f"evaluation-{share:g}", folder / f"at-{share:g}", phase, scale)
        gains, _, _ = gains_in_deviations(before, {n: results.table[n].to_numpy() for n in REWARDS}, base.groups)
        kl = results.kl_to_base()
        assert kl is not None  # the adapter is beside the base
        points.append({"share": share, **{name: gain for name, (gain, _) in gains.items()}, "kl": kl[0]})
    return points


def area_of(points: Sequence[Mapping[str, float]]) -> float:
    """The area of a run's front."""
    return front_area([[point[name] for name in REWARDS] for point in points])


def run(
    output_dir: Path, phase: str, method: str, beta: float, rate: float, seed: int, scale: Scale
) -> list[dict[str, float]]:
    """Train and measure, or read what is finished."""
    folder = output_dir / phase / method / f"beta-{beta:g}-lr-{rate:g}" / f"seed-{seed}"
    file = folder / "points.json"
    if not file.is_file():
        base = evaluate(output_dir / phase / "base", None, phase, scale)
        train(folder, phase, method, beta, rate, seed, scale)
        write_atomically(file, json.dumps(measure(folder, base, phase, scale)).encode())
    return json.loads(file.read_text())


def plot(fronts: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path) -> None:
    """The fronts of all seeds, thin, and their mean."""
    figure = new_figure(6.4, 4.8)
    axes = figure.subplots()
    for place, (method, seeds) in enumerate(fronts.items()):
        points = np.array(
            [[[point[name] for name in REWARDS] for point in own] for own in seeds]
        )  # [seeds, shares, 2]
        for own in points:
            axes.plot(own[:, 0], own[:, 1], color=PALETTE[place], linewidth=0.7, alpha=0.4)
        mean = points.mean(axis=0)
        axes.plot(mean[:, 0], mean[:, 1], "o-", color=PALETTE[place], label=LABELS[method])
        for share, (x, y) in zip(SHARES, mean, strict=True):
            axes.annotate(f"{share:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7, color=FAINT)
    axes.set_xlabel(f"gain of {REWARDS[0]}", color=FAINT, fontsize=9)
    axes.set_ylabel(f"gain of {REWARDS[1]}", color=FAINT, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def report(fronts: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], settings: Sequence[Sequence[str]]) -> str:
    """
    Tables in Markdown.

    Args:
        fronts (`Mapping[str, Sequence[Sequence[Mapping[str, float]]]]`):
            Method -> the points of each seed, see [`measure`].
        settings (`Sequence[Sequence[str]]`):
            Rows of what was tried on prompts of the train split.
    """
    rows = []
    areas = {method: [area_of(own) for own in seeds] for method, seeds in fronts.items()}
    for method, seeds in fronts.items():
        for place, share in enumerate(SHARES):
            values = [mean_over_seeds([own[place][name] for own in seeds]) for name in (*REWARDS, "kl")]
            cells = [estimate_text(value, digits=digits) for value, digits in zip(values, (2, 2, 3), strict=True)]
            rows.append([LABELS[method], f"{share:g}", *cells])
    parts = ["# One adapter for many balances, and a soup\n", TEXT, table(["", "share", *REWARDS, "KL"], rows)]
    rows = [[LABELS[method], estimate_text(mean_over_seeds(own), digits=3)] for method, own in areas.items()]
    if len(areas) == len(METHODS):
        first, second = (areas[method] for method in METHODS)  # also if they were asked for in another order
        difference = mean_over_seeds([own - other for own, other in zip(first, second, strict=True)])
        rows.append(["difference, same seed", estimate_text(difference, digits=3)])
    parts += ["## Areas of the fronts\n", table(["", "area"], rows)]
    header = ["", "beta", "learning rate", "area", ""]
    return "\n".join(
        [*parts, f"## Settings: seed {TUNING_SEED}, prompts of the train split\n", table(header, settings)]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/slider_front"), help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one setting, tiny steps: tests only the code")
    args = parser.parse_args(arguments)
    scale = QUICK if args.quick else SCALE
    settings: list[list[str]] = []
    fronts = {}
    for method in args.methods:
        areas = {}
        for beta, rate in SETTINGS[:1] if args.quick else SETTINGS:
            areas[beta, rate] = area_of(run(args.output_dir, TUNING, method, beta, rate, TUNING_SEED, scale))
        beta, rate = max(areas, key=areas.__getitem__)
        for own, area in areas.items():
            mark = "chosen" if own == (beta, rate) else ""
            settings.append([LABELS[method], *(f"{value:g}" for value in own), f"{area:.3f}", mark])
        fronts[method] = [run(args.output_dir, MAIN, method, beta, rate, seed, scale) for seed in args.seeds]
    text = report(fronts, settings)
    write_atomically(args.output_dir / "report.md", text.encode())
    write_atomically(args.output_dir / "front.json", json.dumps(fronts, indent=2).encode())
    plot(fronts, args.output_dir / "front.png")
    Console(width=140).print(Markdown(text))


if __name__ == "__main__":
    main()
