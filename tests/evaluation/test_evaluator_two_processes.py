# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Two processes give the results of one, fail together, and leave to one what they did not finish."""

import json
import os
import subprocess
import sys
from pathlib import Path

import one_evaluator
import pytest
from evaluation_helpers import Unusual, bright, prompt_set, rank_in_prompt, red_only, small_evaluation
from tiny import tiny_sd3

from trl_marble.evaluation import evaluate_pipeline


pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[1] / "support" / "evaluation_worker.py"
REWARDS = [bright, red_only, rank_in_prompt, Unusual()]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(WORKER), str(folder), "work"]
    subprocess.run(command, check=True, timeout=300, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same evaluation on one process."""
    args = small_evaluation(tmp_path_factory.mktemp("one"))
    return evaluate_pipeline(tiny_sd3(t5=False, num_layers=1), REWARDS, prompt_set(), args)


def test_two_processes_are_one(two, alone) -> None:
    for name in ("scores.csv", "evaluation.json"):
        assert (two / name).read_bytes() == (alone.folder / name).read_bytes(), name
    assert [(two / f"rank{rank}.csv").read_text() for rank in (0, 1)] == [alone.table.to_csv()] * 2


def test_two_processes_fail_together_and_what_was_finished_is_not_done_again(two, alone) -> None:
    first, second = ((two / f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    error = "RewardError: Process 1 of 2 failed with RewardError: Reward `bright` raised ConnectionError: scorer went"
    assert first.startswith(error)
    # The first process may have finished both of its batches when the second one's fails.
    sizes = {"batch_00000.json": 5, "batch_00002.json": 2}
    finished = {file.name for file in (two / "failing" / "records").glob("batch_*")}
    assert finished <= sizes.keys()
    calls = []

    def counted(images, **kwargs):
        calls.extend(images)
        return bright(images)

    counted.__name__ = "bright"
    args = small_evaluation(two / "failing")
    evaluate_pipeline(tiny_sd3(t5=False, num_layers=1), [counted, *REWARDS[1:]], prompt_set(), args)
    assert len(calls) == 12 - sum(sizes[name] for name in finished)
    assert (two / "failing" / "scores.csv").read_bytes() == (alone.folder / "scores.csv").read_bytes()


def test_trainers_and_files_say_the_same_on_any_number_of_processes(two) -> None:
    said = [each for rank in (0, 1) for each in json.loads((two / f"rank{rank}.json").read_text())]
    (two / "trained" / "evaluation").rename(two / "trained" / "of two")
    alone = one_evaluator.evaluate_file(two / "trained")  # the adapter that two have trained
    for each in said:
        one_evaluator.assert_same(each, one_evaluator.describe(alone))
