# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Two processes, each on a GPU of its own, against one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from .micro_step import relative_error
from .subject import Subject
from .verdicts import Failed, Finding, Skipped
from .worker import take_step


SECONDS = 120
VISIBLE = "CUDA_VISIBLE_DEVICES"


class ProcessCheck:
    """
    Two processes, each with half of the images, take the step that one takes.

    Args:
        num_gpus (`int`):
            How many GPUs the machine has for them.
        visible (`str`, *optional*):
            The value of `CUDA_VISIBLE_DEVICES` with which they see these, where there is one.
    """

    def __init__(self, num_gpus: int, visible: str | None = None) -> None:
        self.num_gpus, self.visible = num_gpus, visible

    def require(self) -> None:
        """
        Ask for two GPUs.

        Raises:
            [`Skipped`]: If there are fewer.
        """
        if self.num_gpus < 2:
            raise Skipped(f"it needs two GPUs, and there {'is one' if self.num_gpus else 'are none'}")

    def __call__(self, subject: Subject) -> Finding:
        with tempfile.TemporaryDirectory(prefix="selftest") as folder:
            file = Path(folder, "direction.safetensors")
            self._run(subject, file)
            found = load_file(file)["direction"]
        expected = take_step(subject, 1)
        error = relative_error(found[None], expected[None])
        if not error <= subject.tolerance:
            raise Failed(f"two processes take another step than one: relative error {error:.1e}", relative_error=error)
        return Finding(f"relative error of the step's direction {error:.1e}", {"relative_error": error})

    def _run(self, subject: Subject, file: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != VISIBLE}
        if self.visible is not None:
            environment[VISIBLE] = self.visible
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = ["-m", "trl_marble.selftest.worker", str(file), str(int(subject.bf16)), subject.source or ""]
        try:
            done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"two processes were not done after {SECONDS} s") from None
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "Error" in line and "ChildFailedError" not in line]
            raise Failed(f"two processes failed: {errors[-1].strip() if errors else f'status {done.returncode}'}")
