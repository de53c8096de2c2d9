# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Run by `test_killed_runs.py`: starts a run on ShapeWorld for each line it reads, in a process of its own.

The processes are forked from one that has imported everything and trained nothing, which saves the seconds that
imports take and is otherwise a fresh start. A run may be asked to kill itself at a moment of its own, such as the
second time that a checkpoint is about to get its name; at other moments it is killed from outside.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 (what a run imports late is imported before the fork)
import torch
from transformers import TrainerCallback

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs


class Moments:
    """Notes what the run is doing now, for whoever kills it, and kills it at the moment that was asked for."""

    def __init__(self, note: Path, kill_at: list | None) -> None:
        self.file = os.open(note, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        self.kill_at = kill_at
        self.counts: dict[str, int] = {}

    def mark(self, moment: str) -> None:
        os.pwrite(self.file, moment.ljust(16).encode(), 0)
        self.counts[moment] = self.counts.get(moment, 0) + 1
        if self.kill_at == [moment, self.counts[moment]]:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Events of the interpreter itself, which come right before what they tell of is done."""
        if event == "open" and "/tmp-checkpoint-" in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.mark("write")
        elif event == "os.rename" and "/tmp-checkpoint-" in str(args[0]):
            self.mark("rename")
        elif event == "os.rename" and "/tmp-old-checkpoint-" in str(args[1]):
            self.mark("prune")
        elif event == "shutil.rmtree" and "/tmp-old-checkpoint-" in str(args[0]) and Path(args[0]).exists():
            self.mark("delete")


class WatchedTrainer(MarbleNFTTrainer):
    """Marks the parts of a step."""

    moments: Moments

    def progress(self, what, total):
        self.moments.mark(what)
        return super().progress(what, total)


class NoteResumed(TrainerCallback):
    def __init__(self, note: Path) -> None:
        self.note = note

    def on_train_begin(self, args, state, control, **kwargs):
        self.note.write_text(str(state.global_step))


def train(pipeline: Any, prompts: Any, folder: Path, steps: int, kill_at: list | None) -> None:
    folder.mkdir(exist_ok=True)
    moments = WatchedTrainer.moments = Moments(folder / "moment.txt", kill_at)
    sys.addaudithook(moments.audit)
    args = MarbleConfig(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=2,  # every other checkpoint is inside a generation batch
        num_generations=2,
        num_inference_steps=2,
        timestep_fraction=0.5,
        balance_every=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        max_steps=steps,
        save_steps=1,
        save_total_limit=2,
        log_images=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        push_to_hub=True,
        hub_model_id=f"me/{folder.name}",
        hub_strategy="checkpoint",
        hub_always_push=True,
    )
    trainer = WatchedTrainer(
        pipeline, reward_funcs(), args, train_dataset=prompts, callbacks=[NoteResumed(folder / "resumed.txt")]
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    trainer.save_model()


if __name__ == "__main__":
    torch.set_num_threads(1)
    pipeline, prompts = load_pipeline(), load_prompts("train").select(range(24))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                train(pipeline, prompts, Path(request["folder"]), request["steps"], request["kill_at"])
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
