# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Sending pictures to the experiment trackers that a run reports to."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback


def log_image(trainer: Trainer, name: str, path: Path) -> None:
    """
    Send a picture to TensorBoard and Weights & Biases where the trainer reports to them.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer; its callbacks hold the trackers.
        name (`str`):
            What to call the picture there.
        path (`Path`):
            The image file.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            callback.tb_writer.add_image(name, pixels, trainer.state.global_step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._wandb is not None and callback._initialized:
            callback._wandb.log(
                {name: callback._wandb.Image(str(path)), "train/global_step": trainer.state.global_step}
            )
