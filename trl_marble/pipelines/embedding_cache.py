# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of prompts: computed in chunks, joined, and kept on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .conditioning import Rows


PROMPTS_AT_ONCE = 64  # in one call of the text encoders


def in_chunks(prompts: Sequence[str]) -> Iterator[list[str]]:
    """Prompts in lists that are not too long for one call of the text encoders."""
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        yield list(prompts[start : start + PROMPTS_AT_ONCE])


def join_rows(parts: Sequence[dict[str, Rows]]) -> dict[str, Rows]:
    """
    Join what the text encoders returned in several calls.

    Where they return rows of different lengths, the shorter ones are padded with zeros that their mask leaves out.

    Args:
        parts (`Sequence[dict[str, torch.Tensor | list]]`):
            Arguments of the pipeline's `__call__` by name, in each part with one row per prompt.

    Raises:
        `ValueError`: rows are of different lengths, and there is no mask.
    """
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part)
    masks = [name for name in names if "mask" in name]
    joined: dict[str, Rows] = {}
    for name in names:
        rows = [part[name] if name in part else _full_mask(part, name) for part in parts]
        tensors = [each for each in rows if isinstance(each, Tensor)]
        if not tensors:  # lists
            joined[name] = [row for each in rows for row in each]
            continue
        if len({each.shape[1:] for each in tensors}) > 1:
            if not any(mask.startswith("negative_") == name.startswith("negative_") for mask in masks):
                raise ValueError(f"The text encoders return `{name}` of different lengths for different prompts.")
            longest = max(each.shape[1] for each in tensors)
            tensors = [_pad(each, longest) for each in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def _full_mask(part: dict[str, Rows], name: str) -> Tensor:
    """The mask that some pipelines leave out where every token counts."""
    embeds = part["negative_prompt_embeds" if name.startswith("negative_") else "prompt_embeds"]
    assert isinstance(embeds, Tensor)
    return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)


def _pad(rows: Tensor, length: int) -> Tensor:
    padding = rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])
    return torch.cat([rows, padding], dim=1)


class EmbeddingCache:
    """
    Embeddings of prompts in a folder, one safetensors file per prompt.

    Args:
        folder (`Path`):
            The folder. It may have the embeddings of other models, too.
        fingerprint (`str`):
            Of everything but the prompt that embeddings depend on, see [`encoder_fingerprint`].
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder / fingerprint

    def rows(
        self, prompts: Sequence[str], names: Sequence[str | None], encode: Callable[[list[str]], dict[str, Rows]]
    ) -> dict[str, Rows]:
        """
        The embeddings of some prompts, on the CPU. Those that are not there are computed and written first.

        Args:
            prompts (`Sequence[str]`):
                The prompts.
            names (`Sequence[str | None]`):
                The arguments that `encode` returns, which tell prompts from negative prompts.
            encode (`Callable[[list[str]], dict[str, torch.Tensor | list]]`):
                Computes them.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if self._read(prompt, names) is None]
        for chunk in in_chunks(missing):
            rows = encode(list(chunk))  # a copy, which Z-Image writes into
            for place, prompt in enumerate(chunk):
                self._write(prompt, names, {name: each[place] for name, each in rows.items()}, rows)
        found: list[dict[str, Rows]] = []
        for prompt in prompts:
            row = self._read(prompt, names)
            if row is None:
                raise OSError(
                    f"The embeddings of {prompt!r} were written to {self.folder}, and are not there any more."
                )
            found.append(row)
        return join_rows(found)

    def _file(self, prompt: str, names: Sequence[str | None]) -> Path:
        return self.folder / (hashlib.sha256(json.dumps([prompt, *names]).encode()).hexdigest() + ".safetensors")

    def _read(self, prompt: str, names: Sequence[str | None]) -> dict[str, Rows] | None:
        try:
            with safe_open(self._file(prompt, names), "pt") as file:
                lists = json.loads(file.metadata()["lists"])
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):  # not written, or damaged
            return None
        return {name: [tensor] if name in lists else tensor[None] for name, tensor in row.items()}

    def _write(self, prompt: str, names: Sequence[str | None], row: dict[str, Tensor], rows: dict[str, Rows]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(prompt, names)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")  # another process may write the same
        lists = json.dumps([name for name, each in rows.items() if isinstance(each, list)])
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in row.items()}
        save_file(tensors, unfinished, metadata={"lists": lists})
        os.replace(unfinished, file)


def encoder_fingerprint(pipeline: DiffusionPipeline, settings: Sequence[Any]) -> str:
    """
    A digest of all that the embeddings of a prompt depend on: the text encoders' configurations and weights, the
    tokenizers' files, the pipeline's settings (such as a template of prompts), and the versions of the libraries.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        settings (`Sequence`):
            What else they depend on; compared by `repr`.
    """
    components = pipeline.components
    own = {name: value for name, value in {**pipeline.config, **vars(pipeline)}.items() if name not in components}
    versions = diffusers.__version__, transformers.__version__
    digest = hashlib.sha256(repr([versions, _plain_values(own), *settings]).encode())
    for name, part in sorted(components.items()):
        if part is None or "transformer" in name or name in ("vae", "scheduler"):
            continue
        digest.update(f"{name} {type(part).__name__}".encode())
        if isinstance(part, nn.Module):
            _add_encoder(digest, part)
            continue
        digest.update(repr(_plain_values(vars(part))).encode())  # what it was set to after it was loaded
        with tempfile.TemporaryDirectory() as folder:
            part.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:32]


def _plain_values(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings among the attributes of an object: templates, limits, which layers are read, ..."""
    plain = (bool, int, float, str, tuple, list)
    return [(name, value) for name, value in sorted(values.items()) if name[0] != "_" and isinstance(value, plain)]


def _add_encoder(digest: Any, encoder: Any) -> None:
    """Add a text encoder: its configuration, its adapters and all of its weights."""
    config = {key: value for key, value in encoder.config.to_dict().items() if key != "_name_or_path"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, module in encoder.named_modules():
        if isinstance(module, LoraLayer):  # how strong its adapters are is in no weight
            state = name, module.disable_adapters, module.active_adapters, module.merged_adapters, module.scaling
            digest.update(repr(state).encode())
    # Every byte: an encoder that was fine-tuned, or has a LoRA merged into some layers, may differ from the original
    # anywhere. It takes about a second per gigabyte, once per run.
    for name, weight in encoder.state_dict().items():
        digest.update(name.encode())
        _add_weight(digest, weight)


def _add_weight(digest: Any, weight: Any) -> None:
    if not isinstance(weight, Tensor):  # a module's own state
        digest.update(repr(weight).encode())
    elif is_traceable_wrapper_subclass(weight):  # as the weights of torchao are
        names, how = weight.__tensor_flatten__()
        digest.update(repr((names, how)).encode())
        for name in names:
            _add_weight(digest, getattr(weight, name))
    else:
        digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        numbers = weight.detach().as_subclass(Tensor).cpu().contiguous()
        digest.update(numbers.flatten().view(torch.uint8).numpy())
