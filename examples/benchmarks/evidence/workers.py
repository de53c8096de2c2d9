# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Execute several runs at the same time, each in a process with one thread."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .runs import LOG_FILE, PROGRESS_FILE, Run, execute


# Set before a process imports anything that reads them. A step of this size gains little from a second thread, but two
# parallel runs use both cores.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
REFRESH_SECONDS = 1.0


def execute_all(runs: Sequence[Run], output_dir: Path, jobs: int, console: Console) -> dict[Run, str]:
    """
    Execute runs in parallel and show their progress. A failing run does not stop the others.

    Args:
        runs (`Sequence[Run]`):
            The runs, in the order in which they start.
        output_dir (`Path`):
            The folder with the runs' folders.
        jobs (`int`):
            Number of processes, at least 1.
        console (`rich.console.Console`):
            Shows the progress.

    Returns:
        `dict[Run, str]`: the runs that failed, with the last line of their error.
    """
    os.environ.update(ONE_THREAD, TQDM_DISABLE="1")
    failed: dict[Run, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(min(jobs, len(runs)) or 1, context, _end_at_interrupt) as pool,
    ):
        overall = progress.add_task("runs", total=len(runs))
        pending: dict[Future[str | None], Run] = {pool.submit(_execute_logged, run, output_dir): run for run in runs}
        bars: dict[Run, TaskID] = {}
        try:
            while pending:
                finished, _ = wait(pending, REFRESH_SECONDS, FIRST_COMPLETED)
                for future in finished:
                    run = pending.pop(future)
                    error = _error_of(future)
                    if error is not None:
                        failed[run] = error
                        progress.console.print(f"[red]failed[/red] {run.name}: {error}", highlight=False)
                    if run in bars:
                        progress.remove_task(bars.pop(run))
                    progress.advance(overall)
                for future, run in pending.items():
                    if future.running() and _steps_done(output_dir / run.name) is not None:
                        if run not in bars:
                            bars[run] = progress.add_task(run.name, total=run.steps)
                        progress.update(bars[run], completed=_steps_done(output_dir / run.name))
        except BaseException:  # such as Ctrl-C, which ends the processes too
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


def run_missing(
    title: str, runs: Sequence[Run], output_dir: Path, jobs: int, console: Console, dry_run: bool = False
) -> None:
    """
    Execute those of some runs that are not finished.

    Args:
        title (`str`):
            What they are, to be printed.
        runs (`Sequence[Run]`):
            All of them.
        output_dir (`Path`):
            The folder with the runs' folders.
        jobs (`int`):
            Number of processes, at least 1.
        console (`rich.console.Console`):
            Shows the progress.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to print the names of those that are missing, and execute nothing.

    Raises:
        `SystemExit`: If a run failed; all others are finished.
    """
    missing = [run for run in runs if not run.is_finished(output_dir)]
    console.print(f"[bold]{title}[/bold]: {len(runs) - len(missing)} of {len(runs)} runs are finished")
    if dry_run:
        console.print(*(f"  {run.name}" for run in missing), sep="\n", highlight=False)
    elif missing and (failed := execute_all(missing, output_dir, jobs, console)):
        logs = "\n".join(f"  {output_dir / run.name / LOG_FILE}" for run in failed)
        raise SystemExit(f"{len(failed)} runs failed; their logs:\n{logs}\nRun the same command again to go on.")


def _end_at_interrupt() -> None:
    # Ends at once: after an exception a process would begin the next run. Little is lost, see `execute`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _error_of(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return "its process, or one beside it, was ended from outside, perhaps for want of memory"


def _steps_done(folder: Path) -> int | None:
    file = folder / PROGRESS_FILE
    return int(file.read_text()) if file.is_file() else None


def _execute_logged(run: Run, output_dir: Path) -> str | None:
    """Execute a run in a process of the pool, with all output in its log; returns the last line of an error."""
    folder = output_dir / run.name
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(folder / LOG_FILE, "a") as log:
        # Libraries keep the streams that they found, so the file descriptors are replaced.
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        try:
            execute(run, output_dir)
        except Exception as error:
            traceback.print_exc()
            return traceback.format_exception_only(error)[-1].strip()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
    return None
