# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Run by `test_two_processes_saving.py` under torchrun: saves together, resumes together, and fails together."""

import resource
import sys
from pathlib import Path

import torch
from trainer_helpers import small_trainer
from transformers import TrainerCallback

from trl_marble.checkpoint.folder import CheckpointWriteError


SETTINGS = {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 2,  # the first checkpoint is inside a generation batch
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
}


class LimitFilesOfTheSecondProcess(TrainerCallback):
    """From the second step on, the second process can write no file of more than 100 bytes."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    small_trainer(folder / "whole", **SETTINGS).train()
    resumed = small_trainer(folder / "resumed", **SETTINGS)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-1"))
    failing = small_trainer(folder / "failing", callbacks=[LimitFilesOfTheSecondProcess()], **SETTINGS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        failing.train()
    except CheckpointWriteError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (folder / f"error_{failing.args.process_index}.txt").write_text(str(error))
