# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A disk that is full or read-only stops a run with an error that says what to do; what was saved before stays."""

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainer_helpers import small_trainer
from transformers import TrainerCallback

from trl_marble.checkpoint.folder import CheckpointWriteError, find_damage


SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
ADAPTER = "checkpoint-3/pytorch_lora_weights.safetensors"


class BeforeStep(TrainerCallback):
    """Does something to the disk before an optimizer step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> bytes:
    """What the run leaves where nothing fails."""
    folder = tmp_path_factory.mktemp("whole")
    small_trainer(folder, **SETTINGS).train()
    return (folder / ADAPTER).read_bytes()


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system in memory, large enough at first."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, "size=64m")
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def assert_stopped_and_resumed(folder: Path, error: CheckpointWriteError, cause: str, adapter: bytes) -> None:
    for part in (str(folder / "checkpoint-2"), cause, "MB are free there", "resume_from_checkpoint=True"):
        assert part in str(error)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1"]
    assert find_damage(folder / "checkpoint-1") is None
    resumed = small_trainer(folder, **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert (folder / ADAPTER).read_bytes() == adapter


def test_a_full_disk(disk, adapter, caplog) -> None:
    def fill() -> None:
        remount(disk, f"size={used(disk) * 3 // 2}")  # half of another checkpoint fits

    trainer = small_trainer(disk, callbacks=[BeforeStep(1, fill)], **SETTINGS)
    with pytest.raises(CheckpointWriteError) as caught:
        trainer.train()
    assert "Training stopped" not in caplog.text and "failed too" not in caplog.text  # it was tried once
    remount(disk, "size=64m")
    assert_stopped_and_resumed(disk, caught.value, "No space left on device", adapter)


def test_a_disk_that_becomes_read_only(disk, adapter) -> None:
    trainer = small_trainer(disk, callbacks=[BeforeStep(1, lambda: remount(disk, "ro"))], **SETTINGS)
    with pytest.raises(CheckpointWriteError) as caught:
        trainer.train()
    remount(disk, "rw")
    assert_stopped_and_resumed(disk, caught.value, "Read-only file system", adapter)


def test_a_limit_on_the_size_of_files(tmp_path, adapter) -> None:
    """Needs no rights to mount anything, and fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    trainer = small_trainer(tmp_path, callbacks=[BeforeStep(1, limit)], **SETTINGS)
    try:
        with pytest.raises(CheckpointWriteError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_stopped_and_resumed(tmp_path, caught.value, "File too large", adapter)
