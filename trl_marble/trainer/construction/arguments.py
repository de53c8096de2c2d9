# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a trainer, before anything is built from them."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..marble_config import MarbleConfig


def default_config(pipeline: Any) -> MarbleConfig:
    """A configuration with an output folder named after the pipeline."""
    name = Path(type(pipeline).__name__ if isinstance(pipeline, DiffusionPipeline) else pipeline)
    return MarbleConfig(f"{name.absolute().name}-marble")


def check_weighting(weighting: Any, args: MarbleConfig) -> None:
    """
    See that a weighting that the trainer is given is used.

    Raises:
        `TypeError`: If it is not callable.
        `ValueError`: If the settings have it, or nothing is weighted.
    """
    if weighting is None:
        return
    if not callable(weighting):
        raise TypeError(
            f"`weighting` is {weighting!r}; the trainer takes a callable, and `MarbleConfig(weighting=...)` a name."
        )
    if args.multi_objective_aggregation != "marble":
        raise ValueError(
            f"`weighting` has no effect with `multi_objective_aggregation={args.multi_objective_aggregation!r}`; "
            "leave one of the two out."
        )
    if args.weighting != "mgda":
        raise ValueError(
            f"The trainer has a `weighting` of its own and `MarbleConfig` has {args.weighting!r}; leave one "
            "of the two out."
        )
