# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Runs the tests of a pretended GPU, which need a process of their own, where everything finds that GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pretended_gpu
import pytest
import torch


ROOT = Path(__file__).parents[2]
# Compiled blocks need Triton, which makes programs for a real GPU only.
NEEDS_A_REAL_ONE = "not compiled_blocks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(not pretended_gpu.has_compiler(), reason="there is no C++ compiler"),
]


def run(*arguments):
    folders = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretended_gpu", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


def test_whole_runs():
    run("-m", "", "tests/device/runs_on_a_gpu.py")


def test_published_sizes():
    run("-m", "", "tests/device/published_sizes_on_a_gpu.py")


def test_what_a_gpu_is_tested_with():
    run("-m", "gpu", "-k", NEEDS_A_REAL_ONE, "tests/gpu")
