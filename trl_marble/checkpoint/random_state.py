# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The global random generators of a process, as tensors and numbers."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """
    The states of Python's, NumPy's and PyTorch's global generators.

    Args:
        device (`torch.device`):
            Where the run computes; its generator is one of them.

    Returns:
        `dict[str, Any]`: Tensors, numbers and `None`, for [`set_random_state`].
    """
    version, words, gauss = random.getstate()
    name, keys, *position = np.random.get_state()
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {"name": str(name), "keys": torch.tensor(np.asarray(keys, dtype=np.int64)), "position": position},
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """
    Put all generators where they were.

    Args:
        state (`dict[str, Any]`):
            What [`random_state`] returned. A run that goes on on a device of another kind leaves its generator as it
            is.
        device (`torch.device`):
            Where the run computes.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), *numpy["position"]))
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


def random_file(folder: Path, process: int) -> Path:
    """
    The file of a checkpoint for the state of one process.

    Args:
        folder (`Path`):
            The checkpoint folder.
        process (`int`):
            Number of the process.
    """
    return folder / f"random_state_{process}.safetensors"


def find_random_file(folder: Path, process: int) -> Path:
    """
    The file that a process goes on from: its own, or where fewer processes have saved, one of theirs. (At the start of
    a run the states of all processes are the same too.)

    Args:
        folder (`Path`):
            The checkpoint folder.
        process (`int`):
            Number of the process.
    """
    saved = sorted(folder.glob("random_state_*.safetensors"))
    own = random_file(folder, process)
    return own if own in saved else saved[process % len(saved)]
