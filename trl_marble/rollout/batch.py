# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A generation batch: what one round of sampling and scoring leaves behind for training."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..pipelines import Conditioning, row_digests
from ..sde import Transitions


_FIELDS = ("sample_ids", "latents", "advantages", "first_half", "counts", "active", "scored", "weighted_sum")
# The dimension of the samples. What is not here is the same on all processes.
_OF_SAMPLES = {"sample_ids": 0, "latents": 0, "advantages": 1, "first_half": 0, "transitions.points": 0}
# What the program looks at, and would have to wait for on a device.
_ON_CPU = frozenset({"sample_ids", "active", "weighted_sum"})


@dataclass
class RolloutBatch:
    """
    The samples of one generation batch on this process, in the order in which they are trained on.

    Args:
        prompts (`list[str]`):
            The prompt of each sample, in the order in which they were sampled.
        conditioning ([`~trl_marble.pipelines.Conditioning`]):
            Embeddings of their different prompts, or pairs of prompt and image.
        rows_digest (`str`):
            Of the rows of the dataset that were sampled from, see [`digest_of`].
        prompt_index (`Tensor` of shape `[B]`, int64):
            Which row of `conditioning` each sample belongs to. On the CPU, as `sample_ids`, `active` and
            `weighted_sum` are.
        sample_ids (`Tensor` of shape `[B]`, int64):
            Place of each sample in the generation batch of all processes: the seed of its training noise.
        latents (`Tensor` of shape `[B, ...]`):
            Clean latents x0; 0 for samples whose latents are not finite, which no reward applies to.
        advantages (`Tensor` of shape `[K, B]`, float32):
            NaN where a reward does not apply.
        first_half (`Tensor` of shape `[B]`, bool):
            Whether a sample's prompt is in the first half of its optimizer step, see [`split_prompts`].
        counts (`Tensor` of shape `[U, 2, K]`, int64):
            Number of valid samples of each reward in both halves of each optimizer step of one pass, on all processes.
        active (`Tensor` of shape `[U, 2, K]`, bool):
            Which rewards tell samples of their group apart in both halves of each optimizer step of one pass, on any
            process.
        scored (`Tensor` of shape `[U]`, int64):
            Number of samples that any reward scores in each optimizer step of one pass, on all processes.
        weighted_sum (`Tensor` of shape `[K]`, float32):
            How a weighted sum of the raw rewards would have mixed the per-reward gradients.
        transitions ([`~trl_marble.sde.Transitions`], *optional*):
            What the solver steps with noise went through, for losses on them; 0 where latents are not finite.
        replaced (`dict[int, int]`, *optional*):
            Place of a sample in the generation batch -> the row of the dataset that it has instead of the one that was
            drawn first, see [`~trl_marble.rollout.resampling.OtherPrompts`].
    """

    prompts: list[str]
    conditioning: Conditioning
    rows_digest: str
    prompt_index: Tensor
    sample_ids: Tensor
    latents: Tensor
    advantages: Tensor
    first_half: Tensor
    counts: Tensor
    active: Tensor
    scored: Tensor
    weighted_sum: Tensor
    transitions: Transitions | None = None
    replaced: dict[int, int] = field(default_factory=dict)

    def prompts_of(self, sample_ids: Tensor) -> list[str]:
        """The prompts of some of this process's samples."""
        first = int(self.sample_ids.min())
        return [self.prompts[number - first] for number in sample_ids.tolist()]

    def save(self, folder: Path, process: int) -> None:
        """
        Write it to a checkpoint. The embeddings are computed again from the rows when training goes on.

        Args:
            folder (`Path`):
                The checkpoint folder.
            process (`int`):
                Number of the process whose part of the generation batch it is.
        """
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _FIELDS}
        if self.transitions is not None:
            tensors |= self.transitions.tensors()
        metadata = {"rows": self.rows_digest, "replaced": json.dumps(self.replaced)}
        save_file(tensors, _part_file(folder, process), metadata=metadata)


class Part(NamedTuple):
    """
    What one process has saved of a generation batch.

    Args:
        samples (`range`):
            The places of its samples in the generation batch of all processes.
        rows_digest (`str`):
            Of the rows of the dataset that they were sampled from, see [`digest_of`].
        replaced (`dict[int, int]`):
            See [`RolloutBatch`].
    """

    samples: range
    rows_digest: str
    replaced: dict[int, int]


