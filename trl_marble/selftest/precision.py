# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Directions in bf16 against those in fp32."""

import torch
from torch.nn.functional import cosine_similarity

from ..balance import gram_matrix, harmonize
from ..balance.weightings import get_weighting
from .micro_step import MicroStep
from .subject import Subject
from .verdicts import Failed, Finding, Skipped


LEAST_COSINE = 0.95
# Of the distance between the balanced directions, in units of the rewards' mean gradient: where rewards conflict, the
# direction is much shorter than that, and its own length and angle are as uncertain.
MOST_DISTANCE = 0.1


def check_precision(subject: Subject) -> Finding:
    """Each reward's gradient and the balanced direction in bf16 point where they point in fp32."""
    with subject.trainer(per_device_train_batch_size=8, num_generations=4) as trainer:
        step, transformer = MicroStep(trainer), trainer.flow.transformer
        trainer.flow.autocast_dtype = torch.bfloat16
        low = step.weighted()
        trainer.flow.autocast_dtype = None
        try:
            transformer.float()
            step.convert(torch.float32)
            high = step.weighted()
        except torch.OutOfMemoryError:
            raise Skipped("the weights do not fit into the device's memory in fp32") from None
        finally:
            for name, parameter in transformer.named_parameters():  # the adapter stays in fp32
                if name not in trainer.weights.trained:
                    parameter.data = parameter.data.to(subject.dtype)
            for buffer in transformer.buffers():
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(subject.dtype)
    cosines = cosine_similarity(low, high, dim=1).tolist()
    directions = _direction(low), _direction(high)
    distance = ((directions[0] - directions[1]).norm() / high.norm(dim=1).mean()).item()
    measured = {
        "cosines": cosines,
        "distance_of_directions": distance,
        "cosine_of_directions": cosine_similarity(*directions, dim=0).item(),
    }
    if not (min(cosines) >= LEAST_COSINE and distance <= MOST_DISTANCE):
        raise Failed(
            f"bf16 and fp32 disagree: smallest cosine {min(cosines):.4f} of a reward's gradient (at least "
            f"{LEAST_COSINE}), distance of the directions {distance:.1e} (at most {MOST_DISTANCE})",
            **measured,
        )
    return Finding(f"smallest cosine {min(cosines):.4f}, distance of the directions {distance:.1e}", measured)


def _direction(rows: torch.Tensor) -> torch.Tensor:
    """The balanced direction of per-reward gradients."""
    active = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return harmonize(gram_matrix(rows), get_weighting("mgda"), active).weights.to(rows) @ rows
