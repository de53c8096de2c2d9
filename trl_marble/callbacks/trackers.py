# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Pictures and histograms for the experiment trackers that `report_to` names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def send_to_trackers(
    callbacks: Sequence[TrainerCallback],
    step: int,
    images: Mapping[str, Path],
    histograms: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """
    Send to TensorBoard, Weights & Biases and Trackio, through the callbacks of `transformers` that write the scalars.

    Nothing happens for a tracker that is not in use or not open. All is on the step axis of the scalars:
    TensorBoard's own step, and `train/global_step` for the two others, which count calls beside it.

    Args:
        callbacks (`Sequence` of [`~transformers.TrainerCallback`]):
            Those of the trainer, on the main process.
        step (`int`):
            The optimizer step.
        images (`Mapping[str, Path]`):
            Name -> file of a picture.
        histograms (`Mapping[str, Sequence[float]]`, *optional*):
            Name -> finite values. What has none is left out.
    """
    filled = {name: np.asarray(values) for name, values in (histograms or {}).items() if len(values) > 0}
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            writer = callback.tb_writer
            if writer is not None:
                for name, path in images.items():
                    pixels = np.asarray(Image.open(path).convert("RGB"))
                    writer.add_image(name, pixels, step, dataformats="HWC")
                for name, values in filled.items():
                    writer.add_histogram(name, values, step)
        elif isinstance(callback, WandbCallback | TrackioCallback) and callback._initialized:
            tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio
            tracker.log(
                {name: tracker.Image(str(path)) for name, path in images.items()}
                | {name: tracker.Histogram(values) for name, values in filled.items()}
                | {"train/global_step": step}
            )
