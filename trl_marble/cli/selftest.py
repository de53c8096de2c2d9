# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble selftest`: whether training works on this machine, within some minutes."""

import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .env import environment
from .errors import RUN_ERROR, UsageError, usage_errors


HELP = "check in a few minutes whether training works on this machine"
VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARE = 0.95  # of the time that is given
LEAST = 1e-3  # seconds


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

    from ..evaluation.results import to_json
    from ..selftest.report import as_json

    model = "shapeworld" if args.model is None else "a local folder" if Path(args.model).exists() else args.model
    about = environment()

    def write(verdicts: list[Any]) -> None:
        report = as_json(verdicts, model, num_gpus, args.minutes, time.monotonic() - start, about)
        output.write_bytes(to_json(report))

    # The rest is for what comes before and after the checks.
    verdicts = _check(args.model, start + SHARE * 60 * args.minutes, num_gpus, visible, write)
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


def _check(
    model: str | None, deadline: float, num_gpus: int, visible: str | None, write: Callable[[list[Any]], None]
) -> list[Any]:
    """Load the model, and run all checks with a line for each; after each, all verdicts so far are written."""
    import torch
    from rich.console import Console

    from ..pipelines import find_family
    from ..selftest.report import as_line
    from ..selftest.runner import OutOfTime, all_checks, limited, run_checks
    from ..selftest.subject import Subject

    subject = Subject(model, bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    console = Console(highlight=False)

    verdicts: list[Any] = []

    def show(verdict: Any) -> None:
        console.print(as_line(verdict), soft_wrap=True)
        verdicts.append(verdict)
        write(verdicts)  # so that an interruption loses nothing

    with quiet(), console.status("loading the model") as status:
        try:
            # A model that there is not is no fault of the machine.
            with limited(max(deadline - time.monotonic(), LEAST)), usage_errors(), subject.pipeline() as pipeline:
                family = find_family(pipeline)
        except OutOfTime:
            raise UsageError("the model was not loaded when the minutes were over; give it more --minutes") from None
        if family is not None and family.takes_image == "required":
            raise UsageError(f"`--model {model}` edits images; give a model that makes them from text alone")
        return run_checks(all_checks(num_gpus, visible), subject, deadline, show, status.update)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and progress bars of what is checked: its verdict says what is wrong."""
    import logging
    import warnings

    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    bars = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    for each in bars:
        each.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each in bars:
            each.enable_progress_bar()
        logging.disable(before)
