# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the commands set before anything is imported that takes long."""

import logging
import os
import sys
from pathlib import Path


# Where Linux shows GPUs: NVIDIA's, under WSL, AMD's.
ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# Logger -> how a message begins or what it holds that tells a user of a command nothing: an optional package is not
# installed, and what takes its place is as good.
NOISE = {
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def prepare_environment() -> None:
    """
    Let OpenMP's threads sleep while they wait, on machines without an accelerator, and drop two notes of libraries.

    Threads that spin take the cores from each other and from other processes: with two of them on two busy cores an
    evaluation took nine times as long. A value of `OMP_WAIT_POLICY` that is set already stays; it is read when torch
    is loaded.
    """
    if "torch" not in sys.modules and not any(Path(device).exists() for device in ACCELERATORS):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name, text in NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(text))


class _Without(logging.Filter):
    """Lets all messages pass but those that hold a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()
