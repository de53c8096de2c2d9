# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Run by tests/evaluation: evaluates into a folder, on one or more processes, and may die on the way."""

import json
import os
import signal
import sys
from pathlib import Path

import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import one_evaluator  # noqa: E402
from evaluation_helpers import Unusual, prompt_set, rank_in_prompt, red_only, small_evaluation  # noqa: E402
from evaluation_helpers import bright as brightness  # noqa: E402
from tiny import tiny_sd3  # noqa: E402

from trl_marble.evaluation import evaluate_pipeline  # noqa: E402


calls = 0
rank = int(os.environ.get("RANK", 0))


def bright(images, **kwargs):
    global calls
    calls += 1
    if mode == "kill" and calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return brightness(images)


def bright_but_on_rank_1(images, **kwargs):
    if rank == 1:
        raise ConnectionError("scorer went away")
    return brightness(images)


if __name__ == "__main__":
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    others = (red_only,) if mode == "kill" else (red_only, rank_in_prompt, Unusual())
    pipeline = tiny_sd3(t5=False, num_layers=1)
    results = evaluate_pipeline(pipeline, [bright, *others], prompt_set(), small_evaluation(folder))
    (folder / f"rank{rank}.csv").write_text(results.table.to_csv())

    bright_but_on_rank_1.__name__ = "bright"
    failing = small_evaluation(folder / "failing")
    try:
        evaluate_pipeline(pipeline, [bright_but_on_rank_1, *others], prompt_set(), failing)
    except Exception as error:
        (folder / f"rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")

    both = one_evaluator.evaluate_both(folder / "trained", per_device_train_batch_size=2)
    (folder / f"rank{rank}.json").write_text(json.dumps(both))
