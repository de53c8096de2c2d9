# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A page of all images with their scores, for a browser and without a server."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

from .comparison import EvaluationComparison
from .formatting import format_p_value, format_percentage, format_value, format_with_error
from .records import write_atomically
from .results import EvaluationResults
from .summary import SIGNIFICANT


TEMPLATE_FOLDER = Path(__file__).parent
TEMPLATE = "contact_sheet.html"

# Images with fewer pixels per side are enlarged pixel by pixel.
SMALL = 128


def write_contact_sheet(
    evaluations: Mapping[str, EvaluationResults],
    path: str | os.PathLike,
    comparison: EvaluationComparison | None = None,
) -> Path:
    """
    Write a page with the images of one evaluation, or of several side by side.

    The page is one file that links to the images by relative paths. It needs no server and no network. Prompts and
    names are escaped.

    Args:
        evaluations (`Mapping[str, EvaluationResults]`):
            The evaluations by name, of the same prompts and seeds.
        path (`str` or `os.PathLike`):
            The file of the page.
        comparison ([`EvaluationComparison`], *optional*):
            The comparison of these evaluations; needed for more than one.

    Returns:
        `Path`: the page.
    """
    path = Path(path)
    first = next(iter(evaluations.values()))
    columns = [column for column in ("source", "tag") if column in first.table]
    with Image.open(first.folder / first.table["image"].iloc[0], formats=["PNG", "WEBP"]) as image:
        size = image.size
    view = {
        "title": " / ".join(evaluations),
        "names": list(evaluations),
        "orders": list(evaluations) if comparison is None else list(comparison.changes),
        "significant": f"{SIGNIFICANT:g}",
        "rewards": first.reward_names,
        "size": size,
        "pixelated": max(size) < SMALL,
        "num_images": len(first.table),
        "num_prompts": first.settings["num_prompts"],
        "choices": {column: list(dict.fromkeys(first.table[column].dropna())) for column in columns},
        "settings": {name: results.settings for name, results in evaluations.items()},
        "prompts": _prompts(evaluations, path.parent),
    }
    if comparison is None:
        view |= {
            "summary": _summary(first),
            "failed": {name: number for name, number in first.failed.items() if number},
            "breakdowns": [_breakdown(column, None, first.averages(column), False) for column in columns],
        }
    else:
        view |= {
            "compared": _compared(comparison),
            "breakdowns": [
                _breakdown(column, name, part, True)
                for column in columns
                for name, part in comparison.averages(column).groupby("evaluation", sort=False)
            ],
        }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(view | {"is_comparison": comparison is not None})
    # A prompt may contain half of a surrogate pair, which no encoding of a page has.
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def _summary(results: EvaluationResults) -> list[dict[str, Any]]:
    rows = [
        {"name": name, "value": format_with_error(value), "images": int(results.table[name].notna().sum())}
        for name, value in results.summary().items()
    ]
    return [
        *rows,
        {"name": "diversity", "value": format_with_error(results.diversity()), "images": len(results.table)},
    ]


def _compared(comparison: EvaluationComparison) -> dict[str, Any]:
    """The table of a comparison: each row has a cell for the baseline and several for every other evaluation."""
    summaries = {name: results.summary() for name, results in comparison.evaluations.items()}
    rewards = []
    for reward in comparison.reward_names:
        cells = []
        for name, changes in comparison.changes.items():
            wins = comparison.win_rates[name][reward]
            cells.append(
                {
                    "value": format_value(summaries[name][reward][0]),
                    "change": _change(changes[reward]),
                    "win_rate": format_percentage(wins.win_rate),
                    "p_value": format_p_value(wins.p_value),
                }
            )
        rewards.append(
            {"name": reward, "base": format_with_error(summaries[comparison.baseline][reward]), "cells": cells}
        )
    diversity = [
        {"value": format_value(comparison.diversity[name][0]), "change": _change(change)}
        for name, change in comparison.diversity_changes.items()
    ]
    return {
        "rewards": rewards,
        "diversity": {"base": format_with_error(comparison.diversity[comparison.baseline]), "cells": diversity},
        "composite": [f"{score:+.3f}" for score in comparison.composite.values()],
    }


def _breakdown(column: str, name: str | None, averages: pd.DataFrame, are_changes: bool) -> dict[str, Any]:
    """A table with a row for each value of a column and a cell for each reward."""
    rows: dict[str, list[dict[str, Any]]] = {}
    figures = zip(averages["mean"], averages["standard_error"], strict=True)
    for group, number, figure in zip(averages[column], averages["num_images"], figures, strict=True):
        if number == 0:
            cell = {"text": "–", "class": ""}
        else:
            cell = _change(figure) if are_changes else {"text": format_with_error(figure), "class": ""}
        rows.setdefault(group, []).append(cell | {"images": number})
    return {"column": column, "evaluation": name, "rows": rows}


