# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Run by `test_trackers.py` in a process of its own, for trackers keep state: trains with all three of them."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trainer_helpers import PROMPTS, blue, bright, small_trainer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    prompts = Dataset.from_dict({"prompt": PROMPTS, "source": ["even", "odd"] * 3})
    trainer = small_trainer(
        folder / "run",
        [bright, blue],
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        report_to=["tensorboard", "wandb", "trackio"],
        log_images=True,
        log_images_steps=2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
    )
    trainer.train()

    import trackio

    (run,) = trackio.Api().runs("huggingface")
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("huggingface", run.name)
    (folder / "trackio.json").write_text(json.dumps(logs))
