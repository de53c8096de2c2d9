# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What one round of sampling and scoring leaves behind for training."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..pipelines import Conditioning


@dataclass
class GenerationBatch:
    """
    The samples of one generation batch on this process, in the order in which they are trained on.

    Args:
        prompts (`list[str]`):
            The different prompts.
        conditioning ([`~trl_marble.pipelines.Conditioning`]):
            Their embeddings, in the same order.
        prompt_index (`Tensor` of shape `[B]`, int64):
            Which prompt each sample belongs to.
        sample_ids (`Tensor` of shape `[B]`, int64):
            Place of each sample in the generation batch of all processes: the seed of its training noise.
        latents (`Tensor` of shape `[B, ...]`):
            Clean latents x0.
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

    prompts: list[str]
    conditioning: Conditioning
    prompt_index: Tensor
    sample_ids: Tensor
    latents: Tensor
    advantages: Tensor
    counts: Tensor
    active: Tensor
    scored: Tensor
    weighted_sum: Tensor

    _TENSORS = ("prompt_index", "sample_ids", "latents", "advantages", "counts", "active", "scored", "weighted_sum")

    def save(self, path: Path) -> None:
        """Write everything but the embeddings, which are computed again from the prompts, to a safetensors file."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in self._TENSORS}
        save_file(tensors, path, metadata={f"prompt_{i}": prompt for i, prompt in enumerate(self.prompts)})

    @classmethod
    def load(cls, path: Path, encode, device: torch.device) -> "GenerationBatch":
        """
        Read a generation batch back.

        Args:
            path (`Path`):
                A file written by [`save`].
            encode (`Callable[[list[str]], Conditioning]`):
                Computes the embeddings of the prompts.
            device (`torch.device`):
                Where to put the tensors.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).to(device) for name in cls._TENSORS}
        prompts = [metadata[f"prompt_{i}"] for i in range(len(metadata))]
        return cls(prompts=prompts, conditioning=encode(prompts), **tensors)
