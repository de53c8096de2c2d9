# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What the commands set before anything is imported that takes long."""

import logging
import os
import sys
import warnings
from pathlib import Path


# Where Linux shows GPUs: NVIDIA's, under WSL, AMD's.
ACCELERATORS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# Logger -> how a message begins or what it holds that tells a user of a command nothing: an optional package is not
# installed, and what takes its place is as good.
NOISE = {
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


PACKAGE = str(Path(__file__).parents[1])
_format_warning = warnings.formatwarning


def prepare_environment() -> None:
    """
    Let OpenMP's threads sleep while they wait, on machines without an accelerator, drop two notes of libraries, and
    print the package's own warnings as sentences, without the line of code that they come from.

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
    warnings.formatwarning = _warning_as_sentence


def _warning_as_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if filename.startswith(PACKAGE):
        return f"Warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


class _Without(logging.Filter):
    """Lets all messages pass but those that hold a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()
