# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""One step, by any number of processes: `python -m trl_marble.selftest.worker FILE BF16 SOURCE`, run by torchrun."""

import os
import sys

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from .micro_step import scatter
from .subject import SETTINGS, Subject


class KeepDirection(TrainerCallback):
    """Copies the direction of a step before the optimizer sees it."""

    direction: Tensor

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.direction = torch.cat([parameter.grad.flatten().cpu().clone() for parameter in self.parameters])


def take_step(subject: Subject, num_processes: int) -> Tensor:
    """
    The direction of one step, of the same images whatever the number of processes.

    Args:
        subject ([`Subject`]):
            What is trained.
        num_processes (`int`):
            The processes that share it; each calls this.
    """
    size = SETTINGS["per_device_train_batch_size"] // num_processes
    settings = {"max_grad_norm": 0.0, "use_cpu": not torch.cuda.is_available()}
    with subject.trainer(per_device_train_batch_size=size, **settings) as trainer:
        scatter(trainer)
        keep = KeepDirection(trainer.weights.parameters)
        trainer.add_callback(keep)
        trainer.train()
        return keep.direction


if __name__ == "__main__":
    file, bf16, source = sys.argv[1:]
    direction = take_step(Subject(source or None, bool(int(bf16))), int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        save_file({"direction": direction}, file)
