# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
The files of `examples/launchers`, without a cluster: the SLURM script with stand-ins for SLURM's commands, and Ray
Train on a local Ray where that is installed.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from trl_marble.checkpoint.settings import load_settings


pytestmark = pytest.mark.slow
LAUNCHERS = Path(__file__).parents[2] / "examples" / "launchers"
TIMEOUT = 900  # seconds, of which about 60 are needed on two cores
ADAPTER = "pytorch_lora_weights.safetensors"
REWARDS = '''
import os
import signal
from pathlib import Path

import numpy as np


def once(name):
    """Whether this is process 1 of the first run."""
    return os.environ.get("RANK") == "1" and not Path(name).exists() and Path(name).touch() is None


def bright(images, **kwargs):
    return [round(float(np.asarray(image).mean()) / 255, 3) for image in images]


def left(images, **kwargs):
    """How much brighter the left half is than the right one."""
    grey = [np.asarray(image).mean(axis=2) / 255 for image in images]
    return [round(float(pixels[:, :8].mean() - pixels[:, 8:].mean()), 3) for pixels in grey]


def terminated(images, trainer_state, **kwargs):
    """Process 1 receives SIGTERM in the third step of the first run."""
    if trainer_state.global_step == 2 and once("terminated"):
        os.kill(os.getpid(), signal.SIGTERM)
    return left(images)


def broken(images, trainer_state, **kwargs):
    """Process 1 fails in the third step of the first run."""
    if trainer_state.global_step == 2 and once("broken"):
        raise ConnectionError("scorer went away")
    return left(images)
'''
SETTINGS = {
    "model": "base",
    "prompts": "prompts.txt",
    "output_dir": "run",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_generations": 4,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "max_steps": 4,
    # Plain gradient descent: Adam's first step has full size even where a gradient is only a rounding error.
    "optim": "sgd",
    "learning_rate": 10.0,
    "max_grad_norm": 0.0,
    "report_to": "none",
    "log_images": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "save_steps": 100,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("launchers") / "base"
    tiny.tiny_sd3(num_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, base) -> Path:
    """A folder with `base`, `prompts.txt`, `my_rewards.py` and `run.yaml`."""
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "prompts.txt").write_text("a red dog\na cat\nred hat\ntree\nbig red\nsky\n")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return tmp_path


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def train_alone(folder: Path, reward: str) -> dict[str, torch.Tensor]:
    """The adapter of one process that was never stopped."""
    words = ["--config", "run.yaml", "--rewards", "my_rewards.bright", f"my_rewards.{reward}", "--output_dir", "alone"]
    words += ["--per_device_train_batch_size", "8"]
    done = run(folder, sys.executable, "-m", "trl_marble.cli.main", "train", *words)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "alone" / ADAPTER)


def assert_same(adapter: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert adapter.keys() == expected.keys()
    for name, value in adapter.items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert any(value.norm() > 0 for name, value in adapter.items() if "lora_B" in name)


# ---- SLURM ----

# As SLURM does it: `srun` starts one process a task, and ends with the largest status of them.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
largest=0
for task in "${tasks[@]}"; do
    wait "$task"
    status=$?
    [ "$status" -gt "$largest" ] && largest=$status
done
exit "$largest"
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then
    printf '%s\\n' localhost other
else
    echo "$@" >> asked_of_scontrol
fi
"""


def slurm(folder: Path, num_tasks: int, *words: str) -> subprocess.CompletedProcess:
    """What `sbatch slurm.sh --config run.yaml ...` runs."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    command = f'#!/bin/bash\nexec {sys.executable} -m trl_marble.cli.main "$@"\n'
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("trl-marble", command)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NTASKS": str(num_tasks)}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return run(folder, str(LAUNCHERS / "slurm.sh"), "--config", "run.yaml", *words, PATH=path, **job)


def test_a_job_that_gets_sigterm_saves_is_requeued_and_goes_on_with_fewer_processes(workplace) -> None:
    rewards = ["--rewards", "my_rewards.bright", "my_rewards.terminated"]
    first = slurm(workplace, 2, *rewards)
    assert first.returncode == 143, first.stderr
    assert "begins anew" in first.stderr and "has received SIGTERM: the run ends here" in first.stderr
    assert first.stderr.count("Ended by SIGTERM. Continue from the latest checkpoint") == 1
    assert [path.name for path in (workplace / "run").glob("*checkpoint-*")] == ["checkpoint-2"]
    assert (workplace / "asked_of_scontrol").read_text() == f"requeue {os.getpid()}\n"

    refused = slurm(workplace, 1, *rewards)
    assert refused.returncode not in (0, 143)
    assert "Set `gradient_accumulation_steps=2` and `steps_per_generation=2`." in refused.stderr
    second = slurm(workplace, 1, *rewards, "--per_device_train_batch_size", "8")
    assert second.returncode == 0, second.stderr
    assert re.search(r"Resuming from `run/checkpoint-2`, step 2.*num_processes 2 -> 1", second.stderr)
    assert (workplace / "asked_of_scontrol").read_text().count("\n") == 1  # neither of the two was put back
    assert_same(load_file(workplace / "run" / ADAPTER), train_alone(workplace, "terminated"))


def test_slurm_reads_every_option_of_the_script() -> None:
    """Options behind the first command would be ignored without a word."""
    lines = (LAUNCHERS / "slurm.sh").read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert options and max(options) < first_command
    assert any("--signal=TERM@" in lines[number] for number in options)
    assert subprocess.run(["bash", "-n", str(LAUNCHERS / "slurm.sh")]).returncode == 0


# ---- Ray Train ----


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'ray[train]'")
def test_ray_workers_train_together_and_go_on_after_a_failure(workplace) -> None:
    words = ["--config", "run.yaml", "--rewards", "my_rewards.bright", "my_rewards.broken"]
    # Else workers would have the lowest priority, and on a busy machine no time at all.
    ray = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    script = str(LAUNCHERS / "ray_train.py")
    done = run(workplace, sys.executable, script, "--num_workers", "2", "--max_failures", "1", *words, **ray)
    assert done.returncode == 0, done.stderr
    assert (workplace / "broken").exists()
    history = load_settings(workplace / "run" / "checkpoint-4")
    assert [each.settings["num_processes"] for each in history] == [2]
    assert_same(load_file(workplace / "run" / ADAPTER), train_alone(workplace, "broken"))