def _prompts(evaluations: Mapping[str, EvaluationResults], start: Path) -> list[dict[str, Any]]:
    """For each row of the prompt set: its images, their scores, and what the page sorts by."""
    results = list(evaluations.values())
    first = results[0].table
    rewards = results[0].reward_names
    values = np.stack([r.table[rewards].to_numpy(dtype=float) for r in results])  # [evaluations, images, rewards]
    changes = values[1:] - values[0]
    shares, sizes = _shares(values[0]), _sizes(changes)
    folders = [_relative_url(r.folder, start) for r in results]
    diversity = np.array([r.prompt_diversity for r in results])[:, results[0].groups]  # [evaluations, images]
    sources = [[folder + quote(file) for file in r.table["image"]] for folder, r in zip(folders, results, strict=True)]
    prompts = []
    for prompt_index, part in first.groupby("prompt_index"):
        places = part.index.to_numpy()
        row = part.iloc[0]
        applies = [k for k in range(len(rewards)) if np.isfinite(values[:, places, k]).any()]
        shots = [
            {
                "seed": int(first["seed"].iloc[place]),
                "sources": [files[place] for files in sources],
                "scores": [
                    {
                        "name": rewards[k],
                        "values": [_short(value) for value in values[:, place, k]],
                        "share": shares[place, k],
                        "changes": [_tinted(change, sizes[k]) for change in changes[:, place, k]],
                    }
                    for k in applies
                ],
            }
            for place in places
        ]
        # The page sorts by changes if there is a baseline, otherwise by values.
        sorted_by = changes if len(results) > 1 else values
        means = [[_mean(sorted_by[e, places, k]) for k in range(len(rewards))] for e in range(len(sorted_by))]
        spread = diversity[:, places[0]]
        spreads = spread[1:] - spread[0] if len(results) > 1 else spread
        keys = [[*means[e], float(spreads[e])] for e in range(len(sorted_by))]
        prompts.append(
            {
                "number": int(prompt_index),
                "prompt": row["prompt"],
                "source": row.get("source"),
                "tag": row.get("tag"),
                "shots": shots,
                "diversity": [_short(value) for value in spread],
                "keys": [[None if np.isnan(key) else key for key in row] for row in keys],
                "changes": [
                    {"name": rewards[k], "changes": [_tinted(means[e][k], sizes[k]) for e in range(len(changes))]}
                    for k in applies
                    if len(changes)
                ],
            }
        )
    return prompts


def _relative_url(folder: Path, start: Path) -> str:
    """The path of a folder relative to another one, to be followed by a file: empty, or with a slash at its end."""
    relative = Path(os.path.relpath(folder.resolve(), start.resolve())).as_posix()
    return "" if relative == "." else quote(relative) + "/"


def _shares(values: np.ndarray) -> np.ndarray:
    """The place of each value between the least (0) and the greatest (100) of its column, in percent; 0 for NaN."""
    low, high = (_columnwise(extreme, values) for extreme in (np.min, np.max))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(100 * (values - low) / (high - low)).round(1)


def _sizes(changes: np.ndarray) -> np.ndarray:
    """For each reward, the change that has the full colour: twice the root mean square, 1 where all are 0."""
    sizes = 2 * np.sqrt(_columnwise(np.mean, np.square(changes.reshape(-1, changes.shape[-1]))))
    return np.where(sizes > 0, sizes, 1.0)


def _columnwise(function: Callable[[np.ndarray], float], values: np.ndarray) -> np.ndarray:
    """A function of the numbers in each column, NaN where there are none."""
    columns = [column[~np.isnan(column)] for column in values.T]
    return np.array([function(column) if len(column) else np.nan for column in columns])


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else np.nan


def _change(value: tuple[float, float]) -> dict[str, str]:
    """A mean change with its error, in colour from two standard errors on."""
    mean, error = value
    if np.isnan(mean):
        return {"text": "–", "class": ""}
    ratio = mean / error if error > 0 else 0.0
    colour = "up" if ratio >= SIGNIFICANT else "down" if ratio <= -SIGNIFICANT else ""
    return {"text": format_with_error(value, sign=True), "class": colour}


def _tinted(change: float, size: float) -> dict[str, Any]:
    """The change of one image or prompt, and the strength of its colour in percent."""
    if np.isnan(change):
        return {"text": "–", "class": "", "tint": 0}
    text = _short(change, sign=True)
    colour = "" if float(text) == 0 else "up" if change > 0 else "down"
    return {"text": text, "class": colour, "tint": round(60 * min(1.0, abs(change) / size))}


def _short(value: float, sign: bool = False) -> str:
    """A number that is short enough for the space under an image."""
    if np.isnan(value):
        return "–"
    text = f"{value:{'+' if sign else ''}.{3 if abs(value) < 100 else 0}f}"
    return text if float(text) else "0.000"
