# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds of this method, and the check that it belongs to the run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..pipelines.quantization import first_values


STATE_FILE = "marble_state.safetensors"
IDENTITY_FILE = "marble_state.json"
FORMAT_VERSION = 3


def base_fingerprint(transformer: nn.Module) -> str:
    """
    A short digest of a transformer's frozen weights.

    Args:
        transformer (`nn.Module`):
            The model; parameters that require grad are left out.

    Returns:
        `str`: Hex digest of the name, shape, dtype and first 64 values of every frozen parameter: the same for the
        same base model wherever it is loaded from and whatever adapter is trained on it, different for another one or
        another quantization of it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in transformer.named_parameters():
        if not parameter.requires_grad:
            sample = first_values(parameter)
            name = name.replace(".base_layer.", ".")  # what an adapter is wrapped around
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def save_state(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], identity: Mapping[str, Any]) -> None:
    """
    Write a run's own state to a checkpoint.

    Args:
        folder (`Path`):
            The checkpoint folder; created if missing.
        tensors (`Mapping[str, Mapping[str, Tensor]]`):
            Named groups of named tensors.
        identity (`Mapping[str, Any]`):
            JSON-serializable facts that a run resumed from here must share, or has to know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, members in tensors.items()
        for name, tensor in members.items()
    }
    save_file(flat, folder / STATE_FILE)
    (folder / IDENTITY_FILE).write_text(json.dumps({"format_version": FORMAT_VERSION, **identity}, indent=2) + "\n")


def load_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """
    Read what [`save_state`] wrote.

    Args:
        folder (`Path`):
            The checkpoint folder.
        identity (`Mapping[str, Any]`):
            The facts of the run that resumes.

    Returns:
        `dict[str, dict[str, Tensor]]`: The groups of tensors, on CPU.

    Raises:
        `FileNotFoundError`: If the folder is not a checkpoint of this trainer.
        `ValueError`: If it belongs to another base model, other rewards or another LoRA, or a file is damaged.
    """
    for file in (STATE_FILE, IDENTITY_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"`{folder}` has no `{file}`: it is not a complete checkpoint. Pass the path of a "
                "`checkpoint-<step>` folder."
            )
    try:
        saved = load_identity(folder)
        flat = load_file(folder / STATE_FILE)
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"`{folder}` is damaged ({error}); resume from an earlier checkpoint.") from error
    if saved.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"`{folder}` is of another version of trl_marble: its format is {saved.get('format_version')!r}, this "
            f"version reads {FORMAT_VERSION}. Resume with that version, or load its adapter with `load_lora_weights`."
        )
    for name, value in identity.items():
        if saved.get(name) != value:
            raise ValueError(
                f"`{folder}` was written with {name} = {saved.get(name)!r}, this run has {value!r}. Resume with what "
                "the checkpoint was trained with, or start anew without `resume_from_checkpoint`."
            )
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups


def load_identity(folder: Path) -> dict[str, Any]:
    """
    Read the identity that [`save_state`] wrote.

    Args:
        folder (`Path`):
            The checkpoint folder.
    """
    return dict(json.loads((folder / IDENTITY_FILE).read_text()))
