# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Teachers: frozen adapters of the same base model, whose velocities a policy is to have."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor

from .adapters import load_beside_trained


ALL = "all"  # before the name of a teacher of all prompts


@dataclass(frozen=True)
class Teacher:
    """
    An adapter that the policy learns from.

    Args:
        name (`str`):
            What it is called in metrics.
        adapter (`str`):
            Where it is: a Hub id, a folder or a `.safetensors` file, see [`~trl_marble.pipelines.find_adapter`].
        adapter_name (`str`):
            Its name in the transformer.
        source (`str`, *optional*):
            The source of the prompts that it is followed on, as the column `source` has it; all prompts if left out.
    """

    name: str
    adapter: str
    adapter_name: str
    source: str | None = None

    @property
    def key(self) -> str:
        """What the trainer is given as the name of the teacher."""
        return self.name if self.source is not None or self.name == ALL else f"{ALL}:{self.name}"

    @property
    def row(self) -> str:
        """What its gradient is called among those of the rewards."""
        return f"teacher_{self.name}"


def load_teachers(pipeline: DiffusionPipeline, teachers: Sequence[Teacher]) -> dict[str, str]:
    """
    Load teachers beside the adapter that is trained.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline with the adapter that is trained, changed in place.
        teachers (`Sequence[Teacher]`):
            The teachers.

    Returns:
        `dict[str, str]`: The name of each teacher -> a digest of its weights and of what it teaches.

    Raises:
        `OSError`: If there is no such adapter.
        `ValueError`: If an adapter does not fit the pipeline. The message names the teacher.
    """
    digests = {}
    for teacher in teachers:
        try:
            weights = load_beside_trained(pipeline, teacher.adapter, teacher.adapter_name)
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"The teacher {teacher.name!r} cannot be loaded. {error}") from error
        digests[teacher.name] = _digest(weights, teacher.source)
    return digests


def _digest(weights: dict[str, Tensor], source: str | None) -> str:
    digest = hashlib.blake2b(repr(source).encode(), digest_size=16)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
