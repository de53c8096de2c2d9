# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Settings of rollouts."""

from dataclasses import dataclass

from .shares import ShareDraws


@dataclass(frozen=True)
class RolloutSettings:
    """
    Settings of rollouts.

    Args:
        seed (`int`):
            Seed of the run.
        num_generations (`int`):
            Images per prompt.
        batch_size (`int`):
            Images that one call of the pipeline samples.
        edits (`bool`):
            Whether the pipeline edits the images of the column `image`.
        resample_rounds (`int`, *optional*, defaults to `0`):
            How often other prompts are drawn for groups on which no reward tells images apart.
        shares ([`ShareDraws`], *optional*):
            Draws what share each reward has of each prompt: in what samples its images, and in its advantage. By
            default rewards have no shares.
    """

    seed: int
    num_generations: int
    batch_size: int
    edits: bool
    resample_rounds: int = 0
    shares: ShareDraws | None = None
