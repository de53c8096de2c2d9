# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run at a glance, in the terminal."""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from ..evaluation import format_value
from ..evaluation.summary import SIGNIFICANT, WEIGHT, mean_with_error, summarize_progress
from .marble_callback import MarbleCallback


BLOCKS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 16
# Held-out cosines are noisy in each step, so they are averaged over this many of the latest rows of the log.
HELDOUT_WINDOW = 20

History = Sequence[Mapping[str, Any]]


class LiveTableCallback(MarbleCallback):
    """
    A live table in the terminal instead of progress bars and lines of numbers: each reward with its change and trend
    since the run began, its weight (and its progress, where weights follow it), its held-out cosine (averaged over the
    latest steps), what evaluations say of it, the worst in-sample cosine, and the time left.

    It takes the place of the progress bars, `transformers`' own included, and of the printed log; messages and
    warnings appear above it. Where the output is no terminal, it prints a line at each logging step and at each
    evaluation.

    Example:

    ```python
    callbacks = [LiveTableCallback()]  # an argument of the trainer
    ```

    Args:
        console ([`~rich.console.Console`], *optional*):
            Where to write. Defaults to the standard output.
    """

    replaces = (PrinterCallback, DEFAULT_PROGRESS_CALLBACK)

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live: Live | None = None
        self._names: list[str] = []
        self._held_out_names: list[str] = []

    @property
    def shows_bars(self) -> bool:
        """Whether the table is there to show progress in."""
        return self._live is not None

    def open(self, reward_names: Sequence[str], held_out_names: Sequence[str]) -> None:
        self._names, self._held_out_names = list(reward_names), list(held_out_names)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="dim"),
            console=self.console,
        )
        self._steps = self._progress.add_task("step", total=state.max_steps, completed=state.global_step, note="")
        out, err = sys.stdout, sys.stderr
        self._live = Live(self._picture(state.log_history), console=self.console, refresh_per_second=4)
        self._live.start()
        # The display stands in for both now. Log handlers still hold what was there when they were made.
        self._handlers = _redirect_handlers({out: sys.stdout, err: sys.stderr})

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self._first_step:  # an evaluation at the start is no part of the steps' time
            self._started = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._live is not None:
            note = f"{self._time_left(state)} left"
            self._progress.update(self._steps, completed=state.global_step, note=note)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self._live is not None:
            self._live.update(self._picture(state.log_history))
        elif state.is_world_process_zero and self._names:
            line = status_line(state.log_history, self._names, self._held_out_names)
            if line is not None:
                place = f"step {state.global_step}/{state.max_steps}"
                left = f" | {self._time_left(state)} left" if state.global_step > self._first_step else ""
                self.console.print(f"{place} | {line}{left}", soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            for handler, stream in self._handlers:
                handler.setStream(stream)
            self._live = None

    def bar(self, what: str, total: int) -> "_Bar":
        """A bar above the table for one part of a step, as a context manager."""
        return _Bar(self._progress, what, total)

    def _time_left(self, state: Any) -> str:
        done = state.global_step - self._first_step
        seconds = (time.monotonic() - self._started) / max(1, done) * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"

    def _picture(self, history: History) -> Group:
        return Group(self._progress, run_table(history, self._names, self._held_out_names))


class _Bar:
    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.progress, self.what, self.total = progress, what, total

    def __enter__(self) -> Self:
        self.task = self.progress.add_task(self.what, total=self.total, note="")
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.remove_task(self.task)

    def update(self, number: int = 1) -> None:
        self.progress.advance(self.task, number)


def run_table(history: History, names: Sequence[str], held_out_names: Sequence[str] = ()) -> Table:
    """
    The state of a run as a table.

    Args:
        history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`.
        names (`Sequence[str]`):
            The rewards that are trained on.
        held_out_names (`Sequence[str]`, *optional*):
            The rewards that are scored in evaluations only.

    Returns:
        `rich.table.Table`: One row per reward. Changes are since the first value; those of evaluations are coloured
        where they are at least two standard errors (over prompts). So are held-out cosines, which are means over the
        latest 20 rows of the log that have them.
    """
    table = Table(caption=_footer(history), caption_justify="left", expand=False)
    table.add_column("Reward", overflow="ellipsis", no_wrap=True)
    for header in ("Rollouts", "Change"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Trend", no_wrap=True, style="cyan")
    table.add_column("Weight", justify="right", no_wrap=True)
    measured = any(key.startswith("balance/heldout_cos/") for row in history for key in row)
    if measured:
        table.add_column("Held-out cos", justify="right", no_wrap=True)
    weights = _weights_prefix(history)
    if weights == WEIGHT:
        table.add_column("Progress", justify="right", no_wrap=True)
    evaluated = any(key.startswith("eval_rewards/") for row in history for key in row)
    if evaluated:
        for header in ("Evaluation", "Change"):
            table.add_column(header, justify="right", no_wrap=True)
    for name in (*names, *held_out_names):
        held_out = name in held_out_names
        series = _series(history, f"{'eval_' if held_out else ''}rewards/{name}/mean")
        cells: list[Any] = [Text(f"{name} (held out)" if held_out else name)]
        cells += ["", ""] if held_out else [_now(series), _change(series)]
        cells += [sparkline(series), _last(history, weights + name, ".2f")]
        if measured:
            cells.append(_heldout_cosine(history, name))
        if weights == WEIGHT:
            cells.append(_last(history, f"progress/{name}", "+.2f"))
        if evaluated:
            cells += [_now(_series(history, f"eval_rewards/{name}/mean")), _eval_change(history, name)]
        table.add_row(*cells)
    return table


def status_line(history: History, names: Sequence[str], held_out_names: Sequence[str] = ()) -> str | None:
    """The latest row of the log as one line; `None` where it is of neither a training step nor an evaluation."""
    row = history[-1]
    prefix = "" if "loss" in row else "eval_"
    parts = []
    for name in (*names, *held_out_names):
        key = f"{prefix}rewards/{name}/mean"
        if key in row:
            series = _series(history, key)
            # The row's own value, which may be NaN where the series ends with an older one.
            value = "-" if math.isnan(row[key]) else f"{format_value(row[key])} {_in_brackets(_change(series))}"
            parts.append(f"{name} {value}".strip())
    if not parts:
        return None
    if prefix:
        return " | ".join(["evaluation", *parts])
    prefix = _weights_prefix([row])
    weights = [f"{name} {row[prefix + name]:.2f}" for name in names if prefix + name in row]
    if weights:
        parts.append("weights " + ", ".join(weights))
    if math.isfinite(row.get("balance/cos_min", math.nan)):
        parts.append(f"worst cosine in-sample {row['balance/cos_min']:+.2f}{_worst_held_out(history, names)}")
    return " | ".join(parts)


def sparkline(values: Sequence[float], width: int = TREND_WIDTH) -> str:
    """
    A series as a line of blocks, the least value lowest and the largest highest.

    Args:
        values (`Sequence[float]`):
            Finite values. More than `width` are averaged, as many at a time as there is need.
        width (`int`, *optional*, defaults to `16`):
            The greatest number of characters.
    """
    if not values:
        return ""
    number = min(width, len(values))
    edges = [round(i * len(values) / number) for i in range(number + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)]
    low, spread = min(means), max(means) - min(means)
    if spread == 0:
        return BLOCKS[0] * number
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((mean - low) / spread * len(BLOCKS)))] for mean in means)


