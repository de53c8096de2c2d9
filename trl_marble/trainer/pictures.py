# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The pictures that a run leaves on disk and with its experiment trackers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..evaluation import image_grid


def log_grid(trainer: Trainer, name: str, rows: Mapping[str, Sequence[Image.Image]]) -> None:
    """
    Save a grid of images as `<output_dir>/images/<name>_step_<step>.png`, and send it to TensorBoard and Weights &
    Biases where the trainer reports to them.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer; its callbacks hold the trackers.
        name (`str`):
            What the images are, such as `"train"`.
        rows (`Mapping[str, Sequence[PIL.Image.Image]]`):
            Images by prompt, one row each.
    """
    step = trainer.state.global_step
    folder = Path(str(trainer.args.output_dir)) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_step_{step:06d}.png"
    image_grid(list(rows.values()), list(rows), path=path)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            callback.tb_writer.add_image(f"{name}/images", pixels, step, dataformats="HWC")
        elif isinstance(callback, WandbCallback) and callback._initialized:
            callback._wandb.log({f"{name}/images": callback._wandb.Image(str(path)), "train/global_step": step})


def first_rows(
    prompts: Sequence[str], images: Sequence[Image.Image], num_prompts: int
) -> dict[str, list[Image.Image]]:
    """
    Images of the first prompts of a batch, as the rows of a grid.

    Args:
        prompts (`Sequence[str]`):
            The prompt of each image.
        images (`Sequence[PIL.Image.Image]`):
            The images.
        num_prompts (`int`):
            How many prompts, and at most how many images of each.
    """
    rows: dict[str, list[Image.Image]] = {}
    for prompt, image in zip(prompts, images, strict=True):
        if prompt in rows or len(rows) < num_prompts:
            rows.setdefault(prompt, []).append(image)
    return {prompt: row[:num_prompts] for prompt, row in rows.items()}
