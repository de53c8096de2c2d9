# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""How a run divides its batches among processes: that may change when it is resumed, the batches may not."""

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ..rollout import BatchLayout


@dataclass(frozen=True)
class BatchDivision:
    """
    How optimizer steps and generation batches are divided among processes and micro-batches.

    Args:
        num_processes (`int`):
            Processes that share the work.
        layout ([`~trl_marble.rollout.BatchLayout`]):
            The layout of a generation batch on each of them.
    """

    num_processes: int
    layout: BatchLayout

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step on all processes."""
        return self.layout.micro_batch_size * self.layout.micro_batches_per_update * self.num_processes

    def to_json(self) -> dict[str, Any]:
        """What [`~BatchDivision.from_json`] reads."""
        return {"world_size": self.num_processes, "generation_batch": list(astuple(self.layout))}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "BatchDivision":
        """Read what [`~BatchDivision.to_json`] returned, among other entries."""
        return cls(content["world_size"], BatchLayout(*content["generation_batch"]))

    def check_continues(self, saved: "BatchDivision", folder: Path) -> None:
        """
        See that this run has the batches of a checkpoint, however they are divided.

        Args:
            saved ([`BatchDivision`]):
                That of the checkpoint.
            folder (`Path`):
                The checkpoint.

        Raises:
            `ValueError`: If it has others, with the settings that would give the same.
        """
        if self._batches() == saved._batches():
            return
        raise ValueError(
            f"`{folder}` was trained with {saved._describe()}, and this run has {self._describe()}. A run may go on "
            f"with another number of processes, but not with other batches. {self._advise(saved)}"
        )

    def _batches(self) -> tuple[int, int, int]:
        return self.images_per_step, self.layout.updates_per_pass, self.layout.num_iterations

    def _describe(self) -> str:
        layout = self.layout
        return (
            f"{self.images_per_step} images per optimizer step (`per_device_train_batch_size` "
            f"{layout.micro_batch_size} x `gradient_accumulation_steps` {layout.micro_batches_per_update} x "
            f"{self.num_processes} process{'' if self.num_processes == 1 else 'es'}), {layout.updates_per_pass} "
            f"optimizer step{'' if layout.updates_per_pass == 1 else 's'} for each pass over a generation batch "
            f"(`steps_per_generation` {layout.micro_batches_per_pass}) and `num_iterations` {layout.num_iterations}"
        )

    def _advise(self, saved: "BatchDivision") -> str:
        """Which settings give the batches of a checkpoint on this number of processes."""
        share, rest = divmod(saved.images_per_step, self.num_processes)
        if rest:
            fitting = [n for n in range(1, saved.images_per_step + 1) if saved.images_per_step % n == 0]
            return (
                f"{saved.images_per_step} images cannot be divided equally among {self.num_processes} processes: "
                f"start one of {', '.join(map(str, fitting))}."
            )
        own = self.layout
        size = next(n for n in range(min(own.micro_batch_size, share), 0, -1) if share % n == 0)
        accumulation = share // size
        wanted = {
            "per_device_train_batch_size": (own.micro_batch_size, size),
            "gradient_accumulation_steps": (own.micro_batches_per_update, accumulation),
            "steps_per_generation": (own.micro_batches_per_pass, saved.layout.updates_per_pass * accumulation),
            "num_iterations": (own.num_iterations, saved.layout.num_iterations),
        }
        changes = [f"`{name}={new}`" for name, (now, new) in wanted.items() if new != now]
        return f"Set {' and '.join(changes)}."
