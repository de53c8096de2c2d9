# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Putting a published LoRA adapter on a pipeline for as long as it is evaluated."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def find_adapter(adapter: str | Path) -> Path:
    """
    The file of a LoRA adapter.

    Args:
        adapter (`str` or `Path`):
            A Hub id, a folder with `pytorch_lora_weights.safetensors`, or a `.safetensors` file.

    Returns:
        `Path`: the file, in the Hub's cache for a Hub id.

    Raises:
        `ValueError`: for a file of another kind than safetensors.
        `OSError`: where there is no such file, folder or repository.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        file = path / LORA_WEIGHT_NAME_SAFE
        if not file.is_file():
            raise FileNotFoundError(f"The folder `{adapter}` holds no adapter (no `{LORA_WEIGHT_NAME_SAFE}`).")
        return file
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter `{adapter}` is not a .safetensors file; no other kind is loaded.")
        return path
    if path.suffix == ".safetensors":
        raise FileNotFoundError(f"The adapter `{adapter}` does not exist.")
    try:
        return Path(hf_hub_download(str(adapter), LORA_WEIGHT_NAME_SAFE))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"There is no adapter `{adapter}`: it is neither a folder nor a file here, and no "
            f"`{LORA_WEIGHT_NAME_SAFE}` could be fetched from a Hub repository of that name. The cause: {error}"
        ) from error


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def loaded_adapter(pipeline: DiffusionPipeline, file: Path | None) -> Iterator[None]:
    """
    Within the context the pipeline has the adapter; after it, also after an error, it is as it was.

    Args:
        pipeline (`DiffusionPipeline`):
            A pipeline without adapters.
        file (`Path`, *optional*):
            The adapter, see [`find_adapter`]. `None` changes nothing.

    Raises:
        `ValueError`: if the pipeline has adapters already, or the file has no weights for this pipeline.
    """
    if file is None:
        yield
        return
    present = sorted({name for names in pipeline.get_list_adapters().values() for name in names})
    if present:
        raise ValueError(
            f"The pipeline has adapters already ({', '.join(present)}), so `{file}` would be evaluated on top of "
            "them. Pass a pipeline without adapters, or evaluate the ones that are there with `adapter=None`."
        )
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name, use_safetensors=True)
        if not pipeline.get_active_adapters():  # diffusers only logs it
            raise ValueError(f"`{file}` has no weights for a {type(pipeline).__name__}: it would change nothing.")
        yield
    finally:
        pipeline.unload_lora_weights()
