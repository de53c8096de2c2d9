# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Two processes give the results of one, fail together, and leave to one what they did not finish."""

import os
import subprocess
import sys
from pathlib import Path

from evaluation_helpers import bright, prompt_set, red_only, small_evaluation

from trl_marble.evaluation import evaluate_pipeline


WORKER = Path(__file__).parents[1] / "support" / "evaluation_worker.py"


def test_two_processes_are_one(tmp_path, tiny_sd3) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = tmp_path / "two"
    command = [sys.executable, *launcher, str(WORKER), str(two), "work"]
    subprocess.run(command, check=True, timeout=200, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    task = tiny_sd3(t5=False, num_layers=1), [bright, red_only], prompt_set()
    alone = evaluate_pipeline(*task, small_evaluation(tmp_path / "one"))
    for name in ("scores.csv", "evaluation.json"):
        assert (two / name).read_bytes() == (alone.folder / name).read_bytes(), name
    assert [(two / f"rank{rank}.csv").read_text() for rank in (0, 1)] == [alone.table.to_csv()] * 2

    # They fail together and at once, and what the one finished is not done again.
    first, second = ((two / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    error = "RewardError: Process 1 of 2 failed with RewardError: Reward `bright` raised ConnectionError: scorer went"
    assert first.startswith(error)
    finished = {file.name for file in (two / "failing" / "records").glob("batch_*")}
    assert finished == {"batch_00000.json"}
    evaluate_pipeline(*task, small_evaluation(two / "failing"))
    assert (two / "failing" / "scores.csv").read_bytes() == (alone.folder / "scores.csv").read_bytes()
