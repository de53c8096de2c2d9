# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble compare`: what changed between evaluations on the same prompts and seeds."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from .errors import UsageError, usage_errors


HELP = "compare evaluations on the same prompts and seeds"
VARIED = ("guidance_scale", "num_inference_steps")  # what people try several values of; the noise stays the same


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser(
        "compare",
        help=HELP,
        description="Compare evaluations (`trl-marble eval`) with the first one: same prompts, seeds and rewards.",
        allow_abbrev=False,
    )
    command.add_argument(
        "evaluations",
        nargs="+",
        metavar="[name=]FOLDER",
        help="folders of evaluations, the baseline first; without a name the folder's own name is used",
    )
    command.add_argument(
        "--output_dir", "--output-dir", help="where to write comparison.json, comparison.csv and contact_sheet.html"
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    from rich.console import Console

    from ..evaluation import EvaluationResults, compare_evaluations

    folders = named_folders(args.evaluations)
    with usage_errors():
        results = {name: EvaluationResults.load(folder) for name, folder in folders.items()}
        comparison = compare_evaluations(results, args.output_dir, may_differ=VARIED)
    Console().print(comparison.to_table())
    for setting in VARIED:
        values = {name: found.settings[setting] for name, found in results.items()}
        if len(set(values.values())) > 1:
            print(f"`{setting}` differs: {', '.join(f'{value} in {name!r}' for name, value in values.items())}")
    if args.output_dir is not None:
        print(f"The images side by side: {Path(args.output_dir, 'contact_sheet.html').absolute()}")
    return 0


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