def _series(history: History, key: str) -> list[float]:
    return [row[key] for row in history if math.isfinite(row.get(key, math.nan))]


def _now(series: Sequence[float]) -> str:
    return format_value(series[-1]) if series else "-"


def _change(series: Sequence[float]) -> str:
    return format_value(series[-1] - series[0], sign=True) if len(series) > 1 else ""


def _in_brackets(text: str) -> str:
    return f"({text})" if text else ""


def _last(history: History, key: str, form: str) -> str:
    series = _series(history, key)
    return format(series[-1], form) if series else ""


def _heldout_cosine(history: History, name: str) -> Text:
    mean, error = mean_with_error(history, f"balance/heldout_cos/{name}", HELDOUT_WINDOW)
    if math.isnan(mean):
        return Text()
    ratio = mean / error if error > 0 else 0.0
    style = "green" if ratio >= SIGNIFICANT else "red" if ratio <= -SIGNIFICANT else ""
    return Text(f"{mean:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}"), style=style)


def _worst_held_out(history: History, names: Sequence[str]) -> str:
    """The lowest of the rewards' mean held-out cosines: the mean of each step's lowest would be that of its noise."""
    means = [mean_with_error(history, f"balance/heldout_cos/{name}", HELDOUT_WINDOW)[0] for name in names]
    measured = [mean for mean in means if not math.isnan(mean)]
    return f", held-out {min(measured):+.2f}" if measured else ""


def _weights_prefix(history: History) -> str:
    """Of the names under which the rewards' weights are logged."""
    return WEIGHT if summarize_progress(history) is not None else "balance/alpha/"


def _eval_change(history: History, name: str) -> Text:
    key = f"eval_rewards/{name}"
    measured = [row for row in history if math.isfinite(row.get(f"{key}/mean", math.nan))]
    means = [row[f"{key}/mean"] for row in measured]
    if len(means) < 2:
        return Text()
    error = math.hypot(*(measured[place].get(f"{key}/standard_error", math.nan) for place in (0, -1)))
    ratio = (means[-1] - means[0]) / error if error > 0 else 0.0
    style = "green" if ratio >= SIGNIFICANT else "red" if ratio <= -SIGNIFICANT else ""
    return Text(_change(means), style=style)


def _footer(history: History) -> str | None:
    parts = []
    if worst := _last(history, "balance/cos_min", "+.2f"):
        other = _last(history, "balance/weighted_sum/cos_min", "+.2f")
        parts.append(f"worst cosine in-sample {worst}" + (f" (weighted sum, not taken: {other})" if other else ""))
    if diversity := _series(history, "drift/diversity"):
        share = f" ({diversity[-1] / diversity[0] - 1:+.0%})" if diversity[0] > 0 and len(diversity) > 1 else ""
        parts.append(f"diversity {diversity[-1]:.3f}{share}")
    return " · ".join(parts) or None


def _redirect_handlers(streams: Mapping[Any, Any]) -> list[tuple[logging.StreamHandler, Any]]:
    """Let log handlers that write to a stream write to another; return them with what they wrote to."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    changed = []
    for logger in loggers:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                changed.append((handler, handler.stream))
                handler.setStream(streams[handler.stream])
    return changed
