# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The script for the first GPU, on a CPU and in tiny: all parts, what is done before, and what fails."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from example_scripts import EXAMPLES


SCRIPT = EXAMPLES / "benchmarks" / "gpu_table.py"
spec = importlib.util.spec_from_file_location("gpu_table", SCRIPT)
gpu_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_table)

MACHINE = {
    "date": "2026-01-02",
    "device_memory_gb": 80.0,
    "environment": {"accelerator": "H100 (CUDA 13)", "torch": "2", "diffusers": "1", "trl_marble": "0"},
}


def run(folder, *words, status=0):
    command = [sys.executable, SCRIPT, "--size", "tiny", "--device", "cpu", "--output_dir", folder, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


def write_results(folder, **parts):
    content = {"size": "tiny", "device": "cpu", "parts": parts}
    (folder / "results.json").write_text(json.dumps(content))


def test_all_parts_together_take_less_than_eight_minutes():
    assert sum(gpu_table.SECONDS.values()) < 480 and gpu_table.SECONDS.keys() == gpu_table.MEASURE.keys()


def test_parts_that_are_done_are_not_measured_again(tmp_path):
    write_results(tmp_path, machine={"status": "done", "seconds": 1.0, "result": MACHINE})
    assert run(tmp_path, "--parts", "machine") == "machine: done before\n"


def test_results_of_another_size_are_refused(tmp_path):
    write_results(tmp_path)
    command = [sys.executable, SCRIPT, "--device", "cpu", "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "is of --size tiny --device cpu; give another --output_dir" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_begun(tmp_path):
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU is visible; `--size tiny --device cpu`" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_or_takes_too_long_says_so(tmp_path, monkeypatch):
    fails = tmp_path / "fails.py"
    fails.write_text("import sys\nraise ValueError('no such device in /home/me/x.py')\n")
    monkeypatch.setattr(gpu_table, "__file__", str(fails))
    part = gpu_table.run_part("machine", "tiny", "cpu")
    assert (part["status"], part["error"]) == ("failed", "ValueError: no such device in x.py")
    fails.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setitem(gpu_table.SECONDS, "machine", 0.2)
    assert gpu_table.run_part("machine", "tiny", "cuda")["error"] == "it was not done after 0.2 s"
    results = {"size": "tiny", "device": "cpu", "parts": {"machine": part}}
    assert gpu_table.to_markdown(results) == "The part `machine` failed: ValueError: no such device in x.py\n"


def test_the_machine_and_the_memory_are_a_section_of_the_page():
    measured = {"defaults": "out of memory", "+ activation_checkpointing": 34.123, "+ quantize_base nf4": None}
    computed = {"defaults": 38.71, "+ activation_checkpointing": 33.6, "+ quantize_base nf4": 12.4}
    parts = {"machine": MACHINE, "memory": measured, "computed": computed}
    content = {name: {"status": "done", "seconds": 1, "result": result} for name, result in parts.items()}
    written = gpu_table.to_markdown({"size": "sd3.5m", "device": "cuda", "parts": content})
    assert written.startswith("Measured on 2026-01-02: H100 (CUDA 13) with 80 GB, torch 2, ")
    assert "| defaults | 38.71 | out of memory |\n| + activation_checkpointing | 33.60 | 34.12 |\n" in written
    assert written.endswith("| + quantize_base nf4 | 12.40 | – |\n")


@pytest.mark.slow
def test_all_parts_run_on_a_cpu_in_tiny(tmp_path):
    run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: part["status"] for name, part in results.items()} == dict.fromkeys(gpu_table.MEASURE, "done")
    costs, profile = results["costs"]["result"], results["profile"]["result"]
    assert list(costs) == list(gpu_table.MODES)
    # One micro-step, in which the old policy runs too: balancing takes a pass for all rewards and one for what they
    # share, the paper's way one more for each reward.
    assert [costs[mode]["backwards"] for mode in costs] == [1, 2, 6]
    assert all(row["update_seconds"] > 0 and row["sampling_seconds"] > 0 for row in costs.values())
    assert list(results["memory"]["result"].values()) == [None] * 6
    assert all(need > 0 for need in results["computed"]["result"].values())
    assert profile["first"]["time/step"] > profile["first"]["time/rollout"] > 0
    assert len(profile["operations"]) == gpu_table.OPERATIONS
    table = (tmp_path / "table.md").read_text()
    for words in ("exact balancing", "+ activation_checkpointing", "| rollout |", "aten::"):
        assert words in table
    assert run(tmp_path).count("done before") == 5
