# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The files of `examples/accelerate_configs` start what they say, and a process that dies takes the others with it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import scenarios
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
TIMEOUT = 200  # seconds, of which about 20 are needed
SHORT = {"max_steps": 1, "per_device_train_batch_size": 4}


def launch(folder: Path, config: str, *options: str, **scenario) -> subprocess.Popen:
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]
    words += [scenarios.__file__, str(folder), json.dumps({"run": scenario})]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen) -> str:
    """What the processes said on stderr, when all of them have ended."""
    try:
        return process.communicate(timeout=TIMEOUT)[1]
    finally:
        process.kill()  # where they hang


@pytest.mark.parametrize(
    ("config", "kind", "machines"),
    [
        ("single_gpu.yaml", DistributedType.NO, 1),
        ("multi_gpu.yaml", DistributedType.MULTI_GPU, 1),
        ("multi_node.yaml", DistributedType.MULTI_GPU, 2),
    ],
)
def test_accelerate_reads_the_files(config, kind, machines) -> None:
    read = load_config_from_file(str(CONFIGS / config))
    assert (read.distributed_type, read.num_machines) == (kind, machines)
    assert read.num_processes % machines == 0 and (read.num_processes > 1) is (kind is not DistributedType.NO)
    assert read.mixed_precision == "no" and read.use_cpu is False


@pytest.mark.slow
def test_one_process_is_launched(tmp_path) -> None:
    process = launch(tmp_path, "single_gpu.yaml", **SHORT)
    said = wait(process)
    assert process.returncode == 0, said[-3000:]
    assert [file.name for file in (tmp_path / "run").glob("rank*.json")] == ["rank0.json"]


@pytest.mark.slow
def test_two_machines_train_together(tmp_path) -> None:
    """Both are this one, with a process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    machines = [launch(tmp_path, "multi_node.yaml", *options, "--machine_rank", str(rank), **SHORT) for rank in (0, 1)]
    for machine in machines:
        said = wait(machine)
        assert machine.returncode == 0, said[-3000:]
    first, second = (load_file(tmp_path / "run" / f"rank{rank}.safetensors") for rank in (0, 1))
    assert first["change"].equal(second["change"]) and first["change"].norm() > 0
    assert not first["sample_ids/0"].equal(second["sample_ids/0"])


@pytest.mark.slow
def test_where_a_process_is_killed_the_others_are_stopped(tmp_path) -> None:
    process = launch(tmp_path, "multi_gpu.yaml", "--num_processes", "2", **SHORT | {"max_steps": 3}, fault="kill")
    said = wait(process)
    assert process.returncode != 0 and "-9" in said
    # The other one is stopped, or its connection breaks, whatever comes first.
    ends = [json.loads(file.read_text()) for file in (tmp_path / "run").glob("rank*.json")]
    assert all("error" in end for end in ends) and not (tmp_path / "run" / "rank1.json").exists()
