# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble selftest`: whether training works on this machine, within some minutes."""

import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .env import environment
from .errors import RUN_ERROR, UsageError, usage_errors


HELP = "check in a few minutes whether training works on this machine"
VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARE = 0.95  # of the time that is given


def register(subparsers: Any, whole: bool = False) -> None:
    command = subparsers.add_parser("selftest", help=HELP, description=__doc__, allow_abbrev=False)
    command.add_argument(
        "--model", metavar="ID", help="a Hub id or a local folder; default: the small pipeline of this package"
    )
    command.add_argument("--minutes", type=float, default=3.0, help="when to end; default: %(default)s")
    command.add_argument(
        "--output", metavar="FILE", default="selftest.json", help="the report, for an issue; default: %(default)s"
    )
    command.set_defaults(run=run)


def run(args: Namespace) -> int:
    start = time.monotonic()
    if not 0 < args.minutes < float("inf"):
        raise UsageError(f"`--minutes` is {args.minutes:g}; give a number above 0")
    output = Path(args.output)
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise UsageError(f"`--output {args.output}` is no file in a folder that exists; name one")
    num_gpus, visible = choose_one_gpu()
    # The rest is for what comes before and after the checks.
    verdicts = _check(args.model, start + SHARE * 60 * args.minutes, num_gpus, visible)

    from ..evaluation.results import to_json
    from ..selftest.report import as_json

    model = "shapeworld" if args.model is None else "a local folder" if Path(args.model).exists() else args.model
    report = as_json(verdicts, model, num_gpus, args.minutes, time.monotonic() - start, environment())
    output.write_bytes(to_json(report))
    print(f"The report, with versions and hardware, is in {args.output}; attach it to an issue.")
    return RUN_ERROR if any(verdict.verdict == "fail" for verdict in verdicts) else 0


def choose_one_gpu() -> tuple[int, str | None]:
    """
    Let this process see one GPU only, as a trainer wants it.

    Returns:
        `tuple[int, str | None]`: How many GPUs there are, and what the environment said of them before.
    """
    import torch

    number, before = torch.cuda.device_count(), os.environ.get(VISIBLE)  # counting does not open them
    if number > 1:
        os.environ[VISIBLE] = (before or "0").split(",")[0]
    return number, before


def _check(model: str | None, deadline: float, num_gpus: int, visible: str | None) -> list[Any]:
    """Load the model, and run all checks with a line for each."""
    import torch
    from rich.console import Console

    from ..pipelines import find_family
    from ..selftest.report import as_line
    from ..selftest.runner import all_checks, run_checks
    from ..selftest.subject import Subject

    subject = Subject(model, bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    console = Console(highlight=False)

    def show(verdict: Any) -> None:
        console.print(as_line(verdict), soft_wrap=True)

    with quiet():
        with usage_errors(), subject.pipeline() as pipeline:  # a model that there is not is no fault of the machine
            family = find_family(pipeline)
        if family is not None and family.takes_image == "required":
            raise UsageError(f"`--model {model}` edits images; give a model that makes them from text alone")
        return run_checks(all_checks(num_gpus, visible), subject, deadline, show)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and progress bars of what is checked: its verdict says what is wrong."""
    import logging
    import warnings

    from diffusers.utils.logging import disable_progress_bar, enable_progress_bar

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        enable_progress_bar()
        logging.disable(before)
