# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What callbacks of [`MarbleNFTTrainer`] can rely on that those of `transformers` cannot."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback


if TYPE_CHECKING:
    from .marble_nft_trainer import MarbleNFTTrainer


class MarbleCallback(TrainerCallback):
    """A callback that meets its trainer before training begins, and is told of its end however it comes."""

    def open(self, trainer: "MarbleNFTTrainer") -> None:
        """
        Called by `train` before all events.

        Args:
            trainer ([`MarbleNFTTrainer`]):
                The run.
        """

    def close(self) -> None:
        """Called by `train` after all events, also where training failed or was interrupted."""
