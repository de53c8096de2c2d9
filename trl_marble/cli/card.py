# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble card`: render the model card of a run again, with evaluations."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from .errors import usage_errors


HELP = "put evaluations into the model card of a trained adapter"


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser(
        "card",
        help=HELP,
        description="Render the model card of a trained adapter again, with the results of `trl-marble eval`.",
        allow_abbrev=False,
    )
    command.add_argument("folder", metavar="FOLDER", help="the output folder of the training")
    command.add_argument(
        "--before", metavar="DIR", help="evaluation of the pipeline without the adapter, on the same prompts and seeds"
    )
    command.add_argument("--after", required=True, metavar="DIR", help="evaluation with the adapter")
    command.add_argument(
        "--base_model", "--base-model", metavar="ID", help="Hub id of the pipeline, if the card does not have it"
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    from ..evaluation import EvaluationResults
    from ..hub import card_from_evaluations

    with usage_errors():
        folders = {"before": args.before, "after": args.after}
        evaluations = {name: EvaluationResults.load(folder) for name, folder in folders.items() if folder is not None}
        card_from_evaluations(args.folder, evaluations, args.base_model)
    print(f"The card is {Path(args.folder, 'README.md').absolute()}")
    return 0