@dataclass(frozen=True)
class StoredBatch:
    """
    A process's samples of a generation batch, from a checkpoint that any number of processes have saved.

    Args:
        own (`range`):
            The places of the samples in the generation batch of all processes.
        parts (`list[Part]`):
            The saved parts that they are in, in their order.
        tensors (`dict[str, Tensor]`):
            Tensors of a [`RolloutBatch`] by name.
        transitions ([`~trl_marble.sde.Transitions`], *optional*):
            See [`RolloutBatch`].
    """

    own: range
    parts: list[Part]
    tensors: dict[str, Tensor]
    transitions: Transitions | None = None

    @classmethod
    def load(cls, folder: Path, own: range, num_updates: int, device: torch.device) -> "StoredBatch":
        """
        Read a process's samples, whichever processes they were saved by.

        Each sample stays in its optimizer step. Within a step the samples of one saved part follow those of another,
        so that a process which has saved a part itself finds it in the order in which it was.

        Args:
            folder (`Path`):
                The checkpoint folder, see [`RolloutBatch.save`].
            own (`range`):
                The places of the samples in the generation batch of all processes.
            num_updates (`int`):
                Number of optimizer steps of one pass over the generation batch.
            device (`torch.device`):
                Where to put the tensors that are computed with.

        Raises:
            `FileNotFoundError`: If samples are missing.
        """
        parts: list[Part] = []
        steps: list[Tensor] = []
        found: dict[str, list[Tensor]] = {}
        tensors: dict[str, Tensor] = {}
        for path in _part_files(folder):
            with safe_open(path, framework="pt") as file:
                ids = file.get_tensor("sample_ids")
                chosen = ((ids >= own.start) & (ids < own.stop)).nonzero().flatten()
                if len(chosen) == 0:
                    continue
                first = int(ids.min())
                metadata = file.metadata()
                replaced = json.loads(metadata.get("replaced", "{}"))  # older checkpoints have none
                samples = range(first, first + len(ids))
                parts.append(Part(samples, metadata["rows"], {int(place): row for place, row in replaced.items()}))
                steps.append(chosen // (len(ids) // num_updates))
                for name in file.keys():
                    if name in _OF_SAMPLES:
                        own_part = file.get_tensor(name).index_select(_OF_SAMPLES[name], chosen)
                        found.setdefault(name, []).append(own_part)
                    else:
                        tensors[name] = file.get_tensor(name).clone()
        number = sum(map(len, steps))
        if number < len(own):
            raise FileNotFoundError(
                f"`{folder}` was saved in the middle of a generation batch and has {number} of the {len(own)} images "
                f"that this process goes on with. Copy the files `{_part_file(folder, '*').name}` of all processes "
                "there, or resume from a checkpoint between two generation batches."
            )
        order = torch.cat(steps).argsort(stable=True)
        for name, of_parts in found.items():
            tensors[name] = torch.cat(of_parts, dim=_OF_SAMPLES[name]).index_select(_OF_SAMPLES[name], order)
        fields = {name: tensors.pop(name).to("cpu" if name in _ON_CPU else device) for name in _FIELDS}
        return cls(own, parts, fields, Transitions.of_tensors(tensors, device) if tensors else None)

    @property
    def covered(self) -> range:
        """The places of all samples of the saved parts."""
        return range(self.parts[0].samples.start, self.parts[-1].samples.stop)

    @property
    def replaced(self) -> dict[int, int]:
        """Place of a sample -> its row of the dataset, where it is not the one that was drawn first."""
        return {place: row for part in self.parts for place, row in part.replaced.items()}

    def with_rows(
        self,
        prompts: list[str],
        images: list[Image.Image] | None,
        encode: Callable[[list[str], list[Image.Image] | None], tuple[Conditioning, Tensor]],
    ) -> RolloutBatch:
        """
        The batch with what is made anew from its rows of the dataset.

        Args:
            prompts (`list[str]`):
                The prompt of each sample that is `covered`.
            images (`list[PIL.Image.Image]`, *optional*):
                The images to be edited, one per prompt.
            encode (`Callable`):
                From prompts and images to their different embeddings, and the index of those of each prompt.

        Raises:
            `ValueError`: If these are not the rows that the batch was sampled from.
        """

        def rows_of(samples: range) -> tuple[list[str], list[Image.Image] | None]:
            places = slice(samples.start - self.covered.start, samples.stop - self.covered.start)
            return prompts[places], None if images is None else images[places]

        for part in self.parts:
            rows = rows_of(part.samples)
            if digest_of(*rows) != part.rows_digest:
                raise ValueError(
                    "The checkpoint was saved in the middle of a generation batch that was sampled from other rows "
                    f"than those of this run (the first is {rows[0][0]!r}). Resume with the same `train_dataset` and "
                    "without `ignore_data_skip`, or from a checkpoint between two generation batches."
                )
        rows = rows_of(self.own)
        conditioning, prompt_index = encode(*rows)
        place = self.tensors["sample_ids"] - self.own.start
        return RolloutBatch(
            prompts=rows[0],
            conditioning=conditioning,
            rows_digest=digest_of(*rows),
            prompt_index=prompt_index.cpu()[place],
            **self.tensors,
            transitions=self.transitions,
            replaced={place: row for place, row in self.replaced.items() if place in self.own},
        )


def _part_file(folder: Path, process: int | str) -> Path:
    return folder / f"generation_batch_{process}.safetensors"


def _part_files(folder: Path) -> list[Path]:
    """The parts of all processes, in their order."""
    return sorted(folder.glob(_part_file(folder, "*").name), key=lambda path: int(path.stem.rpartition("_")[2]))


def digest_of(prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> str:
    """
    A digest of the rows of a dataset that a generation batch was sampled from: of their content and order.

    Args:
        prompts (`Sequence[str]`):
            The prompts, one per sample.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            The images to be edited, one per sample.
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
    step = _draw_steps(num_samples, num_updates, generator)
    place = torch.randperm(num_samples, generator=generator)
    key = step * num_samples + place
    return key[own[0] : own[-1] + 1].argsort()


def steps_of_samples(num_samples: int, num_updates: int, seed: int) -> Tensor:
    """
    The optimizer step of a pass in which [`training_order`] has each sample of the generation batch of all processes.

    Args:
        num_samples (`int`):
            See [`training_order`].
        num_updates (`int`):
            See [`training_order`].
        seed (`int`):
            See [`training_order`].

    Returns:
        `Tensor` of shape `[num_samples]`, int64.
    """
    return _draw_steps(num_samples, num_updates, torch.Generator().manual_seed(seed))


def _draw_steps(num_samples: int, num_updates: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num_samples // num_updates, num_updates, generator=generator).argsort(dim=1).flatten()
