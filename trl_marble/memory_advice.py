# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Which settings to change where a part of the run does not fit into memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def rollout_advice(setting: str, batch_size: int) -> Iterator[None]:
    """
    Say what to change where sampling runs out of memory.

    Args:
        setting (`str`):
            The setting that says how many images are sampled at once.
        batch_size (`int`):
            Its value.

    Raises:
        `torch.OutOfMemoryError`: The one that came, with a note.
    """
    with _advice(
        f"Sampling images ran out of memory: set a smaller `{setting}` (it is {batch_size}; the images stay the same "
        "up to rounding) or a smaller `height` and `width`, or move rewards off the device (`offload=True` in those "
        "that are models, or a reward server)."
    ):
        yield


@contextmanager
def reward_advice() -> Iterator[None]:
    """
    Say what to change where a reward runs out of memory.

    Raises:
        `Exception`: The one that came; with a note if it or its cause is a `torch.OutOfMemoryError`.
    """
    with _advice(
        "Scoring images ran out of memory: set `offload=True` in the rewards that are models, so that each is on the "
        "device only while it scores; set a smaller `rollout_batch_size`, which is how many images a reward gets at "
        "once; or move rewards to a reward server on another device."
    ):
        yield


@contextmanager
def update_advice(micro_batch_size: int, micro_batches: int) -> Iterator[None]:
    """
    Say what to change where forward and backward passes run out of memory.

    Args:
        micro_batch_size (`int`):
            `per_device_train_batch_size`.
        micro_batches (`int`):
            `gradient_accumulation_steps`.

    Raises:
        `torch.OutOfMemoryError`: The one that came, with a note.
    """
    with _advice(
        "The update ran out of memory: set `activation_checkpointing=True`; or a smaller "
        f"`per_device_train_batch_size` (it is {micro_batch_size}) with as many times more "
        f"`gradient_accumulation_steps` (they are {micro_batches}), which gives the same gradient. "
        "Rewards that are models leave the device during updates with `offload=True`. Where per-reward gradients are "
        "balanced, there are 2 K + 1 gradients of the adapter for K rewards: a lower rank makes them smaller."
    ):
        yield


@contextmanager
def _advice(text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        out_of_memory = any(isinstance(each, torch.OutOfMemoryError) for each in (error, error.__cause__))
        if out_of_memory and not getattr(error, "__notes__", None):  # what is nearest to the place says it
            error.add_note(text)
        raise
