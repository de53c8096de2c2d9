# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble compare`: what changed between evaluations of the same images, and gains of runs against KL."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from .errors import UsageError, usage_errors


HELP = "compare evaluations on the same prompts and seeds, or runs at equal KL"
VARIED = ("guidance_scale", "num_inference_steps")  # what people try several values of; the noise stays the same


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser(
        "compare",
        help=HELP,
        description="Compare evaluations (`trl-marble eval`) with the first one: same prompts, seeds and rewards. Or "
        "compare training runs: gains of their own evaluations against KL to the base model.",
        allow_abbrev=False,
    )
    command.add_argument(
        "evaluations",
        nargs="+",
        metavar="[name=]FOLDER",
        help="folders of evaluations, the baseline first, or output folders of training runs; without a name the "
        "folder's own name is used",
    )
    command.add_argument(
        "--output_dir",
        "--output-dir",
        help="where to write comparison.json, comparison.csv, contact_sheet.html and gain_against_kl.png; of runs "
        "gains.json and gain_against_kl.png",
    )
    command.add_argument(
        "--at_kl",
        "--at-kl",
        type=float,
        nargs="+",
        default=[],
        metavar="KL",
        help="quote the gains of runs where they are these KLs away from the base model",
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    if bad := [kl for kl in args.at_kl if not 0 <= kl < math.inf]:
        raise UsageError(f"`--at_kl` is {bad[0]:g}; a KL is a finite number, 0 or greater")
    folders = named_folders(args.evaluations)
    runs = [name for name, folder in folders.items() if is_run(folder)]
    if runs and len(runs) < len(folders):
        other = next(name for name in folders if name not in runs)
        raise UsageError(f"{runs[0]!r} is a training run and {other!r} is not; compare runs, or evaluations")
    if runs:
        return compare_runs(folders, args.output_dir, args.at_kl)
    if args.at_kl:
        raise UsageError("`--at_kl` needs training runs, whose evaluations lie along a curve; leave it out")
    return compare_results(folders, args.output_dir)


def compare_results(folders: dict[str, Path], output_dir: str | None) -> int:
    """Compare evaluations with the first of them."""
    from rich.console import Console

    from ..evaluation import EvaluationResults, compare_evaluations
    from ..evaluation.gain_plot import GAINS_FILE

    with usage_errors():
        results = {name: EvaluationResults.load(folder) for name, folder in folders.items()}
        comparison = compare_evaluations(results, output_dir, may_differ=VARIED)
    Console().print(comparison.to_table())
    Console().print(comparison.to_gains_table())
    for setting in VARIED:
        values = {name: found.settings[setting] for name, found in results.items()}
        if len(set(values.values())) > 1:
            print(f"`{setting}` differs: {', '.join(f'{value} in {name!r}' for name, value in values.items())}")
    if output_dir is not None:
        print(f"The images side by side: {Path(output_dir, 'contact_sheet.html').absolute()}")
        if Path(output_dir, GAINS_FILE).is_file():
            print(f"Gains against KL: {Path(output_dir, GAINS_FILE).absolute()}")
    return 0


def compare_runs(folders: dict[str, Path], output_dir: str | None, at_kl: list[float]) -> int:
    """Show the gains of runs against KL, from their logs."""
    from rich.console import Console

    from ..evaluation import gains_at_kl, gains_table, plot_gains, run_gains
    from ..evaluation.gain_plot import GAINS_FILE
    from ..evaluation.gains import read_history
    from ..evaluation.records import write_atomically
    from ..evaluation.results import to_json

    with usage_errors():
        curves = {name: run_gains(read_history(folder)) for name, folder in folders.items()}
        for name, points in curves.items():
            if not points:
                raise UsageError(
                    f"the run {name!r} has no gains: its log has no evaluation before the first step. Train with "
                    "`--eval_strategy steps --eval_on_start True`"
                )
        if output_dir is not None:
            content = {
                name: {
                    "evaluations": [point.numbers() for point in points],
                    "at_kl": [
                        {"kl": kl, "gains": None if (found := gains_at_kl(points, kl)) is None else found.numbers()}
                        for kl in at_kl
                    ],
                }
                for name, points in curves.items()
            }
            write_atomically(Path(output_dir, "gains.json"), to_json(content))
            plot_gains(curves, Path(output_dir, GAINS_FILE), at_kl)
    Console().print(gains_table(curves, at_kl))
    rewards = {
        name: list(dict.fromkeys(each for point in points for each in point.gains)) for name, points in curves.items()
    }
    if len({frozenset(names) for names in rewards.values()}) > 1:
        own = "; ".join(f"{', '.join(names)} in {name!r}" for name, names in rewards.items())
        print(f"The runs have different rewards ({own}): compare them reward by reward, not by the worst or the mean.")
    if output_dir is not None:
        print(f"Gains against KL: {Path(output_dir, GAINS_FILE).absolute()}")
    return 0


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, or one of its checkpoints."""
    return (folder / "trainer_state.json").is_file() or any(folder.glob("checkpoint-*/trainer_state.json"))


def named_folders(texts: list[str]) -> dict[str, Path]:
    """
    Names and folders of evaluations.

    Args:
        texts (`list[str]`):
            At least two, each `folder` or `name=folder`. A folder that exists is that folder, whatever is in its name.

    Returns:
        `dict[str, Path]`: The folders by name, in their order.

    Raises:
        [`UsageError`]: If there are fewer, a folder does not exist, or two have one name.
    """
    folders: dict[str, Path] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or Path(text).is_dir():
            name, path = "", text
        folder = Path(path)
        name = name or folder.absolute().name
        if not folder.is_dir():
            raise UsageError(f"there is no folder {path!r}")
        if name in folders:
            raise UsageError(f"two evaluations are named {name!r}; give them names: `a={folders[name]} b={path}`")
        folders[name] = folder
    if len(folders) < 2:
        raise UsageError("there is nothing to compare with; name two folders or more, the baseline first")
    return folders
