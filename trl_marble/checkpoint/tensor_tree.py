# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""State dicts of optimizers and random generators as safetensors files: nothing is pickled."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


# What to do where a state cannot be saved.
_OF_RUN = "Use another one, or `save_only_model=True`, with which nothing can be resumed."
_OF_REWARD = (
    "Make one of these of it in `state_dict`, for example with `torch.from_numpy` or `list`, and undo that in "
    "`load_state_dict`. Other processes get the state too, so it is needed whatever is saved."
)
_STRUCTURE = "structure"  # the entry of the file's metadata that holds everything but the tensors, as JSON


def save_tree(path: Path, tree: Any, what: str) -> None:
    """
    Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and `None` to a safetensors file.

    Args:
        path (`Path`):
            The file.
        tree (`Any`):
            What to write. Keys of dicts are strings or integers.
        what (`str`):
            What it is the state of, for the error.

    Raises:
        `TypeError`: If there is anything else in it, naming its place and `what`.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, "", tensors, what, _OF_RUN)
    save_file(tensors, path, metadata={_STRUCTURE: json.dumps(structure)})


def copy_tree(tree: Any, what: str) -> Any:
    """
    A copy of the state of a reward that [`save_tree`] could write, with its tensors on the CPU.

    Args:
        tree (`Any`):
            What to copy.
        what (`str`):
            What it is the state of, for the error.

    Raises:
        `TypeError`: As [`save_tree`].
    """
    tensors: dict[str, Tensor] = {}
    return _decode(_encode(tree, "", tensors, what, _OF_REWARD), tensors)


def load_tree(path: Path) -> Any:
    """
    Read what [`save_tree`] wrote.

    Args:
        path (`Path`):
            The file.

    Returns:
        `Any`: The same, with its tensors on the CPU.
    """
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()[_STRUCTURE])
        # Copies: what safetensors reads is the file itself in memory, and a checkpoint may be deleted or moved.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    return _decode(structure, tensors)


def _encode(value: Any, place: str, tensors: dict[str, Tensor], what: str, advice: str) -> Any:
    """The value in JSON's terms; tensors are put aside under their number and place."""
    if type(value) in (Tensor, nn.Parameter):  # a subclass may mean more than its values
        name = f"{len(tensors)}{place}"  # places may be alike, such as those of the keys 0 and "0"
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors stores no shared memory
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) is list:
        return [_encode(each, f"{place}/{i}", tensors, what, advice) for i, each in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [_encode(each, f"{place}/{i}", tensors, what, advice) for i, each in enumerate(value)]}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        # As pairs, since keys of JSON objects are strings.
        return {"dict": [[key, _encode(each, f"{place}/{key}", tensors, what, advice)] for key, each in value.items()]}
    raise TypeError(
        f"The state of {what} cannot be saved: `state_dict(){place.replace('/', '.')}` is a {type(value).__name__}. "
        f"Checkpoints hold tensors, numbers, strings, lists and dicts, nothing that must be pickled. {advice}"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(each, tensors) for each in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(_decode(each, tensors) for each in content)
        return {key: _decode(each, tensors) for key, each in content}
    return value
