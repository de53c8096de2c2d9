# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What callbacks of this package can rely on that those of `transformers` cannot."""

from collections.abc import Sequence
from typing import ClassVar

from transformers import TrainerCallback


class MarbleCallback(TrainerCallback):
    """
    A callback that learns the names of the rewards before training begins, and of its end however it comes.

    Attributes:
        replaces (`tuple[type[TrainerCallback], ...]`): Callbacks that are removed when training begins.
    """

    replaces: ClassVar[tuple[type[TrainerCallback], ...]] = ()

    def open(self, reward_names: Sequence[str], held_out_names: Sequence[str]) -> None:
        """
        Called by `train` before all events.

        Args:
            reward_names (`Sequence[str]`):
                The rewards that are trained on.
            held_out_names (`Sequence[str]`):
                Those that are scored in evaluations only.
        """

    def close(self) -> None:
        """Called by `train` after all events, also where training failed or was interrupted."""
