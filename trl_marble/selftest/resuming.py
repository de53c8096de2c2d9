# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A run that is resumed from a checkpoint, against one that was not interrupted."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..trainer import MarbleNFTTrainer
from .subject import Subject
from .verdicts import Failed, Finding


# On a GPU sums may be taken in another order each time; on a CPU they are not.
TOLERANCE = 0.05


def check_resuming(subject: Subject) -> Finding:
    """A resumed run ends as the uninterrupted one: bit for bit on a CPU, up to rounding elsewhere."""
    with tempfile.TemporaryDirectory(prefix="selftest") as folder:
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        states = []
        for name, checkpoint in (("whole", None), ("resumed", str(Path(folder, "whole", "checkpoint-1")))):
            with subject.trainer(output_dir=str(Path(folder, name)), **settings) as trainer:
                start = _state(trainer)
                trainer.train(resume_from_checkpoint=checkpoint)
                states.append(_state(trainer))
                on_cpu = trainer.args.device.type == "cpu"
    (whole, resumed), first = states, start
    differing = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    if not differing:
        return Finding("bit for bit", {"bitwise": True})
    distance = _norm([whole[name] - resumed[name] for name in whole])
    moved = _norm([whole[name] - first[name] for name in whole])
    error = distance / moved if moved > 0 else float("inf")
    if on_cpu or not error <= TOLERANCE:
        raise Failed(
            f"the resumed run differs in {len(differing)} of {len(whole)} weights, by {error:.1e} of what training "
            "changed",
            relative_error=error,
        )
    return Finding(
        f"not bit for bit: {error:.1e} of what training changed", {"bitwise": False, "relative_error": error}
    )


def _state(trainer: MarbleNFTTrainer) -> dict[str, Tensor]:
    weights = trainer.weights.state_dict()
    return {f"{kind} {name}": value.cpu().clone() for kind, own in weights.items() for name, value in own.items()}


def _norm(parts: list[Tensor]) -> float:
    return torch.stack([part.float().norm() for part in parts]).norm().item()
