# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What one round of sampling and scoring leaves behind for training."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..pipelines import row_digests


@dataclass
class GenerationBatch:
    """
    The samples of one generation batch on this process, in the order in which they are trained on.

    Args:
        rows_digest (`str`):
            Of the rows of the dataset that were sampled from, see [`digest_of`].
        prompt_index (`Tensor` of shape `[B]`, int64):
            Which of their different prompts, or pairs of prompt and image, each sample belongs to.
        sample_ids (`Tensor` of shape `[B]`, int64):
            Place of each sample in the generation batch of all processes: the seed of its training noise.
        latents (`Tensor` of shape `[B, ...]`):
            Clean latents x0.
        finite (`Tensor` of shape `[B]`, bool):
            Which samples have latents at all: those that were sampled as NaN or infinite are left out, and 0 here.
        advantages (`Tensor` of shape `[K, B]`, float32):
            NaN where a reward does not apply.
        counts (`Tensor` of shape `[U, K]`, int64):
            Number of valid samples of each reward in each optimizer step of one pass, on all processes.
        active (`Tensor` of shape `[U, K]`, bool):
            Which rewards tell samples of their group apart in each optimizer step of one pass, on any process.
        scored (`Tensor` of shape `[U]`, int64):
            Number of samples that any reward scores in each optimizer step of one pass, on all processes.
        weighted_sum (`Tensor` of shape `[K]`, float32):
            How a weighted sum of the raw rewards would have mixed the per-reward gradients.
    """

    rows_digest: str
    prompt_index: Tensor
    sample_ids: Tensor
    latents: Tensor
    finite: Tensor
    advantages: Tensor
    counts: Tensor
    active: Tensor
    scored: Tensor
    weighted_sum: Tensor

    _TENSORS = (
        "prompt_index",
        "sample_ids",
        "latents",
        "finite",
        "advantages",
        "counts",
        "active",
        "scored",
        "weighted_sum",
    )

    def save(self, path: Path) -> None:
        """Write it to a safetensors file. The embeddings are computed again from the rows when training goes on."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in self._TENSORS}
        save_file(tensors, path, metadata={"rows": self.rows_digest})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "GenerationBatch":
        """
        Read a generation batch back.

        Args:
            path (`Path`):
                A file written by [`save`].
            device (`torch.device`):
                Where to put the tensors.
        """
        with safe_open(path, framework="pt") as file:
            rows_digest = file.metadata()["rows"]
            tensors = {name: file.get_tensor(name).to(device, copy=True) for name in cls._TENSORS}
        return cls(rows_digest=rows_digest, **tensors)


def digest_of(prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> str:
    """
    What rows of a dataset a generation batch was sampled from, told by their content and order.

    Args:
        prompts (`Sequence[str]`):
            The prompts, one a sample.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            The images to be edited, one a sample.
    """
    return hashlib.sha256("".join(row_digests(prompts, images)).encode()).hexdigest()


def training_order(num_samples: int, own: Sequence[int], num_updates: int, seed: int) -> Tensor:
    """
    The order in which a process trains on its samples of a generation batch.

    Which optimizer step a sample belongs to does not depend on how many processes there are: of every `num_updates`
    consecutive samples each step takes one, drawn at random. Within a step the order is random.

    Args:
        num_samples (`int`):
            Size of the generation batch of all processes, a multiple of `num_updates`.
        own (`Sequence[int]`):
            The samples of this process: consecutive ones, beginning and ending at multiples of `num_updates`.
        num_updates (`int`):
            Number of optimizer steps of one pass over the generation batch.
        seed (`int`):
            The same for all processes.

    Returns:
        `Tensor` of shape `[len(own)]`, int64: places in `own`, those of the first optimizer step first.
    """
    generator = torch.Generator().manual_seed(seed)
    update = torch.rand(num_samples // num_updates, num_updates, generator=generator).argsort(dim=1).flatten()
    place = torch.randperm(num_samples, generator=generator)
    key = update * num_samples + place
    return key[own[0] : own[-1] + 1].argsort()
